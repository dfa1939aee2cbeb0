// The matrix product y (T, N) = x (T, K) W^T on a CPU with matrix units (AMX): bf16 and int8 tiles.
//
// A decode step reads every weight once and does little with it, so weights lie in memory in the order in which tiles
// are loaded, as small as they are stored. bf16 and int8 go from memory into tiles. x meets int8 weights as integers
// too: as codes (W8A8), or in three digits, whose sums are exact. int4 and e4m3 codes are widened to bf16 on the way, a
// step ahead in the first-level cache, for many rows a whole panel once. Scales multiply the sums, a group behind: both
// run beside the multiplications.
//
// The sum of a row over K has one order, whatever the number of rows: a row's result depends on nothing else.
//
// Letters: T tokens, N output features, K input features, G groups of K.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tile_registers.h"

#ifdef TRTKIT_TILES
#include <optional>

#include "huge_pages.h"
#include "tile_input.h"
#include "tile_steps.h"

namespace {

using at::Tensor;
using namespace trtkit;
using namespace trtkit::tiles;

// All that it calls becomes part of it: captured variables stay in registers.
#define FLAT __attribute__((flatten))

struct Job {
  const uint8_t* codes;
  const float *scale, *bias;  // scale (G, N padded) of the sum of a group; bias (N padded) or null
  int64_t out, panels, steps, group, groups;  // steps of K in all and in a group
  const uint8_t* x;                            // tiles, as ``lay_rows`` lays them
  const float* own;                            // as in ``Input``
  int64_t line, rows;
  uint16_t* y;
};

inline void start(const Job& job, int64_t panel, float* totals, int64_t stride, int64_t rows) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 a = job.bias ? _mm512_loadu_ps(job.bias + panel * PANEL) : zero;
  const __m512 b = job.bias ? _mm512_loadu_ps(job.bias + panel * PANEL + SIDE) : zero;
  for (int64_t r = 0; r < rows; r++, totals += stride) _mm512_store_ps(totals, a), _mm512_store_ps(totals + SIDE, b);
}

inline void finish(const Job& job, int64_t panel, const float* totals, int64_t stride, int64_t row, int64_t rows) {
  const int64_t from = panel * PANEL, count = std::clamp<int64_t>(job.out - from, 0, PANEL);
  const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  for (int64_t r = 0; r < rows; r++, totals += stride) {
    const __m512bh line = _mm512_cvtne2ps_pbh(_mm512_load_ps(totals + SIDE), _mm512_load_ps(totals));
    _mm512_mask_storeu_epi16(job.y + (row + r) * job.out + from, inside, reinterpret_cast<const __m512i&>(line));
  }
}

// All steps, group by group: ``step(s, turn)`` multiplies one. The sums of a group are in ``part`` after the first step of
// the next and added, ``add(group, from row, to row)``, a share of the rows with each of its steps.
inline void in_groups(const Job& job, int64_t rows, uint8_t* part, const auto& step, const auto& add) {
  const int64_t share = (rows + job.group - 1) / job.group;
  for (int64_t g = 0, s = 0; g < job.groups; g++) {
    Turn turn = g ? ANOTHER_GROUP : FIRST;
    int64_t done = g ? 0 : rows;  // of the group before
    for (const int64_t end = s + job.group; s < end; s++, turn = GOES_ON) {
      step(s, turn);
      const int64_t upto = std::min(done + share, rows);
      if (done < upto) add(g - 1, done, upto);
      done = upto;
    }
  }
  store_sums(part);
  add(job.groups - 1, 0, rows);
}

// Rows that fill one tile at the most, against two panels. ``room``: of two steps.
template <class F>
FLAT void narrow(const Job& job, int64_t pair, uint8_t* room) {
  alignas(64) float totals[SIDE * 2 * PANEL];
  alignas(64) uint8_t part[4 * TILE];
  const int64_t bytes = job.steps * 2 * F::BYTES;
  Stream streams[2];
  for (int p = 0; p < 2; p++) {
    const uint8_t* codes = job.codes + (2 * pair + p) * bytes;
    streams[p] = {codes, codes + 2 * bytes, bytes};
    start(job, 2 * pair + p, totals + p * PANEL, 2 * PANEL, job.rows);
  }
  const auto add = [&](int64_t g, int64_t from, int64_t to) {
    for (int p = 0; p < 2; p++)
      add_scaled<F>(
          totals + (2 * from + p) * PANEL, 2 * PANEL, part + p * 2 * TILE + from * 64, job.rows * 64,
          job.scale + (g * job.panels + 2 * pair + p) * PANEL, job.own + g * job.line + from, to - from);
  };
  const auto take = [&](int64_t s, int64_t i) { take_tile<F>(streams[i / 2], 2 * s + i % 2, job.steps, room, 4 * (s % 2) + i); };
  for (int64_t i = 0; F::WIDENED && i < 4; i++) take(0, i);
  in_groups(job, job.rows, part, [&](int64_t s, Turn turn) {
    const auto weights = [&](int p) {
      return F::WIDENED ? room + (4 * (s % 2) + 2 * p) * TILE : streams[p].codes + s * 2 * TILE;
    };
    narrow_step<F::INTEGER>(turn, part, job.x + s * TILE, weights(0), weights(1), [&](int64_t i) { take(s + 1, i); });
  }, add);
  for (int p = 0; p < 2; p++) finish(job, 2 * pair + p, totals + p * PANEL, 2 * PANEL, 0, job.rows);
}

// Up to 32 rows from ``row`` on against one panel, whose weights are in memory or, ``ready``, widened in the room.
template <class F>
FLAT void square(const Job& job, int64_t panel, int64_t row, uint8_t* room, bool ready) {
  alignas(64) float totals[PANEL * PANEL];
  alignas(64) uint8_t part[4 * TILE];
  const int64_t rows = std::min(job.rows - row, 2 * SIDE), bytes = job.steps * 2 * F::BYTES, apart = job.steps * TILE;
  const Stream stream{job.codes + panel * bytes, job.codes + (panel + 1) * bytes, bytes};
  const uint8_t* x = job.x + row / SIDE * apart;
  start(job, panel, totals, PANEL, rows);
  const auto add = [&](int64_t g, int64_t from, int64_t to) {  // rows 16 and above have tiles of their own
    const float *scale = job.scale + (g * job.panels + panel) * PANEL, *own = job.own + g * job.line + row;
    for (int64_t side = 0; side < 2; side++) {
      const int64_t first = std::max(from, side * SIDE), last = std::min(to, (side + 1) * SIDE);
      add_scaled<F>(
          totals + first * PANEL, PANEL, part + (side * SIDE + first) * 64, 0, scale, own + first, last - first);
    }
  };
  const bool here = F::WIDENED && !ready;  // to be widened on the way
  const auto take = [&](int64_t s, int64_t i) { take_tile<F>(stream, 2 * s + i, job.steps, room, 2 * (s % 2) + i); };
  for (int64_t i = 0; here && i < 2; i++) take(0, i);
  in_groups(job, rows, part, [&](int64_t s, Turn turn) {
    const uint8_t* weights = here ? room + 2 * (s % 2) * TILE : (F::WIDENED ? room : stream.codes) + s * 2 * TILE;
    square_step<F::INTEGER>(turn, part, x + s * TILE, apart, weights, [&](int64_t i) {
      if (here || (!F::WIDENED && row == 0)) take(s + 1, i);
    });
  }, add);
  finish(job, panel, totals, PANEL, row, rows);
}

// Up to 16 rows from ``row`` on, in digits, against one panel.
void tall(const Job& job, int64_t panel, int64_t row) {
  alignas(64) float totals[SIDE * PANEL];
  alignas(64) uint8_t part[6 * TILE];  // low, middle and high digits, each for both halves of the panel
  const int64_t rows = std::min(job.rows - row, SIDE), bytes = job.steps * 2 * TILE;
  const Stream stream{job.codes + panel * bytes, job.codes + (panel + 1) * bytes, bytes};
  start(job, panel, totals, PANEL, rows);
  for (int64_t side = 0; side < 2; side++) {
    const auto soon = [&](int64_t s) {
      if (row == 0) fetch(stream.ahead((s * 2 + side) * TILE), TILE);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    tall_steps(job.x + row * job.steps * 3 * 64, stream.codes + side * TILE, job.steps, soon);
    _tile_stored(0, part + side * TILE, 64);
    _tile_stored(1, part + side * TILE + 2 * TILE, 64);
    _tile_stored(2, part + side * TILE + 4 * TILE, 64);
  }
  add_scaled<Int8>(totals, PANEL, part, 2 * TILE, job.scale + panel * PANEL, job.own + row, rows);
  finish(job, panel, totals, PANEL, row, rows);
}

template <class F>
void run(const Job& job) {
  const int64_t work = UNIT * job.steps * F::K * job.rows, grain = std::max<int64_t>(1, 262144 / work);
  // Two panels, of every thread's share.
  const auto for_pairs = [&](const auto& piece) { at::parallel_for(0, job.panels / 2, grain, piece); };
  static thread_local std::vector<uint8_t> memory;
  if (one_tile<F>(job.rows)) {
    for_pairs([&](int64_t from, int64_t to) {
      const Configured tiles({0, 1, 2, 3, 4}, job.rows * DIGITS<F>);
      uint8_t* room = aligned(memory, F::WIDENED ? 8 * TILE : 0);
      for (int64_t pair = from; pair < to; pair++) narrow<F>(job, pair, room);
    });
  } else if constexpr (DIGITS<F> > 1) {
    for_pairs([&](int64_t from, int64_t to) {
      const Configured tiles({0, 1, 2, 3, 4, 5}, std::min(job.rows, SIDE));
      for (int64_t panel = 2 * from; panel < 2 * to; panel++)
        for (int64_t row = 0; row < job.rows; row += SIDE) tall(job, panel, row);
    });
  } else {
    const bool ready = job.rows > 2 * SIDE;
    for_pairs([&](int64_t from, int64_t to) {
      const Configured tiles({2, 3, 5}, ready ? SIDE : job.rows - SIDE);
      uint8_t* room = aligned(memory, !F::WIDENED ? 0 : (ready ? job.steps : 2) * 2 * TILE);
      for (int64_t panel = 2 * from; panel < 2 * to; panel++) {
        if constexpr (F::WIDENED)
          if (ready) {
            const int64_t bytes = job.steps * 2 * F::BYTES;
            const Stream stream{job.codes + panel * bytes, job.codes + (panel + 1) * bytes, bytes};
            for (int64_t tile = 0; tile < 2 * job.steps; tile++) take_tile<F>(stream, tile, job.steps, room, tile);
          }
        for (int64_t row = 0; row < job.rows; row += 2 * SIDE) square<F>(job, panel, row, room, ready);
      }
    });
  }
}

template <class F>
void multiply_as(Job job, Input in, uint16_t* y) {
  job.steps = in.steps = padded(in.width, F::K) / F::K;
  TORCH_CHECK(job.steps % job.groups == 0, "trtkit_cpu: groups of no whole steps");
  job.group = job.steps / job.groups;
  // As many rows at a time as half of a second-level cache holds.
  const int64_t row_bytes = job.steps * 64 * DIGITS<F>, tokens = in.rows, out = job.out;
  const int64_t most = std::max<int64_t>(64, (int64_t{1} << 20) / row_bytes / 32 * 32);
  static thread_local std::vector<uint8_t> memory;
  static thread_local std::vector<float> own;
  in.tiles = aligned(memory, std::max(padded(std::min(most, tokens), 2 * SIDE), SIDE) * row_bytes);
  in.group = job.group, in.line = job.line = std::min(most, tokens);
  own.resize(job.groups * in.line);
  in.own = own.data();
  job.x = in.tiles, job.own = in.own;
  const c10::BFloat16* x = in.x;
  for (int64_t first = 0; first < tokens; first += most) {
    job.rows = in.rows = std::min(most, tokens - first);
    in.x = x + first * in.width, job.y = y + first * out;
    lay_rows<F>(in);
    settle();
    run<F>(job);
  }
}

auto for_kind(int64_t kind, const auto& call) {
  switch (kind) {
    case BF16: return call(Bf16{});
    case INT8: return call(Int8{});
    case INT8_CODES: return call(Int8Codes{});
    case FP8: return call(Fp8{});
    default: TORCH_CHECK(kind == INT4, "trtkit_cpu: unknown format"); return call(Int4{});
  }
}

// codes from ``pack_tiles``; scale (G, N padded); bias (N padded); pre_scale (K).
Tensor linear_tiles(
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

// (N, K) as int16 (bits of bf16), int8 (codes of 8 or 4 bits) or uint8 (bits of e4m3) -> the tiles' bytes.
Tensor pack_tiles(const Tensor& weight, int64_t kind) {
  TORCH_CHECK(tiles_ready(), "trtkit_cpu: the system gives no tile registers");
  return for_kind(kind, [&](auto format) { return pack_panels<decltype(format)>(weight); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("pack_tiles(Tensor weight, int kind) -> Tensor", pack_tiles);
  m.def(
      "linear_tiles(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? pre_scale, int kind, int out,"
      " int rounding, float inverse) -> Tensor",
      linear_tiles);
  m.def("tiles_ready() -> bool", tiles_ready);
}
#else
TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("tiles_ready() -> bool", [] { return false; });
}
#endif
