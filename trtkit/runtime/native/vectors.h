// The vectors and element helpers that all CPU kernels share, with what they have in common.
//
// The definitions are the pure-torch functions (trtkit/decoder.py, trtkit/runtime/attention.py, sampling.py, linear.py).
// Every result depends on its own row alone: work is split over rows and heads, never inside a sum, so that neither the
// batch nor the thread count changes a bit.
//
// GCC and Clang vector types of one register: GCC compares and shuffles wider ones one element at a time.
//
// Letters: T tokens, R rows, N nodes, S slots, D head_dim, V vocab, Q query rows of one KV head (group x nodes).
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace {  // a copy for each source: they may be compiled with different flags

using at::Tensor;
using bf16 = c10::BFloat16;
#ifdef __AVX512F__
constexpr int64_t W = 16;  // floats in a vec
#else
constexpr int64_t W = 8;
#endif
typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
// The same in memory, at any address. Not memcpy: GCC moves that in halves and then waits for the whole.
typedef float vec_in_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t hvec_in_memory __attribute__((vector_size(2 * W), aligned(2), may_alias));
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

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
template <int AT, int... I>
inline auto lanes(auto x, std::integer_sequence<int, I...>) { return __builtin_shufflevector(x, x, (AT + I)...); }
template <int N = W>
inline float largest(auto x) {  // of N numbers
  if constexpr (N == 2) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    constexpr auto half = std::make_integer_sequence<int, N / 2>();
    const auto a = lanes<0>(x, half), b = lanes<N / 2>(x, half);
    return largest<N / 2>(a > b ? a : b);
  }
}

// exp on [-ln2/2, ln2/2], by the Cephes coefficients.
inline vec exp_near_zero(vec r) {
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp for x <= 0: 2^n times the above, within 2 units in the last place; 0 below -87.
inline vec exp_below_zero(vec x) {
  const auto dead = x < all(-87.0f);
  x = dead ? all(0.0f) : x;
  const ivec n = __builtin_convertvector(x * 1.44269504f - 0.5f, ivec);  // truncation towards 0: x <= 0 rounds to nearest
  const vec f = __builtin_convertvector(n, vec);
  const vec r = (x - f * 0.693359375f) - f * -2.12194440e-4f;
  return dead ? all(0.0f) : exp_near_zero(r) * (vec)((n + 127) << 23);
}

// x sigmoid(x). The exponential, with the polynomial above, is of -87 at least and of 88 at most.
inline vec silu(vec x) {
  vec y = x > all(87.0f) ? all(-87.0f) : -x;
  y = y > all(88.0f) ? all(88.0f) : y;
  const vec shifted = y * 1.44269504f + 12582912.0f;  // the nearest whole number n stands in its last bits
  const vec f = shifted - 12582912.0f, r = (y - f * 0.693359375f) - f * -2.12194440e-4f;
  return x / (1.0f + exp_near_zero(r) * (vec)(((ivec)shifted << 23) + (127 << 23)));
}

// What a number is once it was stored as E.
template <typename E>
inline vec as_stored(vec x) {
  if constexpr (std::is_same_v<E, float>) return x;
  const uvec bits = (uvec)x, near = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return x == x ? (vec)near : x;
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

}  // namespace
