// The matrix product y (T, N) = x (T, K) W^T of a CPU without bf16 instructions, W as it is stored: bf16, int8, int4.
//
// Sums are float32 and have one order (panels.h), so that a row's result depends neither on the other rows nor on the
// thread count, bit for bit. Few rows read the codes as they multiply; for more, a piece of a panel is widened once
// into the first-level cache.
//
// Letters: T tokens, N output features, K input features, G groups of K, R rows of one pass, P panels of one pass.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "activations.h"
#include "panels.h"

namespace {

using at::Tensor;
using namespace trtkit;
using namespace trtkit::panels;
constexpr int64_t UNIT = 4;           // panels that one thread takes at a time; N is padded to a multiple
constexpr int64_t PIECE = 256;        // inputs widened at once: they, x's part and the sums fill 32 KiB
constexpr int64_t FEW = ROWS;         // rows of one pass that widens the codes as it reads them
constexpr int64_t BLOCK = 20 * ROWS;  // rows whose sums are open at once

struct Job {
  const uint8_t* codes;
  const float *scale, *bias;  // scale (G, N padded): of the sum of a group, FACTOR included; bias (N padded) or null
  int64_t out, panels, in, group, groups;  // in, group: padded to CHUNK
  const float *x, *sums;  // x (rows, stride); sums (rows, G) of x over each group
  int64_t rows, stride;
  c10::BFloat16* y;
};

// sums (P, R, PANEL) += x times ``chunks`` chunks of P panels that lie ``apart`` bytes apart.
template <class F, int R, int P>
inline void multiply(const uint8_t* codes, int64_t apart, const float* x, int64_t stride, int64_t chunks, float* sums) {
  vec part[P][R][2];
  for (int p = 0; p < P; p++)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 2; v++) part[p][r][v] = load(sums + ((p * R + r) * 2 + v) * W);
  // The panels take turns at each input: the next addition to a sum then comes when the last one is done.
  const auto input = [&]<int K>() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      const uint8_t* from = codes + p * apart;
      const vec first = F::template number<K, 0>(from), second = F::template number<K, 1>(from);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const vec value = all(x[r * stride + K]);
        part[p][r][0] = multiply_add(first, value, part[p][r][0]);
        part[p][r][1] = multiply_add(second, value, part[p][r][1]);
      }
    }
  };
  for (int64_t c = 0; c < chunks; c++, codes += F::BYTES, x += CHUNK) {
    input.template operator()<0>();
    input.template operator()<1>();
    input.template operator()<2>();
    input.template operator()<3>();
  }
  for (int p = 0; p < P; p++)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 2; v++) store(sums + ((p * R + r) * 2 + v) * W, part[p][r][v]);
}

// total (PANEL) += scale * (part - OFFSET * sum of x)
template <class F>
inline void add_scaled(float* total, const float* part, const float* scale, float sum) {
  for (int v = 0; v < 2; v++) {
    const vec exact = multiply_add(all(-F::OFFSET[v]), all(sum), load(part + v * W));
    store(total + v * W, multiply_add(exact, load(scale + v * W), load(total + v * W)));
  }
}

inline void finish(const Job& job, int64_t panel, int64_t row, const float* total) {
  const int64_t from = panel * PANEL, count = std::clamp<int64_t>(job.out - from, 0, PANEL);
  uint16_t line[PANEL];
  for (int64_t n = 0; n < PANEL; n++) line[n] = rounded(total[n]);
  std::memcpy(job.y + row * job.out + from, line, count * sizeof(uint16_t));
}

inline void start(const Job& job, int64_t panel, float* total) {
  for (int64_t n = 0; n < PANEL; n++) total[n] = job.bias ? job.bias[panel * PANEL + n] : 0.0f;
}

// R rows from ``row`` on against a unit's panels, P at a time.
template <class F, int R, int P>
void direct(const Job& job, int64_t unit, int64_t row) {
  const int64_t chunks = job.group / CHUNK, apart = job.in / CHUNK * F::BYTES;
  alignas(64) float total[P * R * PANEL], part[P * R * PANEL];
  for (int64_t first = unit * UNIT; first < (unit + 1) * UNIT; first += P) {
    for (int64_t i = 0; i < P * R; i++) start(job, first + i / R, total + i * PANEL);
    for (int64_t g = 0; g < job.groups; g++) {
      std::fill(part, part + P * R * PANEL, 0.0f);
      multiply<F, R, P>(
          job.codes + first * apart + g * chunks * F::BYTES, apart, job.x + row * job.stride + g * job.group,
          job.stride, chunks, part);
      for (int64_t i = 0; i < P * R; i++)
        add_scaled<F>(
            total + i * PANEL, part + i * PANEL, job.scale + (g * job.panels + first + i / R) * PANEL,
            job.sums[(row + i % R) * job.groups + g]);
    }
    for (int64_t i = 0; i < P * R; i++) finish(job, first + i / R, row + i % R, total + i * PANEL);
  }
}

template <class F>
inline void widen(const uint8_t* codes, int64_t chunks, float* room) {
  for (int64_t c = 0; c < chunks; c++, codes += F::BYTES, room += CHUNK * PANEL) {
    const auto input = [&]<int K>() __attribute__((always_inline)) {
      store(room + K * PANEL, F::template number<K, 0>(codes));
      store(room + K * PANEL + W, F::template number<K, 1>(codes));
    };
    input.template operator()<0>();
    input.template operator()<1>();
    input.template operator()<2>();
    input.template operator()<3>();
  }
}

using Multiply = void (*)(const uint8_t*, int64_t, const float*, int64_t, int64_t, float*);
template <int... R>
constexpr Multiply wide_kernel(int rows, std::integer_sequence<int, R...>) {
  constexpr Multiply table[] = {multiply<Wide, R + 1, 1>...};
  return table[rows - 1];
}

// Any number of rows (up to BLOCK) against one panel; ``room``: PIECE * PANEL and twice rows * PANEL floats.
template <class F>
void widened(const Job& job, int64_t panel, float* room) {
  float *part = room + PIECE * PANEL, *total = part + job.rows * PANEL;
  const uint8_t* codes = job.codes + panel * (job.in / CHUNK) * F::BYTES;
  const int64_t blocks = (job.rows + ROWS - 1) / ROWS;
  for (int64_t row = 0; row < job.rows; row++) start(job, panel, total + row * PANEL);
  for (int64_t g = 0; g < job.groups; g++) {
    std::fill(part, total, 0.0f);
    for (int64_t from = g * job.group; from < (g + 1) * job.group; from += PIECE) {
      const int64_t chunks = std::min(PIECE, (g + 1) * job.group - from) / CHUNK;
      widen<F>(codes + from / CHUNK * F::BYTES, chunks, room);
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t row = job.rows * b / blocks, count = job.rows * (b + 1) / blocks - row;
        wide_kernel(static_cast<int>(count), std::make_integer_sequence<int, ROWS>{})(
            reinterpret_cast<const uint8_t*>(room), 0, job.x + row * job.stride + from, job.stride, chunks,
            part + row * PANEL);
      }
    }
    for (int64_t row = 0; row < job.rows; row++)
      add_scaled<F>(
          total + row * PANEL, part + row * PANEL, job.scale + (g * job.panels + panel) * PANEL,
          job.sums[row * job.groups + g]);
  }
  for (int64_t row = 0; row < job.rows; row++) finish(job, panel, row, total + row * PANEL);
}

// Up to FEW rows; one or two read several panels side by side.
template <class F>
void few(const Job& job, int64_t unit, int64_t row, int64_t count) {
  if (count == 1) return direct<F, 1, F::PANELS>(job, unit, row);
  if (count == 2) return direct<F, 2, F::PANELS / 2>(job, unit, row);
  [&]<int... R>(std::integer_sequence<int, R...>) {
    static_cast<void>(((count == R + 3 && (direct<F, R + 3, 1>(job, unit, row), true)) || ...));
  }(std::make_integer_sequence<int, FEW - 2>{});
}

template <class F>
void run(const Job& job) {
  const int64_t units = job.panels / UNIT, work = UNIT * PANEL * job.in * job.rows, passes = (job.rows + FEW - 1) / FEW;
  at::parallel_for(0, units, std::max<int64_t>(1, 262144 / work), [&](int64_t from, int64_t to) {
    static thread_local std::vector<float> room;
    const Subnormals allowed;
    if (passes > F::PASSES) room.resize(PIECE * PANEL + 2 * BLOCK * PANEL);
    for (int64_t unit = from; unit < to; unit++) {
      for (int64_t pass = 0; passes <= F::PASSES && pass < passes; pass++) {
        const int64_t row = job.rows * pass / passes;
        few<F>(job, unit, row, job.rows * (pass + 1) / passes - row);
      }
      for (int64_t panel = unit * UNIT; passes > F::PASSES && panel < (unit + 1) * UNIT; panel++)
        widened<F>(job, panel, room.data());
    }
  });
}

// ---- x --------------------------------------------------------------------------------------------------------------

float total_of(const float* x, int64_t count) {  // ``count`` is a multiple of CHUNK
  float part[CHUNK] = {};
  for (int64_t k = 0; k < count; k += CHUNK)
    for (int i = 0; i < CHUNK; i++) part[i] += x[k + i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// ``format``: bits per weight. codes from ``pack_linear``; scale (G, N); bias (N); pre_scale (K).
Tensor linear(
    const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& pre_scale, int64_t format, int64_t out, int64_t rounding, double inverse) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kBFloat16, "trtkit_cpu: bfloat16 (T, K) only");
  const int64_t tokens = x.size(0), width = x.size(1), groups = scale.size(0);
  Tensor y = at::empty({tokens, out}, x.options());
  Job job;
  job.codes = codes.data_ptr<uint8_t>();
  job.scale = scale.data_ptr<float>();
  job.bias = bias ? bias->data_ptr<float>() : nullptr;
  job.out = out, job.panels = scale.size(1) / PANEL, job.groups = groups;
  job.in = padded(width, CHUNK), job.group = job.in / groups, job.stride = padded(job.in, 16) + 16;
  TORCH_CHECK(job.panels * PANEL * job.in * format == codes.numel() * 8, "trtkit_cpu: codes of another shape");
  TORCH_CHECK(job.group * groups == job.in && job.group % CHUNK == 0, "trtkit_cpu: groups of another size");
  const float* pre = pre_scale ? pre_scale->data_ptr<float>() : nullptr;
  static thread_local std::vector<float> values, sums;
  for (int64_t first = 0; first < tokens; first += BLOCK) {
    job.rows = std::min(BLOCK, tokens - first);
    values.resize(std::max<size_t>(values.size(), job.rows * job.stride));
    sums.resize(std::max<size_t>(sums.size(), job.rows * groups));
    float *to = values.data(), *totals = sums.data();
    at::parallel_for(0, job.rows, std::max<int64_t>(1, 32768 / job.in), [&](int64_t from, int64_t end) {
      for (int64_t row = from; row < end; row++) {
        float* line = to + row * job.stride;
        take(
            x.data_ptr<c10::BFloat16>() + (first + row) * width, pre, static_cast<Rounding>(rounding),
            static_cast<float>(inverse), format == 16 ? 1.0f : LIFT, width, line);
        std::fill(line + width, line + job.in, 0.0f);
        for (int64_t g = 0; g < groups; g++)
          totals[row * groups + g] = format == 16 ? 0.0f : total_of(line + g * job.group, job.group);
      }
    });
    job.x = to, job.sums = totals, job.y = y.data_ptr<c10::BFloat16>() + first * out;
    if (format == 16) run<Bf16>(job);
    else if (format == 8) run<Int8>(job);
    else run<Int4>(job);
  }
  return y;
}

// ---- packing --------------------------------------------------------------------------------------------------------

template <class F, typename E>
void pack_as(const E* weight, int64_t out, int64_t in, int64_t panels, uint8_t* codes) {
  const int64_t chunks = padded(in, CHUNK) / CHUNK;
  at::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
    for (int64_t panel = from; panel < to; panel++)
      for (int64_t c = 0; c < chunks; c++)
        F::pack(codes + (panel * chunks + c) * F::BYTES, [&](int64_t k, int64_t n) -> uint32_t {
          const int64_t row = panel * PANEL + n, column = c * CHUNK + k;
          if (row >= out || column >= in) return 0;
          return static_cast<uint32_t>(weight[row * in + column]);
        });
  });
}

// (N, K) as int16 (bits of bf16) or int8 (codes of 8 or 4 bits) -> (panels in bytes, FACTOR of each output (N padded)).
std::tuple<Tensor, Tensor> pack_linear(const Tensor& weight, int64_t format) {
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2);
  const int64_t out = weight.size(0), in = weight.size(1), panels = padded(out, UNIT * PANEL) / PANEL;
  const int64_t bytes = panels * PANEL * padded(in, CHUNK) * format / 8;
  Tensor codes = at::empty({bytes}, weight.options().dtype(at::kByte));
  Tensor factor = at::empty({panels * PANEL}, weight.options().dtype(at::kFloat));
  uint8_t* to = codes.data_ptr<uint8_t>();
  const auto fill = [&](const float* both) {
    for (int64_t n = 0; n < panels * PANEL; n++) factor.data_ptr<float>()[n] = both[n / W % 2];
  };
  if (format == 16) {
    pack_as<Bf16>(reinterpret_cast<const uint16_t*>(weight.data_ptr<int16_t>()), out, in, panels, to);
    fill(Bf16::FACTOR);
  } else if (format == 8) {
    pack_as<Int8>(weight.data_ptr<int8_t>(), out, in, panels, to);
    fill(Int8::FACTOR);
  } else {
    TORCH_CHECK(format == 4, "trtkit_cpu: 16, 8 or 4 bits");
    pack_as<Int4>(weight.data_ptr<int8_t>(), out, in, panels, to);
    fill(Int4::FACTOR);
  }
  return {codes, factor};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("pack_linear(Tensor weight, int format) -> (Tensor, Tensor)", pack_linear);
  m.def(
      "linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? pre_scale, int format, int out, int rounding,"
      " float inverse) -> Tensor",
      linear);
}
