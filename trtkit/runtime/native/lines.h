// What this CPU's vectors can do, and the pieces in which matrices lie in memory: lines, and tiles of lines.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define TRTKIT_DOTS  // vectors multiply fours of bytes and add them up
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define TRTKIT_BF16_DOTS  // and pairs of bf16
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TRTKIT_TILES  // and there are matrix units (AMX)
#endif
#endif
#include <immintrin.h>

#include <cstdint>

namespace trtkit {

constexpr int64_t LINE = 64;  // bytes
constexpr int64_t SIDE = 16;  // lines of a tile, numbers of 32 bits in a line
constexpr int64_t TILE = SIDE * LINE;

inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += LINE) _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T0);
}

}  // namespace trtkit
#endif
