// What a decode step does besides its matrix products, each in one pass over its data.
//
// The definitions are the pure-torch functions (trtkit/decoder.py, trtkit/runtime/attention.py, sampling.py, linear.py).
// Every result depends on its own row alone: work is split over rows and heads, never inside a sum, so that neither the
// batch nor the thread count changes a bit.
//
// GCC and Clang vector types of 16 floats: one register with AVX512, two with AVX2.
//
// Letters: T tokens, R rows, N nodes, S slots, D head_dim, V vocab, Q query rows of one KV head (group x nodes).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using bf16 = c10::BFloat16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
// The same in memory, at any address. Not memcpy: GCC moves that in halves and then waits for the whole.
typedef float vec_in_memory __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t hvec_in_memory __attribute__((vector_size(32), aligned(2), may_alias));
constexpr int64_t W = 16;        // floats in a vec
constexpr int64_t TILE = 256;    // slots between two updates of the running maximum
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// ---- elements -------------------------------------------------------------------------------------------------------

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <typename E>
inline E narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bf16 narrow<bf16>(float x) {  // to nearest even; branch-free so that loops over it vectorize
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return bf16(static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded), bf16::from_bits());
}

inline vec load(const float* p) { return *reinterpret_cast<const vec_in_memory*>(p); }
inline vec load(const bf16* p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const hvec_in_memory*>(p), ivec) << 16);
}
inline void store(float* p, vec x) { *reinterpret_cast<vec_in_memory*>(p) = x; }
inline void store(bf16* p, vec x) {  // as ``narrow``
  typedef uint32_t uvec __attribute__((vector_size(64)));
  const uvec bits = (uvec)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  *reinterpret_cast<hvec_in_memory*>(p) = __builtin_convertvector(x == x ? rounded : nan, hvec);
}
inline vec all(float x) { return vec{} + x; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }
inline float sum(vec x) {
  float out = 0;
  for (int i = 0; i < W; i++) out += x[i];
  return out;
}
inline float largest(vec x) {
  float out = x[0];
  for (int i = 1; i < W; i++) out = x[i] > out ? x[i] : out;
  return out;
}

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

// ---- norms, rotation, codes -----------------------------------------------------------------------------------------

template <typename E>
inline void norm_row(const E* x, const float* weight, E* out, int64_t width, float eps) {
  vec total = all(0.0f);
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const vec value = load(x + i);
    total += value * value;
  }
  float squares = sum(total);
  for (; i < width; i++) squares += wide(x[i]) * wide(x[i]);
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
  for (i = 0; i + W <= width; i += W) store(out + i, load(x + i) * scale * load(weight + i));
  for (; i < width; i++) out[i] = narrow<E>(wide(x[i]) * scale * weight[i]);
}

// Rows in a parallel piece: about 16k elements, so that small batches stay on one thread.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }

template <typename F>
void for_type(const Tensor& like, F run) {
  if (like.scalar_type() == at::kBFloat16) {
    run(bf16{});
  } else {
    TORCH_CHECK(like.scalar_type() == at::kFloat, "trtkit_cpu: bfloat16 or float32 only");
    run(float{});
  }
}

// hidden (T, H) += delta in place where there is one; the norm of the sum comes back.
Tensor add_norm(const Tensor& hidden, const std::optional<Tensor>& delta, const Tensor& weight, double eps) {
  TORCH_CHECK(hidden.is_contiguous() && weight.scalar_type() == at::kFloat && weight.is_contiguous());
  TORCH_CHECK(!delta || (delta->is_contiguous() && delta->sizes() == hidden.sizes()));
  const int64_t width = hidden.size(-1), rows = hidden.numel() / width;
  Tensor out = at::empty(hidden.sizes(), hidden.options());
  for_type(hidden, [&](auto tag) {
    using E = decltype(tag);
    E* x = hidden.data_ptr<E>();
    E* y = out.data_ptr<E>();
    const E* add = delta ? delta->data_ptr<E>() : nullptr;
    const float* w = weight.data_ptr<float>();
    at::parallel_for(0, rows, grain(width), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        E* line = x + row * width;
        if (add != nullptr) {
          const E* more = add + row * width;
          int64_t i = 0;
          for (; i + W <= width; i += W) store(line + i, load(line + i) + load(more + i));
          for (; i < width; i++) line[i] = narrow<E>(wide(line[i]) + wide(more[i]));
        }
        norm_row(line, w, y + row * width, width, static_cast<float>(eps));
      }
    });
  });
  return out;
}

template <typename E>
inline void turn_head(E* head, const E* cos, const E* sin, int64_t half) {
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vec a = load(head + i), b = load(head + i + half);
    store(head + i, a * load(cos + i) - b * load(sin + i));
    store(head + i + half, b * load(cos + i + half) + a * load(sin + i + half));
  }
  for (; i < half; i++) {
    const float a = wide(head[i]), b = wide(head[i + half]);
    head[i] = narrow<E>(a * wide(cos[i]) - b * wide(sin[i]));
    head[i + half] = narrow<E>(b * wide(cos[i + half]) + a * wide(sin[i + half]));
  }
}

// The q and k heads of qkv (T, (heads + 2 kv) * D), normed where the model norms them, turned in place by cos and sin
// (T, 1, D).
void rotate(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads, int64_t kv_heads,
            const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps) {
  const int64_t tokens = qkv.size(0), width = qkv.size(1), dim = width / (heads + 2 * kv_heads);
  TORCH_CHECK(qkv.is_contiguous() && cos.is_contiguous() && sin.is_contiguous() && cos.numel() == tokens * dim);
  TORCH_CHECK(cos.scalar_type() == qkv.scalar_type());
  const float* q_weight = q_norm ? q_norm->data_ptr<float>() : nullptr;
  const float* k_weight = k_norm ? k_norm->data_ptr<float>() : nullptr;
  for_type(qkv, [&](auto tag) {
    using E = decltype(tag);
    E* data = qkv.data_ptr<E>();
    const E *c = cos.data_ptr<E>(), *s = sin.data_ptr<E>();
    at::parallel_for(0, tokens, grain(width), [&](int64_t from, int64_t to) {
      for (int64_t token = from; token < to; token++) {
        for (int64_t head = 0; head < heads + kv_heads; head++) {
          E* x = data + token * width + head * dim;
          const float* weight = head < heads ? q_weight : k_weight;
          if (weight != nullptr) norm_row(x, weight, x, dim, static_cast<float>(eps));
          turn_head(x, c + token * dim, s + token * dim, dim / 2);
        }
      }
    });
  });
}

// round(x * inverse) + 128 as bytes: the unsigned activation codes of W8A8.
Tensor codes(const Tensor& x, double inverse) {
  TORCH_CHECK(x.is_contiguous());
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kByte));
  const float scale = static_cast<float>(inverse);
  for_type(x, [&](auto tag) {
    using E = decltype(tag);
    const E* in = x.data_ptr<E>();
    uint8_t* y = out.data_ptr<uint8_t>();
    at::parallel_for(0, x.numel(), 32768, [&](int64_t from, int64_t to) {
      typedef uint8_t codes_in_memory __attribute__((vector_size(16), aligned(1), may_alias));
      int64_t i = from;
      for (; i + W <= to; i += W) {
        // Clamped first, which changes nothing between two whole numbers; then rounded by a number without fractions.
        vec value = load(in + i) * scale;
        value = value < -128.0f ? all(-128.0f) : value;
        value = value > 127.0f ? all(127.0f) : value;
        const vec whole = (value + 12582912.0f) - 12582912.0f;
        *reinterpret_cast<codes_in_memory*>(y + i) =
            __builtin_convertvector(__builtin_convertvector(whole, ivec) + 128, codes_in_memory);
      }
      for (; i < to; i++) {
        float value = std::nearbyint(wide(in[i]) * scale) + 128.0f;
        value = value < 0.0f ? 0.0f : value;
        value = value > 255.0f ? 255.0f : value;
        y[i] = static_cast<uint8_t>(static_cast<int32_t>(value));
      }
    });
  });
  return out;
}

// ---- attention ------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t nodes, group, kv_heads, dim, block, blocks_per_row, token_stride;
};

// 16 keys of one block as D rows of 16 floats: a query then needs one multiply-add for each of its numbers.
template <typename E>
inline void transpose(const E* keys, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += W) {
    vec rows[W], next[W];
    for (int i = 0; i < W; i++) rows[i] = load(keys + i * dim + d);
    // Four rounds of merging row i with row i + 8; after them row i holds column i.
    for (int round = 0; round < 4; round++) {
      for (int i = 0; i < 8; i++) {
        next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        next[2 * i + 1] =
            __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      }
      for (int i = 0; i < W; i++) rows[i] = next[i];
    }
    for (int i = 0; i < W; i++) store(out + (d + i) * W, rows[i]);
  }
}

// Scores of P queries against 16 keys. Each query has two sums, whatever P is: a single chain of additions would wait for
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
  for (int64_t q = 0; q < count; q += 8) {
    const float* from = queries + q * dim;
    float* to = out + q * stride;
    switch (std::min<int64_t>(count - q, 8)) {
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

// result (D) += the sum over 16 keys of weight x value
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

// ---- sampling -------------------------------------------------------------------------------------------------------

// The first id of the largest logit, or -1 where a logit is not a number.
template <typename E>
int64_t most_likely(const E* logits, int64_t width, float* top) {
  vec best = all(LOWEST);
  ivec odd{};
  int64_t i = 0;
  for (; i + W <= width; i += W) {
    const vec x = load(logits + i);
    odd |= (x != x);
    best = larger(x, best);
  }
  float peak = largest(best);
  bool wrong = false;
  for (int j = 0; j < W; j++) wrong |= odd[j] != 0;
  for (; i < width; i++) {
    const float x = wide(logits[i]);
    wrong |= x != x;
    peak = x > peak ? x : peak;
  }
  *top = peak;
  if (wrong || !std::isfinite(peak)) return -1;
  for (int64_t j = 0; j < width; j++) {
    if (wide(logits[j]) == peak) return j;
  }
  return -1;
}

constexpr int64_t BLOCK = 128;

// ``invert_cdf`` of one row, step by step the arithmetic of the reference, in one buffer that stays in the cache. exp and
// the block sums are torch's own kernels: another exp, good to the last bit but one, would draw another token now and
// then.
template <typename E>
int64_t draw(const E* logits, int64_t width, float temperature, double uniform, const Tensor& weights,
             const Tensor& sums, std::vector<double>& upto) {
  float peak;
  if (most_likely(logits, width, &peak) < 0) return -1;
  const float top = peak / temperature;
  float* weight = weights.data_ptr<float>();
  int64_t i = 0;
  for (; i + W <= width; i += W) store(weight + i, load(logits + i) / temperature - top);
  for (; i < width; i++) weight[i] = wide(logits[i]) / temperature - top;
  Tensor used = weights.flatten().narrow(0, 0, width);
  used.exp_();
  std::fill(weight + width, weight + weights.numel(), 0.0f);
  at::sum_out(const_cast<Tensor&>(sums), weights, {1});
  const int64_t blocks = weights.size(0);
  const float* part = sums.data_ptr<float>();
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) upto[b] = total += part[b];
  const double target = uniform * total;
  const int64_t block = std::min<int64_t>(std::upper_bound(upto.begin(), upto.end(), target) - upto.begin(), blocks - 1);
  const double rest = target - (block > 0 ? upto[block - 1] : 0.0);
  double inside[BLOCK], run = 0;
  for (int64_t j = 0; j < BLOCK; j++) inside[j] = run += weight[block * BLOCK + j];
  // The first that exceeds what is left of the target, and at most the last one with a weight.
  const int64_t index = std::upper_bound(inside, inside + BLOCK, rest) - inside;
  const int64_t last = std::lower_bound(inside, inside + BLOCK, run) - inside;
  return block * BLOCK + std::min(index, last);
}

// One token for each row of logits (M, V): the most likely where ``cold``, else the draw by ``uniform``. -1 leaves a row
// that is not all numbers to the reference. No cuts (top-k, top-p, min-p).
Tensor pick(const Tensor& logits, const Tensor& temperature, const Tensor& cold, const Tensor& uniform) {
  TORCH_CHECK(logits.is_contiguous() && temperature.is_contiguous() && cold.is_contiguous() && uniform.is_contiguous());
  const int64_t rows = logits.size(0), width = logits.size(1), blocks = (width + BLOCK - 1) / BLOCK;
  Tensor out = at::empty({rows}, logits.options().dtype(at::kLong));
  const float* heat = temperature.data_ptr<float>();
  const bool* still = cold.data_ptr<bool>();
  const double* number = uniform.data_ptr<double>();
  int64_t* y = out.data_ptr<int64_t>();
  for_type(logits, [&](auto tag) {
    using E = decltype(tag);
    const E* x = logits.data_ptr<E>();
    at::parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
      c10::InferenceMode guard;  // the caller's mode does not reach the other threads
      const auto floats = at::TensorOptions().dtype(at::kFloat);
      const Tensor weights = at::empty({blocks, BLOCK}, floats), sums = at::empty({blocks}, floats);
      std::vector<double> upto(blocks);
      float peak;
      for (int64_t row = from; row < to; row++) {
        const E* line = x + row * width;
        y[row] = still[row] ? most_likely(line, width, &peak)
                            : draw(line, width, heat[row], number[row], weights, sums, upto);
      }
    });
  });
  return out;
}

// ---- draft ----------------------------------------------------------------------------------------------------------

constexpr int64_t PACK = 4;  // rows that share one pass over a weight

// SPAN lines of M at once: their sums are independent, so that no addition waits for the one before.
template <int64_t SPAN, typename E>
inline void lines_of(const E* m, const E* bias, const float* x, int64_t rows, int64_t in, int64_t out, int64_t i, float* y) {
  vec total[SPAN][PACK] = {};
  for (int64_t k = 0; k < in; k += W) {
    vec weight[SPAN];
    for (int64_t j = 0; j < SPAN; j++) weight[j] = load(m + (i + j) * in + k);
    for (int64_t r = 0; r < rows; r++) {
      const vec value = load(x + r * in + k);
      for (int64_t j = 0; j < SPAN; j++) total[j][r] += weight[j] * value;
    }
  }
  for (int64_t j = 0; j < SPAN; j++)
    for (int64_t r = 0; r < rows; r++) y[r * out + i + j] = sum(total[j][r]) + (bias ? wide(bias[i + j]) : 0.0f);
}

// y[r] = M x[r] (+ bias) for up to PACK rows: M (out, in) in E, x and y in float.
template <typename E>
void product(const Tensor& matrix, const Tensor* bias, const float* x, int64_t rows, float* y) {
  const int64_t out = matrix.size(0), in = matrix.size(1);
  const E* m = matrix.data_ptr<E>();
  const E* b = bias ? bias->data_ptr<E>() : nullptr;
  int64_t i = 0;
  for (; rows == 1 && i + 8 <= out; i += 8) lines_of<8>(m, b, x, 1, in, out, i, y);
  for (; i + 4 <= out; i += 4) lines_of<4>(m, b, x, rows, in, out, i, y);
  for (; i < out; i++) lines_of<1>(m, b, x, rows, in, out, i, y);
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// The chain of ``length`` most likely tokens of a recurrent ReDrafter head: see drafter/model.py for the mathematics.
// context (R, H), tokens (R,); table (V, H) the target's embeddings; ids (V',) the tokens behind the lines of output.
Tensor draft_chain(
    const Tensor& context, const Tensor& tokens, const Tensor& table, const Tensor& w, const Tensor& u, const Tensor& ub,
    const std::optional<Tensor>& projection, const std::optional<Tensor>& projection_bias,
    const std::vector<Tensor>& blocks, const std::vector<Tensor>& biases, const Tensor& output,
    const std::optional<Tensor>& ids, int64_t length) {
  const int64_t rows = context.size(0), hidden = context.size(1), width = output.size(1), lines = output.size(0);
  TORCH_CHECK(hidden % W == 0 && width % W == 0 && context.is_contiguous() && table.is_contiguous());
  Tensor out = at::empty({rows, length}, tokens.options());
  const int64_t* root = tokens.data_ptr<int64_t>();
  const int64_t* names = ids ? ids->data_ptr<int64_t>() : nullptr;
  int64_t* drafted = out.data_ptr<int64_t>();
  for_type(context, [&](auto tag) {
    using E = decltype(tag);
    const E* h = context.data_ptr<E>();
    const E* embeddings = table.data_ptr<E>();
    at::parallel_for(0, (rows + PACK - 1) / PACK, 1, [&](int64_t from, int64_t to) {
      std::vector<float> e(PACK * hidden), s(PACK * hidden), a(PACK * hidden), z(PACK * 2 * hidden);
      std::vector<float> x(PACK * width), y(PACK * width), logits(PACK * lines);
      for (int64_t pack = from; pack < to; pack++) {
        const int64_t first = pack * PACK, count = std::min(PACK, rows - first);
        std::fill(s.begin(), s.end(), 0.0f);
        for (int64_t step = 0; step < length; step++) {
          for (int64_t r = 0; r < count; r++) {
            const int64_t token = step ? drafted[(first + r) * length + step - 1] : root[first + r];
            for (int64_t k = 0; k < hidden; k++) e[r * hidden + k] = wide(embeddings[token * hidden + k]);
          }
          product<E>(w, nullptr, e.data(), count, a.data());
          if (step) product<E>(u, &ub, s.data(), count, e.data());
          else for (int64_t k = 0; k < count * hidden; k++) e[k] = wide(ub.data_ptr<E>()[k % hidden]);
          for (int64_t k = 0; k < count * hidden; k++) s[k] = silu(a[k] + e[k]);
          for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < hidden; k++) {
              z[r * 2 * hidden + k] = wide(h[(first + r) * hidden + k]);
              z[r * 2 * hidden + hidden + k] = s[r * hidden + k];
            }
          if (projection) product<E>(*projection, &*projection_bias, z.data(), count, x.data());
          else std::copy(z.begin(), z.begin() + count * width, x.begin());
          for (size_t block = 0; block < blocks.size(); block++) {
            product<E>(blocks[block], &biases[block], x.data(), count, y.data());
            for (int64_t k = 0; k < count * width; k++) x[k] += silu(y[k]);
          }
          product<E>(output, nullptr, x.data(), count, logits.data());
          for (int64_t r = 0; r < count; r++) {
            const float* line = logits.data() + r * lines;
            const int64_t best = std::max_element(line, line + lines) - line;
            drafted[(first + r) * length + step] = names ? names[best] : best;
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(trtkit_cpu, m) {
  m.def("add_norm(Tensor(a!) hidden, Tensor? delta, Tensor weight, float eps) -> Tensor", add_norm);
  m.def(
      "rotate(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int kv_heads, Tensor? q_norm, Tensor? k_norm, float eps)"
      " -> ()",
      rotate);
  m.def("codes(Tensor x, float inverse) -> Tensor", codes);
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor slots, Tensor hidden)"
      " -> Tensor",
      attend);
  m.def(
      "draft_chain(Tensor context, Tensor tokens, Tensor table, Tensor w, Tensor u, Tensor ub, Tensor? projection,"
      " Tensor? projection_bias, Tensor[] blocks, Tensor[] biases, Tensor output, Tensor? ids, int length) -> Tensor",
      draft_chain);
  m.def("pick(Tensor logits, Tensor temperature, Tensor cold, Tensor uniform) -> Tensor", pick);
}
