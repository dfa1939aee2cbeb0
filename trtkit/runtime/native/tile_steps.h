// Panels of weights on their way through the tile registers, and the sums that come out.
#pragma once

#include "tile_formats.h"

namespace trtkit::tiles {

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

// The tile of that number of a panel of ``steps``, if there is one, on its way: asked for, and widened to ``place`` in the
// room where it has to be.
template <class F>
inline void take_tile(const Stream& from, int64_t number, int64_t steps, uint8_t* room, int64_t place) {
  fetch(from.ahead(number * F::BYTES), F::BYTES);
  if constexpr (F::WIDENED) {
    if (number < 2 * steps) widen<F>(from.codes + number * F::BYTES, SIDE, room + place * TILE);
    settle();
  }
}

// A step as its sums see it. At the start of another group each sum leaves for ``part`` as late as it can: until then
// its last multiplication and those of the other sums are under way.
enum Turn { FIRST, ANOTHER_GROUP, GOES_ON };

#define TRTKIT_MULTIPLY(sum, a, b) \
  if (turn == ANOTHER_GROUP) _tile_stored(sum, part + sum * TILE, 64); \
  if (turn != GOES_ON) _tile_zero(sum); \
  if constexpr (INTEGER) _tile_dpbssd(sum, a, b); \
  else _tile_dpbf16ps(sum, a, b)

// The three shapes of a multiplication. NARROW: sums 0 to 3 are one tile row of x times two panels. SQUARE: two tile
// rows of x times one panel. TALL: three digits of a tile row times half a panel, sums 0 to 2. No tile is loaded while the
// multiplication before it may still read it: they are not renamed. ``between(i)`` is called before the i-th tile of
// weights is loaded: what it does runs beside the multiplications.

template <bool INTEGER>
inline void narrow_step(
    Turn turn, uint8_t* part, const uint8_t* x, const uint8_t* first, const uint8_t* second, const auto& between) {
  _tile_loadd(4, x, 64);
  between(0);
  _tile_loadd(5, first, 64);
  TRTKIT_MULTIPLY(0, 4, 5);
  between(1);
  _tile_loadd(6, first + TILE, 64);
  TRTKIT_MULTIPLY(1, 4, 6);
  between(2);
  _tile_loadd(7, second, 64);
  TRTKIT_MULTIPLY(2, 4, 7);
  between(3);
  _tile_loadd(5, second + TILE, 64);
  TRTKIT_MULTIPLY(3, 4, 5);
}

template <bool INTEGER>
inline void square_step(
    Turn turn, uint8_t* part, const uint8_t* x, int64_t apart, const uint8_t* panel, const auto& between) {
  _tile_loadd(4, x, 64);
  between(0);
  _tile_loadd(6, panel, 64);
  TRTKIT_MULTIPLY(0, 4, 6);
  _tile_loadd(5, x + apart, 64);
  TRTKIT_MULTIPLY(2, 5, 6);
  between(1);
  _tile_loadd(7, panel + TILE, 64);
  TRTKIT_MULTIPLY(1, 4, 7);
  TRTKIT_MULTIPLY(3, 5, 7);
}

#undef TRTKIT_MULTIPLY

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

inline void store_sums(uint8_t* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + TILE, 64);
  _tile_stored(2, to + 2 * TILE, 64);
  _tile_stored(3, to + 3 * TILE, 64);
}

// The sum of a row and 16 outputs; its digits' sums lie ``digit`` bytes apart.
template <class F>
inline __m512 sum_at(const uint8_t* at, int64_t digit) {
  if constexpr (DIGITS<F> > 1) {
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

// totals (rows, PANEL) += scale * the sums at ``part``, a tile for each half of the panel; ``own`` as in ``Input``.
template <class F>
inline void add_scaled(
    float* totals, int64_t stride, const uint8_t* part, int64_t digit, const float* scale, const float* own,
    int64_t rows) {
  const __m512 left = _mm512_loadu_ps(scale), right = _mm512_loadu_ps(scale + SIDE);
  for (int64_t r = 0; r < rows; r++, totals += stride) {
    __m512 a = sum_at<F>(part + r * 64, digit), b = sum_at<F>(part + TILE + r * 64, digit);
    if constexpr (DIGITS<F> > 1) {
      const __m512 step = _mm512_set1_ps(own[r]);
      a = _mm512_mul_ps(a, step), b = _mm512_mul_ps(b, step);
    } else if constexpr (F::OFFSET != 0.0f) {
      const __m512 off = _mm512_set1_ps(own[r]);
      a = _mm512_sub_ps(a, off), b = _mm512_sub_ps(b, off);
    }
    _mm512_store_ps(totals, _mm512_fmadd_ps(a, left, _mm512_load_ps(totals)));
    _mm512_store_ps(totals + SIDE, _mm512_fmadd_ps(b, right, _mm512_load_ps(totals + SIDE)));
  }
}

}  // namespace trtkit::tiles
