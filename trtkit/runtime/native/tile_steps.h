// Panels of weights on their way through the tile registers, and the sums that come out.
#pragma once

#include "tile_formats.h"

namespace trtkit {

constexpr int64_t AHEAD = 4096;  // bytes of a panel's weights asked for before they are needed

// A panel's weights as they are read; ``next``: the panel read after it.
struct Stream {
  const uint8_t *codes, *next;
  int64_t bytes;  // of a panel
  inline const uint8_t* ahead(int64_t at) const {
    at += AHEAD;
    return at < bytes ? codes + at : next + (at - bytes);
  }
};

template <class F>
inline void widen(const Stream& from, int64_t first, int64_t steps, uint8_t* room) {
  int64_t at = first * 2 * F::BYTES;
  for (int64_t tile = 0; tile < 2 * steps; tile++, at += F::BYTES, room += TILE) {
    fetch(from.ahead(at), F::BYTES);
    F::widen(from.codes + at, room);
  }
}

#define TRTKIT_MULTIPLY(sum, a, b) \
  if constexpr (INTEGER) _tile_dpbssd(sum, a, b); \
  else _tile_dpbf16ps(sum, a, b)

// The three shapes of a multiplication. NARROW: sums 0 to 3 are one tile row of x times two panels. SQUARE: two tile
// rows of x times one panel. TALL: three digits of a tile row times half a panel, sums 0 to 2. No tile is loaded while the
// multiplication before it may still read it: they are not renamed.

template <bool INTEGER>
inline void narrow_steps(
    const uint8_t* x, const uint8_t* first, const uint8_t* second, int64_t steps, const auto& soon) {
  for (int64_t s = 0; s < steps; s++, x += TILE, first += 2 * TILE, second += 2 * TILE) {
    soon(s);
    _tile_loadd(4, x, 64);
    _tile_loadd(5, first, 64);
    TRTKIT_MULTIPLY(0, 4, 5);
    _tile_loadd(6, first + TILE, 64);
    TRTKIT_MULTIPLY(1, 4, 6);
    _tile_loadd(7, second, 64);
    TRTKIT_MULTIPLY(2, 4, 7);
    _tile_loadd(5, second + TILE, 64);
    TRTKIT_MULTIPLY(3, 4, 5);
  }
}

template <bool INTEGER>
inline void square_steps(const uint8_t* x, int64_t apart, const uint8_t* panel, int64_t steps, const auto& soon) {
  for (int64_t s = 0; s < steps; s++, x += TILE, panel += 2 * TILE) {
    soon(s);
    _tile_loadd(4, x, 64);
    _tile_loadd(6, panel, 64);
    TRTKIT_MULTIPLY(0, 4, 6);
    _tile_loadd(7, panel + TILE, 64);
    TRTKIT_MULTIPLY(1, 4, 7);
    _tile_loadd(5, x + apart, 64);
    TRTKIT_MULTIPLY(2, 5, 6);
    TRTKIT_MULTIPLY(3, 5, 7);
  }
}

inline void tall_steps(const uint8_t* x, const uint8_t* side, int64_t steps, const auto& soon) {
  const auto step = [&]<int WEIGHTS>(int64_t s) __attribute__((always_inline)) {
    soon(s);
    if constexpr (WEIGHTS == 6) _tile_loadd(6, side + s * 2 * TILE, 64);
    else _tile_loadd(7, side + s * 2 * TILE, 64);
    _tile_loadd(3, x + s * 3 * TILE, 64);
    if constexpr (WEIGHTS == 6) _tile_dpbssd(0, 3, 6);
    else _tile_dpbssd(0, 3, 7);
    _tile_loadd(4, x + s * 3 * TILE + TILE, 64);
    if constexpr (WEIGHTS == 6) _tile_dpbssd(1, 4, 6);
    else _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x + s * 3 * TILE + 2 * TILE, 64);
    if constexpr (WEIGHTS == 6) _tile_dpbssd(2, 5, 6);
    else _tile_dpbssd(2, 5, 7);
  };
  int64_t s = 0;
  for (; s + 1 < steps; s += 2) {
    step.template operator()<6>(s);
    step.template operator()<7>(s + 1);
  }
  if (s < steps) step.template operator()<6>(s);
}

inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
inline void store_sums(uint8_t* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + TILE, 64);
  _tile_stored(2, to + 2 * TILE, 64);
  _tile_stored(3, to + 3 * TILE, 64);
}

// The sum of a row and 16 outputs; its digits' sums lie ``digit`` bytes apart.
template <class F>
inline __m512 sum_at(const uint8_t* at, int64_t digit) {
  if constexpr (F::DIGITS > 1) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(at));
    const __m512 middle = _mm512_cvtepi32_ps(_mm512_load_si512(at + digit));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(at + 2 * digit));
    const __m512 base = _mm512_set1_ps(256.0f);
    return _mm512_fmadd_ps(_mm512_fmadd_ps(high, base, middle), base, low);
  } else if constexpr (F::INTEGER) {
    return _mm512_cvtepi32_ps(_mm512_load_si512(at));
  } else {
    return _mm512_load_ps(at);
  }
}

// totals (rows, PANEL) += scale * the sums at ``part``, a tile for each half of the panel.
template <class F>
inline void add_scaled(
    float* totals, int64_t stride, const uint8_t* part, int64_t digit, const float* scale, const float* x_scale,
    int64_t rows) {
  const __m512 left = _mm512_loadu_ps(scale), right = _mm512_loadu_ps(scale + SIDE);
  for (int64_t r = 0; r < rows; r++, totals += stride) {
    __m512 a = sum_at<F>(part + r * 64, digit), b = sum_at<F>(part + TILE + r * 64, digit);
    if constexpr (F::DIGITS > 1) {
      const __m512 own = _mm512_set1_ps(x_scale[r]);
      a = _mm512_mul_ps(a, own), b = _mm512_mul_ps(b, own);
    }
    _mm512_store_ps(totals, _mm512_fmadd_ps(a, left, _mm512_load_ps(totals)));
    _mm512_store_ps(totals + SIDE, _mm512_fmadd_ps(b, right, _mm512_load_ps(totals + SIDE)));
  }
}

#undef TRTKIT_MULTIPLY

}  // namespace trtkit
