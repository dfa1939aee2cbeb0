// A decode step's way through all layers in one call. Between two products lie a few microseconds of work each; from
// Python they cost several times that, and most at one row, when the interpreter's own memory has left the caches
// while the weights passed through them.
//
// The pieces are the operators of this library.
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

#include "products.h"

namespace {

using at::Tensor;

struct Layer {
  Tensor input_norm, post_norm;
  Maybe q_norm, k_norm;
  std::vector<Linear> linears;  // qkv, o, gate_up, down
};

// ``product``: the operator that all linears have.
struct Layers : torch::CustomClassHolder {
  Layers(const std::string& product, Tensor final_norm, int64_t heads, int64_t kv_heads, double eps)
      : times_(product), final_norm_(std::move(final_norm)), heads_(heads), kv_heads_(kv_heads), eps_(eps) {}

  void layer(Tensor input_norm, Tensor post_norm, Maybe q_norm, Maybe k_norm) {
    layers_.push_back({std::move(input_norm), std::move(post_norm), std::move(q_norm), std::move(k_norm), {}});
  }

  // The next one of the last layer.
  void linear(Tensor codes, Tensor scale, Maybe bias, Maybe pre_scale, int64_t kind, int64_t out, int64_t rounding,
              double inverse) {
    TORCH_CHECK(!layers_.empty() && layers_.back().linears.size() < 4, "trtkit_cpu: a layer has four products");
    layers_.back().linears.push_back(
        {std::move(codes), std::move(scale), std::move(bias), std::move(pre_scale), kind, out, rounding, inverse});
  }

  // hidden (T, H), which is overwritten -> (T, H) after the final norm. keys, values (L, kv_heads, blocks, block * D);
  // the others as ``rotate`` and ``attend`` have them.
  Tensor run(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
             const Tensor& table, const Tensor& slots, const Tensor& dark) const {
    const int64_t tokens = hidden.size(0), dim = cos.size(-1), q_width = heads_ * dim, kv_width = kv_heads_ * dim;
    TORCH_CHECK(keys.size(0) == static_cast<int64_t>(layers_.size()), "trtkit_cpu: a cache of other layers");
    Maybe delta;
    for (size_t index = 0; index < layers_.size(); index++) {
      const Layer& layer = layers_[index];
      TORCH_CHECK(layer.linears.size() == 4, "trtkit_cpu: a layer has four products");
      const int64_t at = static_cast<int64_t>(index);
      const Tensor qkv = times_(layer.linears[0], add_norm_.call(hidden, delta, layer.input_norm, eps_));
      rotate_.call(qkv, cos, sin, heads_, kv_heads_, layer.q_norm, layer.k_norm, eps_);
      const auto part = [&](int64_t from, int64_t count) {
        return qkv.narrow(1, from, count).view({tokens, count / dim, dim});
      };
      const Tensor seen = attend_.call(
          part(0, q_width), part(q_width, kv_width), part(q_width + kv_width, kv_width), keys.select(0, at),
          values.select(0, at), table, slots, dark);
      const Tensor normed = add_norm_.call(hidden, times_(layer.linears[1], seen), layer.post_norm, eps_);
      delta = times_(layer.linears[3], gated_.call(times_(layer.linears[2], normed)));
    }
    return add_norm_.call(hidden, delta, final_norm_, eps_);
  }

 private:
  using AddNorm = Tensor(const Tensor&, const Maybe&, const Tensor&, double);
  using Rotate = void(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, const Maybe&, const Maybe&, double);
  using Gated = Tensor(const Tensor&);
  using Attend = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor&, const Tensor&);

  Multiply times_;
  c10::TypedOperatorHandle<AddNorm> add_norm_ = operation<AddNorm>("trtkit_cpu::add_norm");
  c10::TypedOperatorHandle<Rotate> rotate_ = operation<Rotate>("trtkit_cpu::rotate");
  c10::TypedOperatorHandle<Gated> gated_ = operation<Gated>("trtkit_cpu::gated");
  c10::TypedOperatorHandle<Attend> attend_ = operation<Attend>("trtkit_cpu::attend");
  Tensor final_norm_;
  int64_t heads_, kv_heads_;
  double eps_;
  std::vector<Layer> layers_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.class_<Layers>("Layers")
      .def(torch::init<const std::string&, Tensor, int64_t, int64_t, double>())
      .def("layer", &Layers::layer)
      .def("linear", &Layers::linear)
      .def("run", &Layers::run);
}
