// How weights lie in memory for the instructions that multiply short rows of them: bf16 in pairs, int8 by fours.
//
// A tile of weights has 16 outputs and 16 lines of 64 bytes: two inputs of each output in a line for bf16, four for int8.
// The tiles of 32 outputs, a panel, take turns in memory. A format's K: inputs of a tile. BYTES: of a tile in memory.
// LINES: lines that come out of one load, ``hold``, one by one, ``line``. WIDENED: as bf16 made of codes, exactly. INTEGER:
// sums are integers. OFFSET: what a widened weight is too large by. ``put`` writes one weight into a tile.
#pragma once

#include "lines.h"

#ifdef TRTKIT_DOTS
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "activations.h"
#include "huge_pages.h"

namespace trtkit {

constexpr int64_t PANEL = 2 * SIDE;  // outputs
constexpr int64_t UNIT = 2 * PANEL;  // N is padded to a multiple

enum Kind : int64_t { BF16 = 0, INT8 = 1, INT8_CODES = 2, FP8 = 3, INT4 = 4 };

struct Bf16 {
  static constexpr int64_t K = 32, BYTES = TILE, LINES = 1;
  static constexpr float OFFSET = 0.0f;
  static constexpr bool WIDENED = false, INTEGER = false;
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    std::memcpy(tile + k / 2 * LINE + n * 4 + k % 2 * 2, &word, 2);
  }
  static inline __m512i hold(const uint8_t* from) { return _mm512_load_si512(from); }
  template <int>
  static inline __m512i line(__m512i held) { return held; }
};

#ifdef TRTKIT_BF16_DOTS
// Widened to 16 + (code + 8), whose bits are those of the code next to a constant: seven instructions for 128 weights, and
// no lookup. The sums of x, times 24, are taken off the sums of a group.
struct Int4 {
  static constexpr int64_t K = 32, BYTES = TILE / 4, LINES = 4;
  static constexpr float OFFSET = 24.0f;
  static constexpr bool WIDENED = true, INTEGER = false;
  // The codes of four neighbouring lines in a 16-bit word: the first lies where bf16 has its upper four bits of mantissa,
  // the others follow upwards; the fourth goes round the end.
  static void put(uint8_t* tile, int64_t k, int64_t n, uint16_t word) {
    const int64_t line = k / 2;
    uint8_t* at = tile + line / 4 * LINE + (n * 2 + k % 2) * 2;
    uint16_t four;
    std::memcpy(&four, at, 2);
    const uint32_t code = static_cast<uint32_t>((word + 8) & 0xf) << (3 + 4 * (line % 4));
    four = static_cast<uint16_t>(four | code | code >> 16);
    std::memcpy(at, &four, 2);
  }
  static inline __m512i hold(const uint8_t* from) { return _mm512_loadu_si512(from); }
  template <int I>
  static inline __m512i line(__m512i held) {
    const __m512i mantissa = _mm512_set1_epi16(0x78), sixteen = _mm512_set1_epi16(0x4180);
    const __m512i moved = I == 0 ? held : I == 3 ? _mm512_shldi_epi16(held, held, 4) : _mm512_srli_epi16(held, 4 * I);
    return _mm512_ternarylogic_epi32(moved, mantissa, sixteen, 0xea);  // (a & b) | c
  }
};
#endif

// ``lines`` of bf16 from codes.
template <class F>
inline void widen(const uint8_t* codes, int64_t lines, uint8_t* to) {
  for (int64_t first = 0; first < lines; first += F::LINES, codes += F::LINES * F::BYTES / SIDE, to += F::LINES * LINE) {
    const auto held = F::hold(codes);
    [&]<int... I>(std::integer_sequence<int, I...>) {
      (_mm512_store_si512(to + I * LINE, F::template line<I>(held)), ...);
    }(std::make_integer_sequence<int, F::LINES>{});
  }
}

// ``bytes`` of the room, from a line's beginning on.
inline uint8_t* aligned(std::vector<uint8_t>& room, int64_t bytes) {
  if (static_cast<int64_t>(room.size()) < bytes + LINE) room.resize(bytes + LINE);
  return reinterpret_cast<uint8_t*>(padded(reinterpret_cast<int64_t>(room.data()), LINE));
}

// What an operator is called with, into a job and its input: both have more, which ``multiply`` (job, input, y) adds.
template <class Job, class Input>
at::Tensor product(
    const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& pre_scale, int64_t out, int64_t rounding, double inverse, const auto& multiply) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kBFloat16, "trtkit_cpu: bfloat16 (T, K) only");
  at::Tensor y = at::empty({x.size(0), out}, x.options());
  Job job{};
  job.codes = codes.data_ptr<uint8_t>();
  job.scale = scale.data_ptr<float>();
  job.bias = bias ? bias->data_ptr<float>() : nullptr;
  job.out = out, job.panels = scale.size(1) / PANEL, job.groups = scale.size(0);
  Input in{};
  in.x = x.data_ptr<c10::BFloat16>(), in.rows = x.size(0), in.width = x.size(1);
  in.pre = pre_scale ? pre_scale->data_ptr<float>() : nullptr;
  in.rounding = static_cast<Rounding>(rounding), in.inverse = static_cast<float>(inverse);
  multiply(job, in, reinterpret_cast<uint16_t*>(y.data_ptr<c10::BFloat16>()));
  return y;
}

template <class F>
inline void check_codes(const at::Tensor& codes, int64_t panels, int64_t width) {
  TORCH_CHECK(
      codes.numel() == panels * 2 * (padded(width, F::K) / F::K) * F::BYTES, "trtkit_cpu: codes of another shape");
}

// (N, K) as int16 (bits of bf16), int8 (codes of 8 or 4 bits) or uint8 (bits of e4m3) -> the bytes of all panels.
template <class F>
at::Tensor pack_panels(const at::Tensor& weight) {
  constexpr int64_t size = std::is_same_v<F, Bf16> ? 2 : 1;
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2);
  TORCH_CHECK(weight.element_size() == size, "trtkit_cpu: weights of another type");
  const int64_t out = weight.size(0), in = weight.size(1);
  const int64_t sides = padded(out, UNIT) / SIDE, steps = padded(in, F::K) / F::K;
  const uint8_t* from = static_cast<const uint8_t*>(weight.data_ptr());
  at::Tensor codes = huge_bytes(sides * steps * F::BYTES);
  uint8_t* to = codes.data_ptr<uint8_t>();
  at::parallel_for(0, sides, 1, [&](int64_t begin, int64_t end) {
    for (int64_t side = begin; side < end; side++)
      for (int64_t s = 0; s < steps; s++) {
        uint8_t* tile = to + ((side / 2 * steps + s) * 2 + side % 2) * F::BYTES;
        for (int64_t n = 0; n < SIDE; n++)
          for (int64_t k = 0; k < F::K; k++) {
            const int64_t row = side * SIDE + n, column = s * F::K + k;
            uint16_t word = 0;
            if (row < out && column < in) std::memcpy(&word, from + (row * in + column) * size, size);
            F::put(tile, k, n, word);
          }
      }
  });
  return codes;
}

}  // namespace trtkit
#endif
