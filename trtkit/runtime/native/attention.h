// What the kernels of attention share: the work of one row and KV head, a thread's memory, and the softmax that goes along.
#pragma once

#include <cmath>
#include <vector>

#include "lines.h"
#include "vectors.h"

namespace {

constexpr int64_t SPAN = 256;   // slots between two updates of the running maximum
constexpr int64_t WHOLE = 32;   // weights are written for a multiple of so many slots

struct Shape {
  int64_t nodes, group, dim, block, blocks_per_row;
};

// a0 b0 a1 b1 ...: the first halves of two rows merged, and the second ones.
#ifdef __AVX512F__
inline vec merge_first(vec a, vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline vec merge_second(vec a, vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#else
inline vec merge_first(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline vec merge_second(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#endif

// W rows of D numbers as D rows of W floats.
template <typename E>
inline void transpose(const E* keys, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += W) {
    vec rows[W], next[W];
    for (int i = 0; i < W; i++) rows[i] = load(keys + i * dim + d);
    // log2(W) rounds of merging row i with row i + W / 2; after them row i holds column i.
    for (int64_t round = 1; round < W; round *= 2) {
      for (int i = 0; i < W / 2; i++) {
        next[2 * i] = merge_first(rows[i], rows[i + W / 2]);
        next[2 * i + 1] = merge_second(rows[i], rows[i + W / 2]);
      }
      for (int i = 0; i < W; i++) rows[i] = next[i];
    }
    for (int i = 0; i < W; i++) store(out + (d + i) * W, rows[i]);
  }
}

#ifdef TRTKIT_BF16_DOTS
// ``count`` numbers, a multiple of 32.
inline void round_to(bf16* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    _mm512_storeu_si512(to + i, reinterpret_cast<const __m512i&>(both));
  }
}

// Values are multiplied in pairs of slots, 32 numbers at a time: unpacklo and unpackhi of two rows hold every other four of
// them. result (32) += sums over such pairs, the numbers put back in order.
inline void add_merged(__m512 low, __m512 high, float* result) {
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  store(result, load(result) + (vec)_mm512_permutex2var_ps(low, left, high));
  store(result + W, load(result + W) + (vec)_mm512_permutex2var_ps(low, right, high));
}
#endif

template <typename E>
struct Work {
  const E *keys, *values;     // one KV head: blocks x block x D
  const int64_t* table;       // the row's blocks
  const bool* hidden;         // N x S of the row
  int64_t slots, length;      // width of ``hidden``; slots that some node sees
  const E* at(const E* plane, int64_t slot, const Shape& shape) const {
    return plane + (table[slot / shape.block] * shape.block + slot % shape.block) * shape.dim;
  }
};

// Numbers that begin at a line. Zeros at first.
template <typename T>
class Numbers {
 public:
  void resize(int64_t count) { lines_.resize((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)); }
  operator T*() { return reinterpret_cast<T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  std::vector<Line> lines_;
};

// The memory of one thread; what a kernel does not ask for stays empty.
struct Room {
  Numbers<float> result;            // (Q, D)
  Numbers<float> lines, top, mass;  // (Q, SPAN): scores, then weights; (Q): the best score so far, the sum of weights
  Numbers<float> scratch;
  Numbers<bf16> queries, values;
  Numbers<bf16> weights;  // (Q, SPAN), rounded
  // ``padded``: a number of queries, of which the kernel uses the first.
  void resize(int64_t padded, int64_t dim) {
    result.resize(padded * dim), lines.resize(padded * SPAN), top.resize(padded), mass.resize(padded);
  }
};

// Scores of ``count`` slots (``whole`` with the padding, which is written too) -> weights next to the best score so far,
// ``top``, and their sum, ``mass``. Returns what earlier sums must be multiplied with. ``dark`` is true from ``count`` to
// the next multiple of W.
inline float weigh(float* line, const bool* dark, int64_t count, int64_t whole, float* top, float* mass) {
  typedef uint8_t marks __attribute__((vector_size(W), aligned(1), may_alias));
  vec peak = all(*top);
  int64_t s = 0;
  for (; s < count; s += W) {
    // In two steps: GCC widens bytes to words of 32 bits one by one.
    const hvec hidden = __builtin_convertvector(*reinterpret_cast<const marks*>(dark + s), hvec);
    const vec score = __builtin_convertvector(hidden, ivec) ? all(LOWEST) : load(line + s);
    store(line + s, score);
    peak = larger(score, peak);
  }
  for (; s < whole; s += W) store(line + s, all(LOWEST));
  const float best = largest(peak);
  if (best == LOWEST) {  // nothing seen yet
    std::fill(line, line + whole, 0.0f);
    return 1.0f;
  }
  const float keep = *top == LOWEST ? 0.0f : std::exp(*top - best);
  vec added{};
  for (s = 0; s < whole; s += W) {
    const vec weight = exp_below_zero(load(line + s) - best);
    store(line + s, weight);
    added += weight;
  }
  *top = best;
  *mass = *mass * keep + sum(added);
  return keep;
}

// room.result (Q, D): softmax(scores) x values, a span of slots at a time. ``score`` (start, end) writes the scaled scores
// of these slots to ``room.lines``; ``blend`` (start, end) adds their values, by the weights that stand there then, and in
// ``room.weights`` if the kernel has asked for these.
template <typename E>
inline void attend_spans(const Work<E>& work, const Shape& shape, Room& room, const auto& score, const auto& blend) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  float *result = room.result, *top = room.top, *mass = room.mass;
  std::fill(result, result + count * dim, 0.0f);
  std::fill(top, top + count, LOWEST);
  std::fill(mass, mass + count, 0.0f);
  for (int64_t start = 0; start < work.length; start += SPAN) {
    const int64_t end = std::min(start + SPAN, work.length), whole = (end - start + WHOLE - 1) / WHOLE * WHOLE;
    score(start, end);
    for (int64_t q = 0; q < count; q++) {
      float *line = room.lines + q * SPAN, *sums = result + q * dim;
      const bool* dark = work.hidden + (q % shape.nodes) * work.slots + start;
      const float keep = weigh(line, dark, end - start, whole, top + q, mass + q);
      for (int64_t d = 0; keep != 1.0f && d < dim; d += W) store(sums + d, load(sums + d) * keep);
#ifdef TRTKIT_BF16_DOTS
      if (bf16* rounded = room.weights) round_to(rounded + q * SPAN, line, whole);
#endif
    }
    blend(start, end);
  }
  for (int64_t q = 0; q < count; q++) {
    const vec share = all(1.0f / mass[q]);
    float* sums = result + q * dim;
    for (int64_t d = 0; d < dim; d += W) store(sums + d, load(sums + d) * share);
  }
}

}  // namespace
