// x (T, K) as tiles: 16 rows of 64 bytes, a tile for each step of K (three for the digits of one).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "activations.h"
#include "tile_formats.h"

namespace trtkit::tiles {

// What is done to x before it is laid, and where it goes.
struct Input {
  const c10::BFloat16* x;
  int64_t rows, width, steps;
  const float* pre;
  Rounding rounding;
  float inverse;
  uint8_t* tiles;
  // Of each row: with digits what they are multiplied by; with an offset its sums over the groups, times that, a line of
  // ``line`` rows for each group of ``group`` steps.
  float* own;
  int64_t group, line;
};

// A row's numbers as ``q`` * scale with whole ``q`` below 2^22, in three signed digits of base 256. scale is a power of
// two: bf16 numbers down to 2^-14 of the row's largest are exact, the others are off by at most 2^-22 of it.
inline float split(const float* line, int64_t steps, uint8_t* to, int64_t step, int64_t digit) {
  // Not negative, so that the bits are in the order of the numbers; infinities and what is no number come last.
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < steps * 64; k += 16)
    most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(line + k))));
  const int bits = _mm512_reduce_max_epi32(most);
  if (bits >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  float largest;
  std::memcpy(&largest, &bits, 4);
  int exponent;
  std::frexp(std::max(largest, 1e-30f), &exponent);
  const __m512 inverse = _mm512_set1_ps(std::ldexp(1.0f, 22 - exponent));
  for (int64_t s = 0; s < steps; s++, to += step)
    for (int64_t i = 0; i < 4; i++) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(line + s * 64 + i * 16), inverse));
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
      const __m512i rest = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
      const __m512i middle = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
      const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(rest, middle), 8);
      const auto put = [&](__m512i digits, int64_t place) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + place * digit + i * 16), _mm512_cvtepi32_epi8(digits));
      };
      put(low, 0), put(middle, 1), put(high, 2);
    }
  return std::ldexp(1.0f, exponent - 22);
}

inline void lay_bf16(const float* line, int64_t steps, uint8_t* to) {
  for (int64_t s = 0; s < steps; s++, to += TILE, line += 32) {
    const __m512bh words = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(line + 16), _mm512_loadu_ps(line));
    _mm512_storeu_si512(to, reinterpret_cast<const __m512i&>(words));
  }
}

inline void lay_int8(const float* line, int64_t steps, uint8_t* to) {
  for (int64_t s = 0; s < steps; s++, to += TILE)
    for (int64_t i = 0; i < 64; i += 16, line += 16)
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(line))));
}

// A row of bf16 as it is.
inline void copy_row(const Input& in, int64_t row, uint8_t* to) {
  const uint8_t* line = reinterpret_cast<const uint8_t*>(in.x + row * in.width);
  const int64_t whole = in.width / 32;
  for (int64_t s = 0; s < whole; s++) std::memcpy(to + s * TILE, line + s * 64, 64);
  if (whole < in.steps) {
    std::memset(to + whole * TILE, 0, 64);
    std::memcpy(to + whole * TILE, line + whole * 64, (in.width - whole * 32) * 2);
  }
}

// The numbers of one row in ``steps`` tiles of bf16 added up, in one order.
inline float total(const uint8_t* tiles, int64_t steps) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (int64_t s = 0; s < steps; s++, tiles += TILE) {
    const __m512i words = _mm512_load_si512(tiles);
    even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
    odd = _mm512_add_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// Whether a row's digits share one tile with those of all others.
template <class F>
inline bool one_tile(int64_t rows) { return rows * DIGITS<F> <= SIDE; }

// Rows of x, and zeros up to whole tiles (pairs of tiles, without digits). Digit d of row r lies in row d * rows + r of
// the only tile, or in row r of tile d of its step.
template <class F>
void lay_rows(const Input& in) {
  const bool single = one_tile<F>(in.rows);
  const int64_t all = single ? in.rows : padded(in.rows, DIGITS<F> > 1 ? SIDE : 2 * SIDE), wide = in.steps * F::K;
  const int64_t step = single ? TILE : DIGITS<F> * TILE, digit = single ? in.rows * 64 : TILE;
  at::parallel_for(0, all, std::max<int64_t>(1, 32768 / wide), [&](int64_t from, int64_t end) {
    static thread_local std::vector<float> room;
    room.resize(wide);
    for (int64_t row = from; row < end; row++) {
      uint8_t* to = in.tiles + row / SIDE * in.steps * step + row % SIDE * 64;
      if (row < in.rows && !F::INTEGER && in.pre == nullptr && in.rounding == NONE) {
        copy_row(in, row, to);
      } else {
        std::fill(room.begin(), room.end(), 0.0f);
        if (row < in.rows) take(in.x + row * in.width, in.pre, in.rounding, in.inverse, 1.0f, in.width, room.data());
        if constexpr (DIGITS<F> > 1) {
          const float scale = split(room.data(), in.steps, to, step, digit);
          if (row < in.rows) in.own[row] = scale;
        } else if constexpr (F::INTEGER) {
          lay_int8(room.data(), in.steps, to);
        } else {
          lay_bf16(room.data(), in.steps, to);
        }
      }
      if (F::OFFSET != 0.0f && row < in.rows)
        for (int64_t s = 0, g = 0; s < in.steps; s += in.group, g++)
          in.own[g * in.line + row] = F::OFFSET * total(to + s * TILE, in.group);
    }
  });
}

}  // namespace trtkit::tiles
