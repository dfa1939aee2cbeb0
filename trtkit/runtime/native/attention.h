// What the two kernels of attention share: the work of one row and KV head, and the softmax that goes along.
#pragma once

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t SPAN = 256;  // slots between two updates of the running maximum

// exp for x <= 0: 2^n times a polynomial on [-ln2/2, ln2/2] (the Cephes coefficients), within 2 units in the last place;
// 0 below -87.
inline vec exp_below_zero(vec x) {
  const auto dead = x < all(-87.0f);
  x = dead ? all(0.0f) : x;
  const ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);  // truncation towards 0: x <= 0 rounds to nearest
  const vec f = __builtin_convertvector(n, vec);
  const vec r = (x - f * 0.693359375f) - f * -2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return dead ? all(0.0f) : p * (vec)((n + 127) << 23);
}

struct Shape {
  int64_t nodes, group, kv_heads, dim, block, blocks_per_row, token_stride;
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

template <typename E>
struct Work {
  const E *keys, *values;     // one KV head: blocks x block x D
  const int64_t* table;       // the row's blocks
  const bool* hidden;         // N x S of the row
  int64_t slots, length;      // width of ``hidden``; slots that some node sees
};

// Scores of ``count`` slots (``whole`` with the padding, which is written too) -> weights next to the best score so far,
// ``top``, and their sum, ``mass``. Returns what earlier sums must be multiplied with.
inline float weigh(float* line, const bool* dark, int64_t count, int64_t whole, float* top, float* mass) {
  for (int64_t s = 0; s < count; s++) line[s] = dark[s] ? LOWEST : line[s];
  for (int64_t s = count; s < whole; s++) line[s] = LOWEST;
  vec peak = all(*top);
  for (int64_t s = 0; s < whole; s += W) peak = larger(load(line + s), peak);
  const float best = largest(peak);
  if (best == LOWEST) {  // nothing seen yet
    std::fill(line, line + whole, 0.0f);
    return 1.0f;
  }
  const float keep = *top == LOWEST ? 0.0f : std::exp(*top - best);
  vec added{};
  for (int64_t s = 0; s < whole; s += W) {
    const vec weight = exp_below_zero(load(line + s) - best);
    store(line + s, weight);
    added += weight;
  }
  *top = best;
  *mass = *mass * keep + sum(added);
  return keep;
}

}  // namespace
