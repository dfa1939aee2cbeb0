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
constexpr int64_t SOON = 2;               // tiles of keys, or pairs of values, asked for before they are needed

inline bool tiles_attend(const Shape& shape) {
  return trtkit::tiles_ready() && shape.dim % STEP == 0 && shape.block % KEYS == 0;
}

// The memory of one thread: Q is padded to whole tiles, whose padding stays zero.
struct TileRoom {
  std::vector<uint8_t> memory;
  int64_t count = 0, dim = 0;
  bf16 *queries, *weights, *values;
  float *scores, *lines, *top, *mass;
  void resize(int64_t wanted, int64_t width) {
    if (count == wanted && dim == width) return;
    count = wanted, dim = width;
    const int64_t padded = (count + SIDE - 1) / SIDE * SIDE;
    const int64_t bytes[] = {padded * dim * 2, padded * SPAN * 2, SPAN * dim * 2, 4 * TILE, padded * SPAN * 4,
                             padded * 4, padded * 4};
    int64_t all = 64;
    for (const int64_t part : bytes) all += part;
    memory.assign(all, 0);
    uint8_t* at = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    auto take = [&, next = bytes](auto*& pointer) mutable {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
      at += *next++;
    };
    take(queries), take(weights), take(values), take(scores), take(lines), take(top), take(mass);
  }
};

// Queries (Q, D) as tiles (Q / 16, D / 32) of pairs: row i of a tile holds numbers 2i and 2i + 1 of 16 queries.
inline void lay_queries(const bf16* const* queries, int64_t count, int64_t dim, bf16* to) {
  for (int64_t q = 0; q < count; q++)
    for (int64_t d = 0; d < dim; d += 2)
      std::memcpy(
          to + ((q / SIDE * (dim / STEP) + d / STEP) * SIDE + d % STEP / 2) * STEP + q % SIDE * 2, queries[q] + d, 4);
}

// ``lines`` (Q, SPAN): scale * score of 16 keys from column ``at`` on.
inline void score_keys(
    const bf16* keys, const TileRoom& room, int64_t count, int64_t dim, float scale, int64_t at) {
  for (int64_t first = 0; first < count; first += SIDE) {
    const bf16* queries = room.queries + first * dim;
    _tile_zero(5);
    for (int64_t d = 0; d < dim; d += STEP) {
      _tile_loadd(6, keys + d, dim * 2);
      _tile_loadd(7, queries + d * SIDE, 64);
      _tile_dpbf16ps(5, 6, 7);
    }
    _tile_stored(5, room.scores, 64);
    trtkit::settle();
    transpose(room.scores, SIDE, room.scores + TILE / 4);
    for (int64_t q = first; q < std::min(count, first + SIDE); q++)
      store(room.lines + q * SPAN + at, load(room.scores + TILE / 4 + (q - first) * SIDE) * scale);
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

// result (16, D) += the sums of two neighbouring tiles, their numbers put back in order.
inline void add_sums(const float* low, const float* high, int64_t rows, int64_t dim, float* result) {
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t r = 0; r < rows; r++, low += SIDE, high += SIDE, result += dim) {
    const __m512 a = _mm512_load_ps(low), b = _mm512_load_ps(high);
    store(result, load(result) + (vec)_mm512_permutex2var_ps(a, left, b));
    store(result + SIDE, load(result + SIDE) + (vec)_mm512_permutex2var_ps(a, right, b));
  }
}

// result (Q, D) += weights (Q, SPAN) x values, of ``steps`` times 32 slots; ``room.values`` (steps, D / 16) tiles.
inline void blend_values(const TileRoom& room, int64_t count, int64_t dim, int64_t steps, float* result) {
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
      float* sums = room.scores;
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + TILE / 4, 64);
      _tile_stored(2, sums + 2 * TILE / 4, 64);
      _tile_stored(3, sums + 3 * TILE / 4, 64);
      trtkit::settle();
      float* to = result + first * dim + tile * SIDE;
      add_sums(sums, sums + TILE / 4, rows, dim, to);
      if (four) add_sums(sums + 2 * TILE / 4, sums + 3 * TILE / 4, rows, dim, to + STEP);
    }
  }
}

// As ``attend_head``, from Q pointers to bf16 queries, not scaled. The tiles' shapes are those of ``Configured({}, 16)``.
inline void attend_head_tiles(
    const Work<bf16>& work, const Shape& shape, const bf16* const* queries, float scale, float* result, TileRoom& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  room.resize(count, dim);
  lay_queries(queries, count, dim, room.queries);
  std::fill(result, result + count * dim, 0.0f);
  std::fill(room.top, room.top + count, LOWEST);
  std::fill(room.mass, room.mass + count, 0.0f);
  const auto at = [&](const bf16* plane, int64_t slot) -> const bf16* {  // null behind the last slot
    if (slot >= work.length) return nullptr;
    return plane + (work.table[slot / shape.block] * shape.block + slot % shape.block) * dim;
  };
  for (int64_t start = 0; start < work.length; start += SPAN) {
    const int64_t end = std::min(start + SPAN, work.length), steps = (end - start + STEP - 1) / STEP;
    const int64_t whole = steps * STEP;
    for (int64_t slot = start; slot < end; slot += KEYS) {
      if (const bf16* soon = at(work.keys, slot + SOON * KEYS)) trtkit::fetch(soon, KEYS * dim * 2);
      trtkit::settle();
      score_keys(at(work.keys, slot), room, count, dim, scale, slot - start);
    }
    for (int64_t q = 0; q < count; q++) {
      float* line = room.lines + q * SPAN;
      const bool* dark = work.hidden + (q % shape.nodes) * work.slots + start;
      const float keep = weigh(line, dark, end - start, whole, room.top + q, room.mass + q);
      for (int64_t d = 0; keep != 1.0f && d < dim; d++) result[q * dim + d] *= keep;
      for (int64_t s = 0; s < whole; s += W) store(room.weights + q * SPAN + s, load(line + s));
    }
    for (int64_t slot = start; slot < start + whole; slot += KEYS) {
      if (const bf16* soon = at(work.values, slot + SOON * KEYS)) trtkit::fetch(soon, KEYS * dim * 2);
      const bf16* values = at(work.values, slot);
      bf16* to = room.values + (slot - start) / STEP * (dim / SIDE) * SIDE * STEP;
      for (int64_t s = 0; s < KEYS; s += 2) {
        const bf16* first = values ? values + s * dim : nullptr;
        merge_values(first, first ? first + dim : nullptr, dim, (slot - start) % STEP / 2 + s / 2, to);
      }
    }
    trtkit::settle();
    blend_values(room, count, dim, steps, result);
  }
  for (int64_t q = 0; q < count; q++) {
    const vec share = all(1.0f / room.mass[q]);
    for (int64_t d = 0; d < dim; d += W) store(result + q * dim + d, load(result + q * dim + d) * share);
  }
}

}  // namespace
#endif
