// Norms, rotation and gates, in one pass over their data each.
#include "vectors.h"

#include <cmath>
#include <optional>

namespace {

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

// silu(gate) * up of gate_up (T, 2 I) -> (T, I); the first factor is rounded, as it is between two operations of torch.
Tensor gated(const Tensor& gate_up) {
  const int64_t width = gate_up.size(1) / 2, rows = gate_up.size(0);
  TORCH_CHECK(gate_up.is_contiguous());
  Tensor out = at::empty({rows, width}, gate_up.options());
  for_type(gate_up, [&](auto tag) {
    using E = decltype(tag);
    const E* x = gate_up.const_data_ptr<E>();
    E* y = out.data_ptr<E>();
    at::parallel_for(0, rows, grain(width), [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        const E *gate = x + 2 * row * width, *up = gate + width;
        E* line = y + row * width;
        int64_t i = 0;
        for (; i + W <= width; i += W) store(line + i, as_stored<E>(silu(load(gate + i))) * load(up + i));
        for (; i < width; i++) {
          const E open = narrow<E>(silu(all(wide(gate[i])))[0]);
          line[i] = narrow<E>(wide(open) * wide(up[i]));
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("gated(Tensor gate_up) -> Tensor", gated);
  m.def("add_norm(Tensor(a!) hidden, Tensor? delta, Tensor weight, float eps) -> Tensor", add_norm);
  m.def(
      "rotate(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int kv_heads, Tensor? q_norm, Tensor? k_norm, float eps)"
      " -> ()",
      rotate);
}
