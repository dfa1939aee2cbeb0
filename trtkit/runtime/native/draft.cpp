// One beam of a recurrent draft head in one call: the most likely token, ``length`` times. Between two products lie
// microseconds of work, as in layers.cpp, and here the products are small as well.
//
// The definition is ``Drafter.step`` with packed products (drafter/model.py), rounded where it rounds.
// Letters: R rows, H hidden, V vocab, V' lines of the output layer.
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <vector>

#include "products.h"
#include "vectors.h"

namespace {

inline int64_t best_of(const bf16* line, int64_t count) {  // the first of equals; 0 where nothing is a number
  vec top = all(LOWEST);
  int64_t i = 0;
  for (; i + W <= count; i += W) top = larger(load(line + i), top);
  float best = largest(top);
  for (; i < count; i++) best = std::max(best, wide(line[i]));
  const int64_t at = std::find_if(line, line + count, [best](bf16 x) { return wide(x) == best; }) - line;
  return at < count ? at : 0;
}

struct DraftChain : torch::CustomClassHolder {
  // table (V, H): the target's embeddings. ids (V',): the tokens behind the lines of the output layer. ``projected``: an
  // input projection comes before the blocks.
  DraftChain(const std::string& product, Tensor table, Maybe ids, bool projected)
      : times_(product), table_(std::move(table)), ids_(std::move(ids)), projected_(projected) {
    TORCH_CHECK(table_.is_contiguous() && table_.scalar_type() == at::kBFloat16 && table_.size(1) % W == 0);
  }

  // W and U of the recurrence, the projection if there is one, the blocks, the output layer: in this order.
  void linear(Tensor codes, Tensor scale, Maybe bias, Maybe pre_scale, int64_t kind, int64_t out, int64_t rounding,
              double inverse) {
    linears_.push_back({std::move(codes), std::move(scale), std::move(bias), std::move(pre_scale), kind, out, rounding, inverse});
  }

  // context (R, H), tokens int64 (R,) -> drafted int64 (R, length)
  Tensor run(const Tensor& context, const Tensor& tokens, int64_t length) const {
    const int64_t rows = context.size(0), hidden = context.size(1);
    TORCH_CHECK(context.is_contiguous() && context.scalar_type() == at::kBFloat16 && hidden == table_.size(1));
    Tensor drafted = at::empty({rows, length}, tokens.options()), read = at::empty({rows, hidden}, context.options());
    Tensor state = at::zeros({rows, hidden}, context.options()), both = at::empty({rows, 2 * hidden}, context.options());
    for (int64_t step = 0; step < length; step++) {
      const int64_t* from = step ? drafted.const_data_ptr<int64_t>() + step - 1 : tokens.const_data_ptr<int64_t>();
      gather(from, step ? length : tokens.stride(0), read);
      recur(times_(linears_[0], read), times_(linears_[1], state), state);
      join(context, state, both);
      size_t next = 2;
      Tensor z = projected_ ? times_(linears_[next++], both) : both;
      for (; next + 1 < linears_.size(); next++) z = add_silu(z, times_(linears_[next], z));
      take_best(times_(linears_.back(), z), drafted, step);
    }
    return drafted;
  }

 private:
  void gather(const int64_t* token, int64_t apart, const Tensor& out) const {
    const bf16* table = table_.const_data_ptr<bf16>();
    const int64_t width = table_.size(1);
    for (int64_t r = 0; r < out.size(0); r++)
      std::copy_n(table + token[r * apart] * width, width, out.data_ptr<bf16>() + r * width);
  }

  template <typename F>
  static void each(int64_t count, F run) {  // ``count`` is a multiple of W
    at::parallel_for(0, count / W, 16384 / W, [&](int64_t from, int64_t to) {
      for (int64_t i = from * W; i < to * W; i += W) run(i);
    });
  }

  // state = silu(a + b)
  static void recur(const Tensor& a, const Tensor& b, const Tensor& state) {
    const bf16 *x = a.const_data_ptr<bf16>(), *y = b.const_data_ptr<bf16>();
    bf16* out = state.data_ptr<bf16>();
    each(state.numel(), [&](int64_t i) { store(out + i, silu(as_stored<bf16>(load(x + i) + load(y + i)))); });
  }

  // z + silu(y)
  static Tensor add_silu(const Tensor& z, const Tensor& y) {
    Tensor sum = at::empty(z.sizes(), z.options());
    const bf16 *x = z.const_data_ptr<bf16>(), *more = y.const_data_ptr<bf16>();
    bf16* out = sum.data_ptr<bf16>();
    each(z.numel(), [&](int64_t i) { store(out + i, load(x + i) + as_stored<bf16>(silu(load(more + i)))); });
    return sum;
  }

  static void join(const Tensor& context, const Tensor& state, const Tensor& both) {
    const int64_t width = state.size(1);
    const bf16 *h = context.const_data_ptr<bf16>(), *s = state.const_data_ptr<bf16>();
    for (int64_t r = 0; r < state.size(0); r++) {
      bf16* out = both.data_ptr<bf16>() + r * 2 * width;
      std::copy_n(h + r * width, width, out), std::copy_n(s + r * width, width, out + width);
    }
  }

  void take_best(const Tensor& logits, const Tensor& drafted, int64_t step) const {
    const int64_t lines = logits.size(1), length = drafted.size(1);
    const bf16* from = logits.const_data_ptr<bf16>();
    const int64_t* names = ids_ ? ids_->const_data_ptr<int64_t>() : nullptr;
    int64_t* out = drafted.data_ptr<int64_t>();
    at::parallel_for(0, logits.size(0), grain(lines), [&](int64_t first, int64_t end) {
      for (int64_t r = first; r < end; r++) {
        const int64_t best = best_of(from + r * lines, lines);
        out[r * length + step] = names ? names[best] : best;
      }
    });
  }

  Multiply times_;
  Tensor table_;
  Maybe ids_;
  bool projected_;
  std::vector<Linear> linears_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.class_<DraftChain>("DraftChain")
      .def(torch::init<const std::string&, Tensor, Maybe, bool>())
      .def("linear", &DraftChain::linear)
      .def("run", &DraftChain::run);
}
