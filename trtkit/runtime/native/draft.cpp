// The chain of a recurrent draft head.
#include "vectors.h"

#include <cmath>
#include <optional>
#include <vector>

namespace {

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

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def(
      "draft_chain(Tensor context, Tensor tokens, Tensor table, Tensor w, Tensor u, Tensor ub, Tensor? projection,"
      " Tensor? projection_bias, Tensor[] blocks, Tensor[] biases, Tensor output, Tensor? ids, int length) -> Tensor",
      draft_chain);
}
