// Packed products as the classes of this library call them: the operator of PackedLinear (packed.py) and what it takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string>
#include <utility>

namespace {

using Maybe = std::optional<at::Tensor>;

// The pieces are called as Python calls them: the same bits, and a profiler sees them.
template <typename F>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

struct Linear {
  at::Tensor codes, scale;
  Maybe bias, pre_scale;
  int64_t kind, out, rounding;
  double inverse;
};

// The operator that all linears of one class have.
class Multiply {
 public:
  explicit Multiply(const std::string& name) : operator_(operation<Product>(name.c_str())) {}

  at::Tensor operator()(const Linear& linear, const at::Tensor& x) const {
    return operator_.call(x, linear.codes, linear.scale, linear.bias, linear.pre_scale, linear.kind, linear.out,
                          linear.rounding, linear.inverse);
  }

 private:
  using Product = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Maybe&, const Maybe&, int64_t,
                             int64_t, int64_t, double);
  c10::TypedOperatorHandle<Product> operator_;
};

}  // namespace
