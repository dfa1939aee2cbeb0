// Logits to tokens: the inverse CDF of the sampling distribution.
#include "vectors.h"

#include <ATen/ops/sum.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <vector>

namespace {

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("pick(Tensor logits, Tensor temperature, Tensor cold, Tensor uniform) -> Tensor", pick);
}
