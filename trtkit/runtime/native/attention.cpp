// Attention over the block table, without a copy of the cache.
#include "vectors.h"

#include <cmath>
#include <vector>

namespace {

constexpr int64_t TILE = 256;              // slots between two updates of the running maximum
constexpr int64_t MOST = W == 16 ? 8 : 6;  // queries whose sums fit into the registers

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

// W keys of one block as D rows of W floats: a query then needs one multiply-add for each of its numbers.
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

// Scores of P queries against W keys. Each query has two sums, whatever P is: a single chain of additions would wait for
// itself, and its order must not depend on the company.
template <int P>
inline void score_part(const float* queries, const float* turned, int64_t dim, float* out, int64_t stride) {
  vec even[P] = {}, odd[P] = {};
  for (int64_t d = 0; d < dim; d += 2) {
    const vec first = load(turned + d * W), second = load(turned + (d + 1) * W);
    for (int p = 0; p < P; p++) {
      even[p] += first * queries[p * dim + d];
      odd[p] += second * queries[p * dim + d + 1];
    }
  }
  for (int p = 0; p < P; p++) store(out + p * stride, even[p] + odd[p]);
}

inline void score(const float* queries, const float* turned, int64_t count, int64_t dim, float* out, int64_t stride) {
  for (int64_t q = 0; q < count; q += MOST) {
    const float* from = queries + q * dim;
    float* to = out + q * stride;
    switch (std::min(count - q, MOST)) {
      case 1: score_part<1>(from, turned, dim, to, stride); break;
      case 2: score_part<2>(from, turned, dim, to, stride); break;
      case 3: score_part<3>(from, turned, dim, to, stride); break;
      case 4: score_part<4>(from, turned, dim, to, stride); break;
      case 5: score_part<5>(from, turned, dim, to, stride); break;
      case 6: score_part<6>(from, turned, dim, to, stride); break;
      case 7: score_part<7>(from, turned, dim, to, stride); break;
      default: score_part<8>(from, turned, dim, to, stride);
    }
  }
}

// result (D) += the sum over W keys of weight x value
template <int P>
inline void blend_part(const float* weights, const float* values, int64_t dim, float* result) {
  vec part[P];
  for (int p = 0; p < P; p++) part[p] = load(result + p * W);
  for (int s = 0; s < W; s++) {
    for (int p = 0; p < P; p++) part[p] += load(values + s * dim + p * W) * weights[s];
  }
  for (int p = 0; p < P; p++) store(result + p * W, part[p]);
}

inline void blend(const float* weights, const float* values, int64_t dim, float* result) {
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) blend_part<4>(weights, values + d, dim, result + d);
  for (; d < dim; d += W) blend_part<1>(weights, values + d, dim, result + d);
}

template <typename E>
struct Work {
  const E *keys, *values;     // one KV head: blocks x block x D
  const int64_t* table;       // the row's blocks
  const bool* hidden;         // N x S of the row
  int64_t slots, length;      // width of ``hidden``; slots that some node sees
};

// Queries (group, nodes, D), scaled, of one row and KV head -> result of the same shape.
template <typename E>
void attend_head(const Work<E>& work, const Shape& shape, const float* queries, float* result, std::vector<float>& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  room.resize(count * (TILE + 2) + dim * W);
  float *scores = room.data(), *top = scores + count * TILE, *mass = top + count, *turned = mass + count;  // later: the values
  std::fill(result, result + count * dim, 0.0f);
  std::fill(top, top + count, LOWEST);
  std::fill(mass, mass + count, 0.0f);
  for (int64_t start = 0; start < work.length; start += TILE) {
    const int64_t end = std::min(start + TILE, work.length), whole = (end - start + W - 1) / W * W;
    for (int64_t slot = start; slot < end; slot += W) {
      const int64_t block = work.table[slot / shape.block], offset = slot % shape.block;
      transpose(work.keys + (block * shape.block + offset) * dim, dim, turned);
      score(queries, turned, count, dim, scores + (slot - start), TILE);
    }
    for (int64_t q = 0; q < count; q++) {
      float* line = scores + q * TILE;
      const bool* dark = work.hidden + (q % shape.nodes) * work.slots + start;
      for (int64_t s = 0; s < end - start; s++) line[s] = dark[s] ? LOWEST : line[s];
      for (int64_t s = end - start; s < whole; s++) line[s] = LOWEST;
      vec peak = all(top[q]);
      for (int64_t s = 0; s < whole; s += W) peak = larger(load(line + s), peak);
      const float best = largest(peak);
      if (best == LOWEST) {  // nothing seen yet
        std::fill(line, line + whole, 0.0f);
        continue;
      }
      const float keep = top[q] == LOWEST ? 0.0f : std::exp(top[q] - best);
      vec added{};
      for (int64_t s = 0; s < whole; s += W) {
        const vec weight = exp_below_zero(load(line + s) - best);
        store(line + s, weight);
        added += weight;
      }
      top[q] = best;
      mass[q] = mass[q] * keep + sum(added);
      if (keep != 1.0f) {
        for (int64_t d = 0; d < dim; d++) result[q * dim + d] *= keep;
      }
    }
    for (int64_t slot = start; slot < end; slot += W) {
      const int64_t block = work.table[slot / shape.block], offset = slot % shape.block;
      const E* values = work.values + (block * shape.block + offset) * dim;
      for (int64_t i = 0; i < dim * W; i += W) store(turned + i, load(values + i));
      for (int64_t q = 0; q < count; q++) blend(scores + q * TILE + (slot - start), turned, dim, result + q * dim);
    }
  }
  for (int64_t q = 0; q < count; q++) {
    const float scale = 1.0f / mass[q];
    for (int64_t d = 0; d < dim; d++) result[q * dim + d] *= scale;
  }
}

inline int64_t seen(const bool* hidden, int64_t nodes, int64_t slots) {
  int64_t length = 0;
  for (int64_t n = 0; n < nodes; n++) {
    int64_t last = slots;
    while (last > length && hidden[n * slots + last - 1]) last--;
    length = std::max(length, last);
  }
  return length;
}

// Write k and v at their slots, then attend over the block table.
// q (R * N, heads, D), k and v (R * N, kv_heads, D): views of one qkv matrix. keys, values (kv_heads, blocks, block * D).
// table (R, B), slots (R * N), hidden (R, N, S) -> (R * N, heads * D)
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
              const Tensor& table, const Tensor& slots, const Tensor& hidden) {
  const int64_t rows = hidden.size(0), nodes = hidden.size(1), width = hidden.size(2), heads = q.size(1), dim = q.size(2);
  const int64_t kv_heads = k.size(1), group = heads / kv_heads, blocks = keys.size(1), block = keys.size(2) / dim;
  TORCH_CHECK(dim % W == 0 && block % W == 0 && width == table.numel() / rows * block && q.size(0) == rows * nodes);
  for (const Tensor* x : {&q, &k, &v}) TORCH_CHECK(x->stride(2) == 1 && x->stride(1) == dim);
  for (const Tensor* x : {&keys, &values, &table, &slots, &hidden}) TORCH_CHECK(x->is_contiguous());
  TORCH_CHECK(keys.scalar_type() == q.scalar_type() && values.scalar_type() == q.scalar_type());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type());
  Tensor out = at::empty({rows * nodes, heads * dim}, q.options());
  const int64_t *listed = table.data_ptr<int64_t>(), *place = slots.data_ptr<int64_t>();
  const bool* dark = hidden.data_ptr<bool>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for_type(q, [&](auto tag) {
    using E = decltype(tag);
    const E *query = q.data_ptr<E>(), *fresh_k = k.data_ptr<E>(), *fresh_v = v.data_ptr<E>();
    E *pool_k = keys.data_ptr<E>(), *pool_v = values.data_ptr<E>(), *y = out.data_ptr<E>();
    const Shape shape{nodes, group, kv_heads, dim, block, table.numel() / rows, q.stride(0)};
    // A piece holds about 2^16 multiply-adds at least.
    const int64_t piece = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, group * nodes * width * dim * 2));
    at::parallel_for(0, rows * kv_heads, piece, [&](int64_t from, int64_t to) {
      std::vector<float> room, work(2 * group * nodes * dim);
      float *queries = work.data(), *result = queries + group * nodes * dim;
      for (int64_t task = from; task < to; task++) {
        const int64_t row = task / kv_heads, head = task % kv_heads, plane = head * blocks * block * dim;
        for (int64_t n = 0; n < nodes; n++) {
          const int64_t token = row * nodes + n, at = plane + place[token] * dim;
          std::memcpy(pool_k + at, fresh_k + token * k.stride(0) + head * dim, dim * sizeof(E));
          std::memcpy(pool_v + at, fresh_v + token * v.stride(0) + head * dim, dim * sizeof(E));
          for (int64_t g = 0; g < group; g++) {
            const E* source = query + token * q.stride(0) + (head * group + g) * dim;
            for (int64_t d = 0; d < dim; d += W) store(queries + (g * nodes + n) * dim + d, load(source + d) * scale);
          }
        }
        const bool* mine = dark + row * nodes * width;
        const Work<E> job{pool_k + plane, pool_v + plane, listed + row * shape.blocks_per_row, mine,
                          width, seen(mine, nodes, width)};
        attend_head(job, shape, queries, result, room);
        for (int64_t n = 0; n < nodes; n++) {
          for (int64_t g = 0; g < group; g++) {
            E* target = y + (row * nodes + n) * heads * dim + (head * group + g) * dim;
            const float* source = result + (g * nodes + n) * dim;
            for (int64_t d = 0; d < dim; d += W) store(target + d, load(source + d));
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor slots, Tensor hidden)"
      " -> Tensor",
      attend);
}
