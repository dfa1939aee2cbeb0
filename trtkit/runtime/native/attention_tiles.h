// Attention of one row and KV head on matrix units: bf16 products with float32 sums, weights rounded to bf16.
//
// Scores come as (keys, queries), so that keys go from the cache into tiles as they lie there; values are merged in
// pairs of slots on the way. A query's sums do not depend on the others, nor on how many there are.
//
// Letters: D head_dim, Q queries of the KV head (group x nodes).
#pragma once

#include "attention.h"
#include "tile_registers.h"

#ifdef TRTKIT_TILES
namespace {

using trtkit::SIDE;
using trtkit::TILE;
constexpr int64_t KEYS = SIDE;            // of a tile of scores
constexpr int64_t STEP = 32;              // numbers of a bf16 tile's row
static_assert(WHOLE % STEP == 0);
constexpr int64_t SOON = 2;               // tiles of keys, or pairs of values, asked for before they are needed

inline bool tiles_attend(const Shape& shape) {
  return trtkit::tiles_ready() && shape.dim % STEP == 0 && shape.block % KEYS == 0;
}

// Queries (Q, D) as tiles (Q / 16, D / 32) of pairs: row i of a tile holds numbers 2i and 2i + 1 of 16 queries.
inline void lay_queries(const bf16* const* queries, int64_t count, int64_t dim, bf16* to) {
  for (int64_t q = 0; q < count; q++)
    for (int64_t d = 0; d < dim; d += 2)
      std::memcpy(
          to + ((q / SIDE * (dim / STEP) + d / STEP) * SIDE + d % STEP / 2) * STEP + q % SIDE * 2, queries[q] + d, 4);
}

// ``lines`` (Q, SPAN): scale * score of 16 keys from column ``at`` on.
inline void score_keys(
    const bf16* keys, Room& room, int64_t count, int64_t dim, float scale, int64_t at) {
  for (int64_t first = 0; first < count; first += SIDE) {
    const bf16* queries = room.queries + first * dim;
    float* scores = room.scratch;
    _tile_zero(5);
    for (int64_t d = 0; d < dim; d += STEP) {
      _tile_loadd(6, keys + d, dim * 2);
      _tile_loadd(7, queries + d * SIDE, 64);
      _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(5, scores, 64);
    trtkit::settle();
    transpose(scores, SIDE, scores + TILE / 4);
    for (int64_t q = first; q < std::min(count, first + SIDE); q++)
      store(room.lines + q * SPAN + at, load(scores + TILE / 4 + (q - first) * SIDE) * scale);
  }
}

// Two rows of D values, or zeros, as row ``pair`` of D / 16 tiles: of 32 numbers the first tile takes every other four.
inline void merge_values(const bf16* first, const bf16* second, int64_t dim, int64_t pair, bf16* to) {
  for (int64_t d = 0; d < dim; d += STEP, to += 2 * SIDE * STEP) {
    const __m512i a = first ? _mm512_loadu_si512(first + d) : _mm512_setzero_si512();
    const __m512i b = second ? _mm512_loadu_si512(second + d) : _mm512_setzero_si512();
    _mm512_store_si512(to + pair * STEP, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + (SIDE + pair) * STEP, _mm512_unpackhi_epi16(a, b));
  }
}

// result (16, D) += the sums of two neighbouring tiles.
inline void add_sums(const float* low, const float* high, int64_t rows, int64_t dim, float* result) {
  for (int64_t r = 0; r < rows; r++, low += SIDE, high += SIDE, result += dim)
    add_merged(_mm512_load_ps(low), _mm512_load_ps(high), result);
}

// room.result (Q, D) += weights (Q, SPAN) x values, of ``steps`` times 32 slots; ``room.values`` (steps, D / 16) tiles.
inline void blend_values(Room& room, int64_t count, int64_t dim, int64_t steps) {
  const int64_t across = dim / SIDE;  // tiles of a step
  for (int64_t first = 0; first < count; first += SIDE) {
    const bf16* weights = room.weights + first * SPAN;
    const int64_t rows = std::min(count - first, SIDE);
    for (int64_t tile = 0; tile < across; tile += 4) {
      const bool four = across - tile >= 4;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; s++) {
        const bf16* values = room.values + (s * across + tile) * SIDE * STEP;
        _tile_loadd(4, weights + s * STEP, SPAN * 2);
        _tile_loadd(7, values, 64);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(6, values + SIDE * STEP, 64);
        _tile_dpbf16ps(1, 4, 6);
        if (!four) continue;
        _tile_loadd(7, values + 2 * SIDE * STEP, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(6, values + 3 * SIDE * STEP, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
      float* sums = room.scratch;
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + TILE / 4, 64);
      _tile_stored(2, sums + 2 * TILE / 4, 64);
      _tile_stored(3, sums + 3 * TILE / 4, 64);
      trtkit::settle();
      float* to = room.result + first * dim + tile * SIDE;
      add_sums(sums, sums + TILE / 4, rows, dim, to);
      if (four) add_sums(sums + 2 * TILE / 4, sums + 3 * TILE / 4, rows, dim, to + STEP);
    }
  }
}

// As ``attend_head``. The tiles' shapes are those of ``Configured({}, 16)``.
inline void attend_head_tiles(
    const Work<bf16>& work, const Shape& shape, const bf16* const* queries, float scale, Room& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  const int64_t padded = (count + SIDE - 1) / SIDE * SIDE;  // to whole tiles: the padding stays zero
  room.resize(padded, dim), room.queries.resize(padded * dim), room.weights.resize(padded * SPAN);
  room.values.resize(SPAN * dim), room.scratch.resize(TILE);
  lay_queries(queries, count, dim, room.queries);
  const auto at = [&](const bf16* plane, int64_t slot) {  // null behind the last slot
    return slot < work.length ? work.at(plane, slot, shape) : nullptr;
  };
  const auto score = [&](int64_t start, int64_t end) {
    for (int64_t slot = start; slot < end; slot += KEYS) {
      if (const bf16* soon = at(work.keys, slot + SOON * KEYS)) trtkit::fetch(soon, KEYS * dim * 2);
      trtkit::settle();
      score_keys(at(work.keys, slot), room, count, dim, scale, slot - start);
    }
  };
  const auto blend = [&](int64_t start, int64_t end) {
    const int64_t steps = (end - start + STEP - 1) / STEP;
    for (int64_t slot = start; slot < start + steps * STEP; slot += KEYS) {
      if (const bf16* soon = at(work.values, slot + SOON * KEYS)) trtkit::fetch(soon, KEYS * dim * 2);
      const bf16* values = at(work.values, slot);
      bf16* to = room.values + (slot - start) / STEP * (dim / SIDE) * SIDE * STEP;
      for (int64_t s = 0; s < KEYS; s += 2) {
        const bf16* first = values ? values + s * dim : nullptr;
        merge_values(first, first ? first + dim : nullptr, dim, (slot - start) % STEP / 2 + s / 2, to);
      }
    }
    trtkit::settle();
    blend_values(room, count, dim, steps);
  };
  attend_spans(work, shape, room, score, blend);
}

}  // namespace
#endif
