// A matrix unit (AMX) in software, for tests on CPUs without one: included by tile_registers.h in place of the real one.
//
// Sums as the instructions define them (Intel's architecture instruction set extensions reference, TDPBF16PS and
// TDPBSSD), and stricter where the real unit gives no sign: registers hold NaN patterns until they are loaded, and an
// operand of the wrong shape ends the operator with an error.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace trtkit {

namespace unit {

struct Register {
  int64_t rows = 0, bytes = 0;
  alignas(64) uint8_t line[16][64];
};
inline thread_local Register registers[8];
inline thread_local bool configured = false;

inline Register& at(int number) {
  TORCH_CHECK(configured, "tile ", number, " is used before the tiles have shapes");
  return registers[number];
}

inline void load(int number, const void* base, int64_t stride) {
  Register& tile = at(number);
  std::memset(tile.line, 0, sizeof tile.line);
  for (int64_t r = 0; r < tile.rows; r++)
    std::memcpy(tile.line[r], static_cast<const uint8_t*>(base) + r * stride, tile.bytes);
}

inline void store(int number, void* base, int64_t stride) {
  const Register& tile = at(number);
  for (int64_t r = 0; r < tile.rows; r++)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, tile.line[r], tile.bytes);
}

inline void zero(int number) { std::memset(at(number).line, 0, sizeof registers[number].line); }

inline void check(const Register& sum, const Register& a, const Register& b) {
  TORCH_CHECK(
      sum.rows == a.rows && sum.bytes == b.bytes && a.bytes == 4 * b.rows, "tiles of shapes that cannot be multiplied: ",
      sum.rows, " x ", sum.bytes, " from ", a.rows, " x ", a.bytes, " and ", b.rows, " x ", b.bytes);
}

// Pairs of bf16. The first numbers of all pairs are summed, and the second ones, then both join the register; denormal
// numbers count as zero, before and after.
inline void multiply_bf16(int number, int first, int second) {
  Register& sum = at(number);
  const Register &a = at(first), &b = at(second);
  check(sum, a, b);
  const unsigned modes = _mm_getcsr();
  _mm_setcsr(modes | 0x8040);  // FTZ, DAZ
  for (int64_t m = 0; m < sum.rows; m++) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t k = 0; k < b.rows; k++) {
      uint32_t pair;
      std::memcpy(&pair, a.line[m] + 4 * k, 4);
      const __m512i words = _mm512_load_si512(b.line[k]), high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
      const auto number_of = [](uint32_t bits) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits))); };
      even = _mm512_fmadd_ps(number_of(pair << 16), _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), even);
      odd = _mm512_fmadd_ps(number_of(pair & 0xffff0000), _mm512_castsi512_ps(_mm512_and_si512(words, high)), odd);
    }
    const __m512 before = _mm512_load_ps(sum.line[m]);
    _mm512_store_ps(sum.line[m], _mm512_add_ps(before, _mm512_add_ps(even, odd)));
  }
  _mm_setcsr(modes);
}

// Fours of signed bytes, in whole numbers.
inline void multiply_int8(int number, int first, int second) {
  Register& sum = at(number);
  const Register &a = at(first), &b = at(second);
  check(sum, a, b);
  for (int64_t m = 0; m < sum.rows; m++) {
    int32_t line[16];
    std::memcpy(line, sum.line[m], sizeof line);
    for (int64_t k = 0; k < b.rows; k++)
      for (int64_t n = 0; n < 16; n++)
        for (int64_t i = 0; i < 4; i++)
          line[n] += static_cast<int8_t>(a.line[m][4 * k + i]) * static_cast<int8_t>(b.line[k][4 * n + i]);
    std::memcpy(sum.line[m], line, sizeof line);
  }
}

}  // namespace unit

inline bool tiles_ready() { return true; }

inline void configure(const TileShapes& shapes) {
  for (int i = 0; i < 8; i++) {
    unit::registers[i].rows = shapes.rows[i], unit::registers[i].bytes = shapes.bytes[i];
    std::memset(unit::registers[i].line, 0xff, sizeof unit::registers[i].line);
  }
  unit::configured = true;
}

inline void release() { unit::configured = false; }

}  // namespace trtkit

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadd trtkit::unit::load
#define _tile_stored trtkit::unit::store
#define _tile_zero trtkit::unit::zero
#define _tile_dpbf16ps trtkit::unit::multiply_bf16
#define _tile_dpbssd trtkit::unit::multiply_int8
