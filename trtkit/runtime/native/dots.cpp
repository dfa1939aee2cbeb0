// The matrix product y (T, N) = x (T, K) W^T on a CPU whose vectors multiply pairs of bf16 or fours of bytes and add them
// up (AVX512 with BF16 and VNNI, no matrix units).
//
// A vector holds 16 outputs, one number of x meets all of them: each output is a lane's chain of additions over K, in
// order, whatever the number of rows. Few rows widen codes in registers as they read them; for more, a piece of a panel
// is widened once into the first-level cache. The piece that comes next is asked for meanwhile, so that memory is read
// while the last rows of a piece are multiplied.
//
// Letters: T tokens, N output features, K input features, G groups of K, R rows of one pass.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "dot_formats.h"

#ifdef TRTKIT_DOTS
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using namespace trtkit;
using namespace trtkit::dots;

constexpr int MOST = 12;        // rows of one pass: two sums for each stay in registers
constexpr int DIRECT = 8;       // rows of one pass that widens codes as it reads them
constexpr int64_t PIECE = 256;  // inputs of a panel widened at once: 16 KB of bf16
constexpr int64_t DWORD = 4;    // bytes of x that one lane's instruction takes

struct Job {
  const uint8_t* codes;
  const float *scale, *bias;  // scale (G, N padded) of the sum of a group; bias (N padded) or null
  int64_t out, panels, bytes;  // bytes of a panel
  int64_t in, group, groups;   // in, group: inputs in whole tiles
  // Blocks of R rows each, one after the other: 4 bytes of every row, the next 4 bytes of every row, ...
  const uint8_t* x;
  const int32_t* own;  // (G, rows): what the sums of a group are too large by; the bits of a float where sums are
  int64_t rows, passes;
  uint16_t* y;
  int64_t first(int64_t pass) const { return rows * pass / passes; }  // row
};

// What is being read while a piece is multiplied: ``each`` bytes with every four lines.
struct Ahead {
  const uint8_t *at, *end;
  int64_t each;
  inline void some() {
    for (int64_t asked = 0; asked < each && at < end; asked += LINE, at += LINE) _mm_prefetch(at, _MM_HINT_T0);
  }
};

template <class F>
inline constexpr int64_t line_bytes = F::BYTES / SIDE;
template <class F>
inline constexpr int64_t line_inputs = F::K / SIDE;

template <bool INTEGER>
inline __m512i add_product(__m512i sum, __m512i weights, __m512i x) {
  if constexpr (INTEGER) return _mm512_dpbusd_epi32(sum, weights, x);
  const __m512 added = _mm512_dpbf16_ps(
      _mm512_castsi512_ps(sum), reinterpret_cast<const __m512bh&>(weights), reinterpret_cast<const __m512bh&>(x));
  return _mm512_castps_si512(added);
}

// Sums (R, 2) in ``part`` += x times a piece of a panel: ``tiles`` pairs of tiles, as stored or, WIDE, bf16 in the room.
template <class F, int R, bool WIDE>
inline void multiply(const uint8_t* codes, const uint8_t* x, int64_t tiles, __m512i* part, Ahead& ahead) {
  constexpr bool HERE = F::WIDENED && !WIDE;
  constexpr int64_t FOUR = 4 * (HERE ? line_bytes<F> : LINE), APART = SIDE / 4 * FOUR;  // bytes of four lines; of a tile
  __m512i sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) sums[r][0] = part[2 * r], sums[r][1] = part[2 * r + 1];
  for (int64_t t = 0; t < tiles; t++, codes += APART)
    for (int64_t i = 0; i < SIDE / 4; i++, codes += FOUR, x += 4 * R * DWORD) {
      ahead.some();
      __m512i weights[2][4];
#pragma GCC unroll 2
      for (int side = 0; side < 2; side++) {
        const uint8_t* from = codes + side * APART;
        if constexpr (HERE) {
#pragma GCC unroll 4
          for (int line = 0; line < 4; line += F::LINES) F::widen(from + line * line_bytes<F>, weights[side] + line);
        } else {
#pragma GCC unroll 4
          for (int line = 0; line < 4; line++) weights[side][line] = _mm512_load_si512(from + line * LINE);
        }
      }
#pragma GCC unroll 4
      for (int line = 0; line < 4; line++)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          int32_t word;
          std::memcpy(&word, x + (line * R + r) * DWORD, DWORD);
          const __m512i all = _mm512_set1_epi32(word);
          sums[r][0] = add_product<F::INTEGER>(sums[r][0], weights[0][line], all);
          sums[r][1] = add_product<F::INTEGER>(sums[r][1], weights[1][line], all);
        }
    }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) part[2 * r] = sums[r][0], part[2 * r + 1] = sums[r][1];
}

template <class F, bool WIDE>
inline void multiply_rows(
    int64_t rows, const uint8_t* codes, const uint8_t* x, int64_t tiles, __m512i* part, Ahead& ahead) {
  using Pass = void (*)(const uint8_t*, const uint8_t*, int64_t, __m512i*, Ahead&);
  constexpr auto passes = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array<Pass, sizeof...(R)>{multiply<F, R + 1, WIDE>...};
  }(std::make_integer_sequence<int, MOST>{});
  passes[rows - 1](codes, x, tiles, part, ahead);
}

// totals (rows, 2) += scale * (the sums of a group - what they are too large by)
template <class F>
inline void add_scaled(__m512* totals, const __m512i* part, const float* scale, const int32_t* own, int64_t rows) {
  const __m512 scales[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + SIDE)};
  for (int64_t i = 0; i < 2 * rows; i++) {
    __m512 sum;
    const __m512i off = _mm512_set1_epi32(own[i / 2]);
    if constexpr (F::INTEGER) sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(part[i], off));
    else if constexpr (F::OFFSET != 0.0f) sum = _mm512_sub_ps(_mm512_castsi512_ps(part[i]), _mm512_castsi512_ps(off));
    else sum = _mm512_castsi512_ps(part[i]);
    totals[i] = _mm512_fmadd_ps(sum, scales[i % 2], totals[i]);
  }
}

inline void start(const Job& job, int64_t panel, __m512* totals) {
  for (int64_t i = 0; i < 2 * job.rows; i++)
    totals[i] = job.bias ? _mm512_loadu_ps(job.bias + panel * PANEL + i % 2 * SIDE) : _mm512_setzero_ps();
}

inline void finish(const Job& job, int64_t panel, const __m512* totals) {
  const int64_t from = panel * PANEL, count = std::clamp<int64_t>(job.out - from, 0, PANEL);
  const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  for (int64_t r = 0; r < job.rows; r++) {
    const __m512bh line = _mm512_cvtne2ps_pbh(totals[2 * r + 1], totals[2 * r]);
    _mm512_mask_storeu_epi16(job.y + r * job.out + from, inside, reinterpret_cast<const __m512i&>(line));
  }
}

// All rows against one panel. ``part`` and ``totals``: (rows, 2) each.
template <class F>
void take_panel(const Job& job, int64_t panel, uint8_t* room, __m512i* part, __m512* totals) {
  const bool wide = F::WIDENED && (job.passes > 1 || job.rows > DIRECT);
  const uint8_t* codes = job.codes + panel * job.bytes;
  start(job, panel, totals);
  int64_t at = 0;  // input
  for (int64_t g = 0; g < job.groups; g++) {
    std::fill(part, part + 2 * job.rows, _mm512_setzero_si512());
    for (const int64_t end = at + job.group; at < end;) {
      const int64_t inputs = std::min(PIECE, end - at), tiles = inputs / F::K, bytes = tiles * 2 * F::BYTES;
      if constexpr (F::WIDENED)
        if (wide) widen<F>(codes, 2 * tiles * SIDE, room);
      // The next piece of this panel or, the panels being neighbours, of the next one; one more if they are small.
      const uint8_t* next = std::min(codes + bytes, job.codes + job.panels * job.bytes);
      const int64_t fours = tiles * SIDE / 4 * job.passes;
      Ahead ahead{next, std::min(next + bytes, job.codes + job.panels * job.bytes), padded((bytes + fours - 1) / fours, LINE)};
      for (int64_t pass = 0; pass < job.passes; pass++) {
        const int64_t row = job.first(pass), rows = job.first(pass + 1) - row;
        const uint8_t* x = job.x + (row * job.in + at * rows) * (DWORD / line_inputs<F>);
        if (wide) multiply_rows<F, true>(rows, room, x, tiles, part + 2 * row, ahead);
        else multiply_rows<F, false>(rows, codes, x, tiles, part + 2 * row, ahead);
      }
      codes += bytes, at += inputs;
    }
    add_scaled<F>(totals, part, job.scale + (g * job.panels + panel) * PANEL, job.own + g * job.rows, job.rows);
  }
  finish(job, panel, totals);
}

uint8_t* aligned(std::vector<uint8_t>& room, int64_t bytes) {
  if (static_cast<int64_t>(room.size()) < bytes + LINE) room.resize(bytes + LINE);
  return reinterpret_cast<uint8_t*>(padded(reinterpret_cast<int64_t>(room.data()), LINE));
}

template <class F>
void run(const Job& job) {
  const int64_t work = PANEL * job.in * job.rows, grain = std::max<int64_t>(1, 262144 / work);
  at::parallel_for(0, job.panels, grain, [&](int64_t from, int64_t to) {
    static thread_local std::vector<uint8_t> memory;
    const int64_t wide = F::WIDENED ? PIECE * PANEL * 2 : 0, sums = job.rows * 2 * LINE;
    uint8_t* room = aligned(memory, wide + 2 * sums);
    __m512i* part = reinterpret_cast<__m512i*>(room + wide);
    for (int64_t panel = from; panel < to; panel++)
      take_panel<F>(job, panel, room, part, reinterpret_cast<__m512*>(part + 2 * job.rows));
  });
}

// ---- x --------------------------------------------------------------------------------------------------------------

struct Input {
  const c10::BFloat16* x;
  int64_t width;
  const float* pre;
  Rounding rounding;
  float inverse;
};

// The sum of the numbers of a group, in one order; 16 at a time, so that a group is a multiple of 32.
inline float total(const float* line, int64_t count) {
  __m512 even = _mm512_setzero_ps(), odd = even;
  for (int64_t k = 0; k < count; k += 32) {
    even = _mm512_add_ps(even, _mm512_loadu_ps(line + k));
    odd = _mm512_add_ps(odd, _mm512_loadu_ps(line + k + 16));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// One row: into ``line`` as it will be multiplied, into ``words`` as its bytes.
template <class F>
void lay_row(const Job& job, const Input& in, const c10::BFloat16* x, float* line, int32_t* words, int32_t* own) {
  take(x, in.pre, in.rounding, in.inverse, 1.0f, in.width, line);
  std::fill(line + in.width, line + job.in, 0.0f);
  for (int64_t k = 0; k < job.in; k += 32, words += 32 / line_inputs<F>) {
    const __m512 low = _mm512_loadu_ps(line + k), high = _mm512_loadu_ps(line + k + 16);
    if constexpr (F::INTEGER) {
      const auto put = [&](__m512 numbers, int64_t at) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(words + at), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers)));
      };
      put(low, 0), put(high, 4);
    } else {
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      const __m512i& bits = reinterpret_cast<const __m512i&>(both);
      _mm512_storeu_si512(words, bits);
      if (F::OFFSET != 0.0f && in.pre != nullptr) {  // rounded
        _mm512_storeu_ps(line + k, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16)));
        _mm512_storeu_ps(line + k + 16, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16)));
      }
    }
  }
  for (int64_t g = 0; F::OFFSET != 0.0f && g < job.groups; g++) {
    if constexpr (F::INTEGER) {
      int64_t sum = 0;
      for (int64_t k = 0; k < job.group; k++) sum += static_cast<int64_t>(line[g * job.group + k]);
      own[g * job.rows] = static_cast<int32_t>(sum * static_cast<int64_t>(F::OFFSET));
    } else {
      const float off = F::OFFSET * total(line + g * job.group, job.group);
      std::memcpy(own + g * job.rows, &off, 4);
    }
  }
}

template <class F>
void lay(const Job& job, const Input& in, uint8_t* x, int32_t* own) {
  const int64_t words = job.in / line_inputs<F>;
  at::parallel_for(0, job.passes, std::max<int64_t>(1, 8192 / job.in), [&](int64_t from, int64_t end) {
    static thread_local std::vector<float> line;
    static thread_local std::vector<int32_t> bytes;
    line.resize(job.in), bytes.resize(words * MOST);
    for (int64_t pass = from; pass < end; pass++) {
      const int64_t row = job.first(pass), rows = job.first(pass + 1) - row;
      int32_t* to = reinterpret_cast<int32_t*>(x) + row * words;
      for (int64_t r = 0; r < rows; r++)
        lay_row<F>(job, in, in.x + (row + r) * in.width, line.data(), bytes.data() + r * words, own + row + r);
      for (int64_t w = 0; w < words; w++)
        for (int64_t r = 0; r < rows; r++) to[w * rows + r] = bytes[r * words + w];
    }
  });
}

// ---- operators ------------------------------------------------------------------------------------------------------

template <class F>
void multiply_as(Job job, Input in, int64_t tokens, uint16_t* y) {
  job.in = padded(in.width, F::K), job.bytes = job.in / F::K * 2 * F::BYTES;
  TORCH_CHECK(job.in % job.groups == 0 && job.in / job.groups % F::K == 0, "trtkit_cpu: groups of no whole tiles");
  job.group = job.in / job.groups;
  // As many rows at a time as half of a second-level cache holds.
  const int64_t row_bytes = job.in / line_inputs<F> * DWORD;
  const int64_t most = std::max<int64_t>(8 * MOST, (int64_t{1} << 19) / row_bytes / MOST * MOST);
  static thread_local std::vector<uint8_t> memory;
  static thread_local std::vector<int32_t> own;
  own.resize(job.groups * std::min(most, tokens));
  uint8_t* laid = aligned(memory, std::min(most, tokens) * row_bytes);
  job.x = laid, job.own = own.data();
  const c10::BFloat16* x = in.x;
  for (int64_t first = 0; first < tokens; first += most) {
    job.rows = std::min(most, tokens - first), job.passes = (job.rows + MOST - 1) / MOST;
    in.x = x + first * in.width, job.y = y + first * job.out;
    lay<F>(job, in, laid, own.data());
    run<F>(job);
  }
}

enum Kind : int64_t { BF16 = 0, INT8 = 1, INT8_CODES = 2, FP8 = 3, INT4 = 4 };

auto for_kind(int64_t kind, const auto& call) {
  switch (kind) {
    case BF16: return call(Bf16{});
    case INT8: return call(Int8{});
    case INT8_CODES: return call(Int8Codes{});
    case FP8: return call(Fp8{});
    default: TORCH_CHECK(kind == INT4, "trtkit_cpu: unknown format"); return call(Int4{});
  }
}

// codes from ``pack_dots``; scale (G, N padded); bias (N padded); pre_scale (K).
Tensor linear_dots(
    const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& pre_scale, int64_t kind, int64_t out, int64_t rounding, double inverse) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kBFloat16, "trtkit_cpu: bfloat16 (T, K) only");
  Tensor y = at::empty({x.size(0), out}, x.options());
  Job job{};
  job.codes = codes.data_ptr<uint8_t>();
  job.scale = scale.data_ptr<float>();
  job.bias = bias ? bias->data_ptr<float>() : nullptr;
  job.out = out, job.panels = scale.size(1) / PANEL, job.groups = scale.size(0);
  const Input in{
      x.data_ptr<c10::BFloat16>(), x.size(1), pre_scale ? pre_scale->data_ptr<float>() : nullptr,
      static_cast<Rounding>(rounding), static_cast<float>(inverse)};
  for_kind(kind, [&](auto format) {
    using F = decltype(format);
    TORCH_CHECK(
        codes.numel() == job.panels * 2 * (padded(in.width, F::K) / F::K) * F::BYTES,
        "trtkit_cpu: codes of another shape");
    multiply_as<F>(job, in, x.size(0), reinterpret_cast<uint16_t*>(y.data_ptr<c10::BFloat16>()));
  });
  return y;
}

// (N, K) as int16 (bits of bf16), int8 (codes of 8 or 4 bits) or uint8 (bits of e4m3) -> the panels' bytes.
Tensor pack_dots(const Tensor& weight, int64_t kind) {
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2);
  TORCH_CHECK(weight.element_size() == (kind == BF16 ? 2 : 1), "trtkit_cpu: weights of another type");
  return for_kind(kind, [&](auto format) { return pack_panels<decltype(format)>(weight); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("pack_dots(Tensor weight, int kind) -> Tensor", pack_dots);
  m.def(
      "linear_dots(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? pre_scale, int kind, int out,"
      " int rounding, float inverse) -> Tensor",
      linear_dots);
  m.def("dots_ready() -> bool", [] { return true; });
}
#else
TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("dots_ready() -> bool", [] { return false; });
}
#endif
