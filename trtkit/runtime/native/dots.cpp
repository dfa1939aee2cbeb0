// The matrix product y (T, N) = x (T, K) W^T on a CPU whose vectors multiply pairs of bf16 or fours of bytes and add them
// up (AVX512 with BF16 and VNNI, no matrix units). With VNNI alone there are int8 weights and codes of x only.
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
constexpr int DIRECT = 2;       // passes that each widen codes on the way; more of them leave them in the room
// Inputs of a panel multiplied with all rows before the next ones. Widened they fit into the first-level cache.
template <class F>
constexpr int64_t PIECE = F::WIDENED ? 256 : 1024;
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
    for (int64_t asked = 0; asked < each && at < end; asked += LINE, at += LINE) _mm_prefetch(at, _MM_HINT_T1);
  }
};

template <class F>
inline constexpr int64_t line_inputs = F::K / SIDE;

// A sum without what it is too large by, ``own``: the bits of a float where sums are.
template <class F>
inline __m512 exact(__m512i sum, int32_t own) {
  if constexpr (F::INTEGER) return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(own)));
  const __m512 number = _mm512_castsi512_ps(sum);
  return F::OFFSET == 0.0f ? number : _mm512_sub_ps(number, _mm512_castsi512_ps(_mm512_set1_epi32(own)));
}

template <bool INTEGER>
inline __m512i add_product(__m512i sum, __m512i weights, __m512i x) {
  if constexpr (INTEGER) return _mm512_dpbusd_epi32(sum, weights, x);
  const __m512 added = _mm512_dpbf16_ps(
      _mm512_castsi512_ps(sum), reinterpret_cast<const __m512bh&>(weights), reinterpret_cast<const __m512bh&>(x));
  return _mm512_castps_si512(added);
}

// A piece of a panel, all that a pass needs of it.
struct Piece {
  const uint8_t* codes;
  int64_t tiles;   // pairs of them
  uint8_t* room;   // for its weights as bf16
  bool first, last;  // of a group
  const float* scale;
};

enum Source { CODES, CODES_TO_ROOM, ROOM };  // where weights come from; they may be left for the passes that follow

// totals (R, 2) += x times a piece; sums of a group that is not complete wait in ``part``.
template <class F, int R, Source FROM>
void multiply(const Piece& piece, const uint8_t* x, const int32_t* own, __m512i* part, __m512* totals, Ahead& ahead) {
  using From = std::conditional_t<FROM == ROOM, Bf16, F>;
  constexpr int64_t BYTES = From::LINES * From::BYTES / SIDE;  // of one load
  const uint8_t* codes = FROM == ROOM ? piece.room : piece.codes;
  uint8_t* room = piece.room;
  __m512i sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
    for (int side = 0; side < 2; side++) sums[r][side] = piece.first ? _mm512_setzero_si512() : part[2 * r + side];
  for (int64_t t = 0; t < piece.tiles; t++, codes += From::BYTES, room += TILE)
    for (int64_t at = 0; at < SIDE; at += 4) {
      ahead.some();
#pragma GCC unroll 4
      for (int load = 0; load < 4; load += From::LINES, codes += BYTES) {
        const auto left = From::hold(codes), right = From::hold(codes + From::BYTES);
        const auto take = [&]<int I>() __attribute__((always_inline)) {
          const __m512i weights[2] = {From::template line<I>(left), From::template line<I>(right)};
          if constexpr (FROM == CODES_TO_ROOM) {
            _mm512_store_si512(room, weights[0]);
            _mm512_store_si512(room + TILE, weights[1]);
            room += LINE;
          }
#pragma GCC unroll 12
          for (int r = 0; r < R; r++, x += DWORD) {
            int32_t word;
            std::memcpy(&word, x, DWORD);
            const __m512i all = _mm512_set1_epi32(word);
            sums[r][0] = add_product<F::INTEGER>(sums[r][0], weights[0], all);
            sums[r][1] = add_product<F::INTEGER>(sums[r][1], weights[1], all);
          }
        };
        [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
          (take.template operator()<I>(), ...);
        }(std::make_integer_sequence<int, From::LINES>{});
      }
    }
  if (piece.last) {
    const __m512 scales[2] = {_mm512_loadu_ps(piece.scale), _mm512_loadu_ps(piece.scale + SIDE)};
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
      for (int side = 0; side < 2; side++)
        totals[2 * r + side] = _mm512_fmadd_ps(exact<F>(sums[r][side], own[r]), scales[side], totals[2 * r + side]);
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
      for (int side = 0; side < 2; side++) part[2 * r + side] = sums[r][side];
  }
}

template <class F, Source FROM>
inline void multiply_rows(
    int64_t rows, const Piece& piece, const uint8_t* x, const int32_t* own, __m512i* part, __m512* totals, Ahead& ahead) {
  using Pass = void (*)(const Piece&, const uint8_t*, const int32_t*, __m512i*, __m512*, Ahead&);
  constexpr int LEAST = FROM == CODES ? 1 : MOST * DIRECT / (DIRECT + 1);  // more than DIRECT passes share the rows evenly
  static constexpr auto passes = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<Pass, sizeof...(I)>{multiply<F, LEAST + I, FROM>...};
  }(std::make_integer_sequence<int, MOST - LEAST + 1>{});
  passes[rows - LEAST](piece, x, own, part, totals, ahead);
}

// To nearest even.
inline __m512i to_bf16(__m512 low, __m512 high) {
#ifdef TRTKIT_BF16_DOTS
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  return reinterpret_cast<const __m512i&>(both);
#else
  const auto half = [](__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i out = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(half(low)), half(high), 1);
#endif
}

inline void start(const Job& job, int64_t panel, __m512* totals) {
  for (int64_t i = 0; i < 2 * job.rows; i++)
    totals[i] = job.bias ? _mm512_loadu_ps(job.bias + panel * PANEL + i % 2 * SIDE) : _mm512_setzero_ps();
}

inline void finish(const Job& job, int64_t panel, const __m512* totals) {
  const int64_t from = panel * PANEL, count = std::clamp<int64_t>(job.out - from, 0, PANEL);
  const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  for (int64_t r = 0; r < job.rows; r++)
    _mm512_mask_storeu_epi16(job.y + r * job.out + from, inside, to_bf16(totals[2 * r], totals[2 * r + 1]));
}

// All rows against one panel. ``part`` and ``totals``: (rows, 2) each.
template <class F>
void take_panel(const Job& job, int64_t panel, uint8_t* room, __m512i* part, __m512* totals) {
  const uint8_t *codes = job.codes + panel * job.bytes, *end = job.codes + job.panels * job.bytes;
  start(job, panel, totals);
  for (int64_t g = 0, at = 0; g < job.groups; g++) {
    const int32_t* own = job.own + g * job.rows;
    for (const int64_t from = at, upto = at + job.group; at < upto;) {
      const int64_t inputs = std::min(PIECE<F>, upto - at), tiles = inputs / F::K, bytes = tiles * 2 * F::BYTES;
      const Piece piece{codes, tiles, room, at == from, at + inputs == upto, job.scale + (g * job.panels + panel) * PANEL};
      // What comes next, in this panel or, they being neighbours, in the next one.
      const int64_t fours = tiles * SIDE / 4 * job.passes;
      Ahead ahead{std::min(codes + bytes, end), std::min(codes + 2 * bytes, end), padded((bytes + fours - 1) / fours, LINE)};
      for (int64_t pass = 0; pass < job.passes; pass++) {
        const int64_t row = job.first(pass), rows = job.first(pass + 1) - row;
        const uint8_t* x = job.x + (row * job.in + at * rows) * (DWORD / line_inputs<F>);
        const auto multiply_from = [&]<Source FROM>() {
          multiply_rows<F, FROM>(rows, piece, x, own + row, part + 2 * row, totals + 2 * row, ahead);
        };
        if (!F::WIDENED || job.passes <= DIRECT) multiply_from.template operator()<CODES>();
        else if constexpr (F::WIDENED) {
          if (pass == 0) multiply_from.template operator()<CODES_TO_ROOM>();
          else multiply_from.template operator()<ROOM>();
        }
      }
      codes += bytes, at += inputs;
    }
  }
  finish(job, panel, totals);
}

template <class F>
void run(const Job& job) {
  const int64_t work = PANEL * job.in * job.rows, grain = std::max<int64_t>(1, 524288 / work);
  at::parallel_for(0, job.panels, grain, [&](int64_t from, int64_t to) {
    static thread_local std::vector<uint8_t> memory;
    const int64_t wide = F::WIDENED ? PIECE<F> * PANEL * 2 : 0, sums = job.rows * 2 * LINE;
    uint8_t* room = aligned(memory, wide + 2 * sums);
    __m512i* part = reinterpret_cast<__m512i*>(room + wide);
    for (int64_t panel = from; panel < to; panel++)
      take_panel<F>(job, panel, room, part, reinterpret_cast<__m512*>(part + 2 * job.rows));
  });
}

// ---- x --------------------------------------------------------------------------------------------------------------

struct Input {
  const c10::BFloat16* x;
  int64_t rows, width;
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
      const __m512i bits = to_bf16(low, high);
      _mm512_storeu_si512(words, bits);
      if (F::OFFSET != 0.0f && in.pre != nullptr) {  // the sums are of the rounded numbers
        const auto put = [&](__m256i half, int64_t at) {
          _mm512_storeu_si512(line + k + at, _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        };
        put(_mm512_castsi512_si256(bits), 0), put(_mm512_extracti64x4_epi64(bits, 1), 16);
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
void multiply_as(Job job, Input in, uint16_t* y) {
  job.in = padded(in.width, F::K), job.bytes = job.in / F::K * 2 * F::BYTES;
  TORCH_CHECK(job.in % job.groups == 0 && job.in / job.groups % F::K == 0, "trtkit_cpu: groups of no whole tiles");
  job.group = job.in / job.groups;
  // As many rows at a time as half of a second-level cache holds.
  const int64_t row_bytes = job.in / line_inputs<F> * DWORD, tokens = in.rows;
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

auto for_kind(int64_t kind, const auto& call) {
  switch (kind) {
#ifdef TRTKIT_BF16_DOTS
    case BF16: return call(Bf16{});
    case INT8: return call(Int8{});
    case FP8: return call(Fp8{});
    case INT4: return call(Int4{});
#endif
    default: TORCH_CHECK(kind == INT8_CODES, "trtkit_cpu: no product for this format"); return call(Int8Codes{});
  }
}

bool dots_ready(int64_t kind) {
#ifdef TRTKIT_BF16_DOTS
  return kind >= BF16 && kind <= INT4;
#else
  return kind == INT8_CODES;
#endif
}

// codes from ``pack_dots``; scale (G, N padded); bias (N padded); pre_scale (K).
Tensor linear_dots(
    const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& pre_scale, int64_t kind, int64_t out, int64_t rounding, double inverse) {
  const auto multiply = [&](const Job& job, const Input& in, uint16_t* y) {
    for_kind(kind, [&](auto format) {
      check_codes<decltype(format)>(codes, job.panels, in.width);
      multiply_as<decltype(format)>(job, in, y);
    });
  };
  return product<Job, Input>(x, codes, scale, bias, pre_scale, out, rounding, inverse, multiply);
}

// (N, K) as int16 (bits of bf16), int8 (codes of 8 or 4 bits) or uint8 (bits of e4m3) -> the panels' bytes.
Tensor pack_dots(const Tensor& weight, int64_t kind) {
  return for_kind(kind, [&](auto format) { return pack_panels<decltype(format)>(weight); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("pack_dots(Tensor weight, int kind) -> Tensor", pack_dots);
  m.def(
      "linear_dots(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? pre_scale, int kind, int out,"
      " int rounding, float inverse) -> Tensor",
      linear_dots);
  m.def("dots_ready(int kind) -> bool", dots_ready);
}
#else
TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("dots_ready(int kind) -> bool", [](int64_t) { return false; });
}
#endif
