// Weights for the tile registers (AMX), beside those of ``weight_formats.h``: 8-bit codes, as they are or widened to bf16.
#pragma once

#include "tile_registers.h"
#include "weight_formats.h"

#ifdef TRTKIT_TILES

namespace trtkit::tiles {

// x is rounded to int8 codes: W8A8.
struct Int8Codes {
  static constexpr int64_t K = 64, BYTES = TILE, LINES = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = false, INTEGER = true;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    tile[k / 4 * 64 + n * 4 + k % 4] = static_cast<uint8_t>(word);
  }
};

// x is written with three digits of base 256: its numbers next to the row's largest as exactly as in float32.
struct Int8 : Int8Codes {};

struct Fp8 {
  static constexpr int64_t K = 32, BYTES = TILE / 2, LINES = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = true, INTEGER = false;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    tile[k / 2 * 32 + n * 2 + k % 2] = static_cast<uint8_t>(word);
  }
  // e4m3 to bf16: the seven bits below the sign move by four and the exponent's bias grows by 120, apart from the seven
  // subnormal numbers, m * 2^-9, which are looked up.
  static inline __m512i hold(const uint8_t* from) {
    const __m512i small =
        _mm512_zextsi128_si512(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i magnitude = _mm512_set1_epi16(0x7f0), bias = _mm512_set1_epi16(120 << 7);
    const __m512i normal = _mm512_set1_epi16(0x80), sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(words, 4), magnitude);
    const __mmask32 subnormal = _mm512_cmplt_epu16_mask(moved, normal);
    __m512i out = _mm512_add_epi16(moved, bias);
    out = _mm512_mask_permutexvar_epi16(out, subnormal, words, small);
    return _mm512_ternarylogic_epi32(out, _mm512_slli_epi16(words, 8), sign, 0xf8);  // a | (b & c)
  }
  template <int>
  static inline __m512i line(__m512i held) { return held; }
};

// Tiles that a row of x fills.
template <class F>
inline constexpr int DIGITS = 1;
template <>
inline constexpr int DIGITS<Int8> = 3;

}  // namespace trtkit::tiles
#endif
