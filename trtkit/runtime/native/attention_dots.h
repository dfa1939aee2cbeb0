// Attention of one row and KV head on vectors that multiply pairs of bf16: float32 sums, weights rounded to bf16.
//
// A vector of scores holds 16 keys, whose pairs of numbers are turned on the way from the cache; a vector of results holds
// 16 numbers, whose values are merged in pairs of slots. One pair of the other factor meets all lanes: it comes from memory.
// Turning and merging cost next to nothing beside the products, so that a pass over few queries repeats them. Each score,
// and each result of a span, is one chain of additions in order: a query's sums do not depend on the others, nor on how
// many there are.
//
// Letters: D head_dim, Q queries of the KV head (group x nodes), P of them in one pass.
#pragma once

#include "attention.h"

#ifdef TRTKIT_BF16_DOTS
namespace {

constexpr int64_t LANES = 16;  // keys of a vector of scores
constexpr int64_t PASS = 12;   // queries of one pass at most: two sums for each stay in registers

inline bool dots_attend(const Shape& shape) { return shape.dim % 32 == 0 && shape.block % LANES == 0; }

inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(a), reinterpret_cast<const __m512bh&>(b));
}

// The same for one pair in memory. GCC would load it first: with twice the instructions, fewer products fit into the window
// in which the CPU looks for work.
inline __m512 add_products(__m512 sum, __m512i a, const bf16* pair) {
  struct Pair {
    bf16 numbers[2];
  };
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const Pair*>(pair)));
  return sum;
}

inline __m512i all_pairs(const bf16* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, 4);
  return _mm512_set1_epi32(bits);
}

// Eight numbers of 16 keys that lie ``apart`` bytes from each other -> for each pair of them that of all keys.
[[gnu::always_inline]] inline void turn(const uint8_t* keys, int64_t apart, __m512i* pairs) {
  __m512i four[4];  // the eight numbers of keys i, 4 + i, 8 + i, 12 + i
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, keys += apart) {
    const auto part = [&](int64_t at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + at)); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(4 * apart), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(8 * apart)), part(12 * apart), 1);
    four[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  const __m512i a = _mm512_unpacklo_epi32(four[0], four[1]), b = _mm512_unpacklo_epi32(four[2], four[3]);
  const __m512i c = _mm512_unpackhi_epi32(four[0], four[1]), d = _mm512_unpackhi_epi32(four[2], four[3]);
  pairs[0] = _mm512_unpacklo_epi64(a, b), pairs[1] = _mm512_unpackhi_epi64(a, b);
  pairs[2] = _mm512_unpacklo_epi64(c, d), pairs[3] = _mm512_unpackhi_epi64(c, d);
}

// ``lines`` (P, SPAN): scale * score of 16 keys. queries (D / 2, P) pairs. As many bytes from ``soon`` on are asked for.
template <int P>
inline void score_pass(
    const bf16* queries, const bf16* keys, const bf16* soon, int64_t dim, float scale, float* lines) {
  __m512 sums[P];
#pragma GCC unroll 12
  for (int p = 0; p < P; p++) sums[p] = _mm512_setzero_ps();
  const uint8_t* from = reinterpret_cast<const uint8_t*>(keys);
#pragma GCC unroll 1
  for (const uint8_t* end = from + dim * 2; from < end; from += 16) {
    __m512i pairs[4];
    turn(from, dim * 2, pairs);
    for (int i = 0; i < 4; i++, soon += 32) _mm_prefetch(soon, _MM_HINT_T1);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, queries += 2 * P)
#pragma GCC unroll 12
      for (int p = 0; p < P; p++) sums[p] = add_products(sums[p], pairs[i], queries + 2 * p);
  }
  const __m512 scales = _mm512_set1_ps(scale);
#pragma GCC unroll 12
  for (int p = 0; p < P; p++) _mm512_store_ps(lines + p * SPAN, _mm512_mul_ps(sums[p], scales));
}

// result (P, D) += weights (P, SPAN) x values of some times 16 slots, where the same numbers of ``soon`` are asked for.
template <int P>
inline void blend_pass(
    const bf16* weights, const bf16* const* values, const bf16* const* soon, int64_t times, int64_t dim, float* result) {
  for (int64_t d = 0; d < dim; d += 32) {
    __m512 sums[P][2];
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) sums[p][0] = sums[p][1] = _mm512_setzero_ps();
    for (int64_t t = 0; t < times; t++) {
      for (int64_t s = 0; s < LANES; s += 2) {
        const bf16 *first = values[t] + s * dim + d, *ahead = soon[t] + s * dim + d;
        _mm_prefetch(ahead, _MM_HINT_T1);
        _mm_prefetch(ahead + dim, _MM_HINT_T1);
        const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(first + dim);
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 12
        for (int p = 0; p < P; p++) {
          const __m512i weight = all_pairs(weights + p * SPAN + t * LANES + s);
          sums[p][0] = add_products(sums[p][0], low, weight);
          sums[p][1] = add_products(sums[p][1], high, weight);
        }
      }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; p++) add_merged(sums[p][0], sums[p][1], result + p * dim + d);
  }
}

// ``call`` (first query, how many as a constant) for all passes over ``count`` queries.
inline void for_passes(int64_t count, const auto& call) {
  const int64_t passes = (count + PASS - 1) / PASS;
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t first = count * pass / passes, size = count * (pass + 1) / passes - first;
    [&]<int... I>(std::integer_sequence<int, I...>) {
      ((size == I + 1 ? call(first, std::integral_constant<int, I + 1>()) : void()), ...);
    }(std::make_integer_sequence<int, PASS>());
  }
}

// As ``attend_head``. ``after``: the work that comes next, whose first keys are asked for.
inline void attend_head_dots(
    const Work<bf16>& work, const Work<bf16>& after, const Shape& shape, const bf16* const* queries, float scale,
    Room& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  room.resize(count, dim), room.queries.resize(count * dim), room.weights.resize(count * SPAN);
  for_passes(count, [&](int64_t first, auto size) {
    bf16* to = room.queries + first * dim;
    for (int64_t d = 0; d < dim; d += 2)
      for (int64_t p = 0; p < size; p++, to += 2) std::memcpy(to, queries[first + p] + d, 4);
  });
  const bf16 *values[SPAN / LANES], *soon[SPAN / LANES];
  const auto score = [&](int64_t start, int64_t end) {
    for (int64_t slot = start, t = 0; slot < end; slot += LANES, t++) {
      const bf16* keys = work.at(work.keys, slot, shape);
      const int64_t next = slot + 2 * LANES, later = slot + SPAN, behind = slot - start;
      // The keys of later spans were asked for while the span before was blended.
      if (start == 0 && next < end) trtkit::fetch(work.at(work.keys, next, shape), LANES * dim * 2);
      values[t] = work.at(work.values, slot, shape);
      soon[t] = later < work.length ? work.at(work.keys, later, shape)
                : end == work.length && behind < after.length ? after.at(after.keys, behind, shape) : keys;
      for_passes(count, [&](int64_t first, auto size) {
        score_pass<size>(room.queries + first * dim, keys, values[t], dim, scale, room.lines + first * SPAN + behind);
      });
    }
  };
  const auto blend = [&](int64_t start, int64_t end) {
    const int64_t times = (end - start + LANES - 1) / LANES;
    for_passes(count, [&](int64_t first, auto size) {
      blend_pass<size>(room.weights + first * SPAN, values, soon, times, dim, room.result + first * dim);
    });
  };
  attend_spans(work, shape, room, score, blend);
}

}  // namespace
#endif
