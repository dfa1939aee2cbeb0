// Logits to tokens: trtkit/runtime/sampling.py's weights, cuts and inverse CDF, bit for bit.
//
// Compiled without fused multiply-adds: the float32 part of a weight is a fixed sequence of rounded operations. The rest
// is integer arithmetic, and weights never fall as logits grow, so that a block's largest logit bounds its weights.
#include "vectors.h"

#include <array>
#include <cmath>
#include <vector>

namespace {

// 8 floats, not 16: GCC compares and selects vectors wider than a register one element at a time.
typedef float oct __attribute__((vector_size(32)));
typedef int32_t ioct __attribute__((vector_size(32)));
typedef uint64_t lquad __attribute__((vector_size(32)));
typedef float oct_in_memory __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t hoct_in_memory __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint64_t lquad_in_memory __attribute__((vector_size(32), aligned(8), may_alias));

constexpr int64_t LANES = 8;
constexpr int64_t BLOCK = 128;
constexpr int64_t LARGEST = int64_t{1} << 40;
constexpr float DEAD = -40.0f;

struct Cuts {
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  int64_t floor;  // min_p of the largest weight, at least 1
};

inline oct load8(const float* p) { return *reinterpret_cast<const oct_in_memory*>(p); }
inline oct load8(const bf16* p) {
  return (oct)(__builtin_convertvector(*reinterpret_cast<const hoct_in_memory*>(p), ioct) << 16);
}
inline oct all8(float x) { return oct{} + x; }

struct Weights {
  lquad even, odd;  // of lanes 0, 2, 4, 6 and 1, 3, 5, 7: how 32-bit numbers widen without moving
};

inline lquad even(ioct x) { return (lquad)x & 0xffffffffu; }
inline lquad odd(ioct x) { return (lquad)x >> 32; }

inline void store8(int64_t* p, const Weights& weights) {
  *reinterpret_cast<lquad_in_memory*>(p) = __builtin_shufflevector(weights.even, weights.odd, 0, 4, 1, 5);
  *reinterpret_cast<lquad_in_memory*>(p + 4) = __builtin_shufflevector(weights.even, weights.odd, 2, 6, 3, 7);
}

// floor(2^40 e^x) for x <= 0: see ``_weights_of``.
inline Weights weights_of(oct x) {
  x = x > DEAD ? x : all8(DEAD);
  const oct n = (x * 1.4426950408889634f + 12582912.0f) - 12582912.0f;
  const oct r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  oct q = r * 0.0013814611593261361f;
  q = (q + 0.008368710987269878f) * r;
  q = (q + 0.04166838899254799f) * r;
  q = (q + 0.1666652113199234f) * r;
  const oct p = ((q + 0.4999999403953552f) * (r * r) + r) + 1.0f;
  const ioct whole = __builtin_convertvector(p * 16777216.0f, ioct), down = __builtin_convertvector(-n, ioct);
  return {even(whole) << 16 >> even(down), odd(whole) << 16 >> odd(down)};
}

// The logits of one row in blocks of 128, with the largest of each block. Reused from row to row.
template <typename E>
class Row {
 public:
  explicit Row(int64_t width) : width_(width), blocks_((width + BLOCK - 1) / BLOCK), peaks_(blocks_), limits_(blocks_ + LANES) {}

  // Largest logit of each block and of all. False where a logit is not a number.
  bool open(const E* logits) {
    logits_ = logits;
    ioct odd{};
    float peak = LOWEST;
    for (int64_t b = 0; b < blocks_; b++) {
      oct best = all8(LOWEST);
      each(b, [&](const oct& x, int64_t) {
        odd |= (x != x);
        best = x > best ? x : best;
      });
      float one = best[0];
      for (int j = 1; j < LANES; j++) one = best[j] > one ? best[j] : one;
      peaks_[b] = one;
      peak = std::max(peak, one);
    }
    peak_ = peak;
    bool wrong = false;
    for (int j = 0; j < LANES; j++) wrong |= odd[j] != 0;
    return !wrong;
  }

  // The first id of the largest logit.
  int64_t most_likely() const {
    const int64_t block = std::find(peaks_.begin(), peaks_.end(), peak_) - peaks_.begin();
    for (int64_t j = block * BLOCK; j < width_; j++) {
      if (wide(logits_[j]) == peak_) return j;
    }
    return 0;
  }

  int64_t draw(float temperature, double uniform, const Cuts& cuts) {
    temperature_ = temperature;
    top_ = peak_ / temperature;
    if (!std::isfinite(top_)) return 0;
    for (int64_t b = 0; b < blocks_; b += LANES) {
      oct x = all8(LOWEST);
      for (int64_t j = 0; j < std::min(LANES, blocks_ - b); j++) x[j] = peaks_[b + j];
      store8(limits_.data() + b, weights_of(x / temperature - top_));
    }
    return cuts.top_k == 0 && cuts.top_p == 1 && cuts.floor == 1 ? draw_all(uniform) : draw_cut(uniform, cuts);
  }

 private:
  // use(8 logits, their offset) over one block; beyond the vocabulary they are minus infinity.
  template <typename F>
  inline void each(int64_t block, F use) const {
    const int64_t start = block * BLOCK, end = std::min(start + BLOCK, width_);
    int64_t i = start;
    for (; i + LANES <= end; i += LANES) use(load8(logits_ + i), i - start);
    if (i < end) {
      oct rest = all8(LOWEST);
      for (int64_t j = 0; i + j < end; j++) rest[j] = wide(logits_[i + j]);
      use(rest, i - start);
    }
  }

  template <typename F>
  inline void each_weight(int64_t block, F use) const {
    if (temperature_ == 1.0f) {
      each(block, [&](const oct& x, int64_t at) { use(weights_of(x - top_), at); });
    } else {
      each(block, [&](const oct& x, int64_t at) { use(weights_of(x / temperature_ - top_), at); });
    }
  }

  int64_t sum_of(int64_t block) const {
    lquad total{};
    each_weight(block, [&](const Weights& weights, int64_t) { total += weights.even + weights.odd; });
    return static_cast<int64_t>(total[0] + total[1] + total[2] + total[3]);
  }

  int64_t sum_all() {
    sums_.assign(blocks_, 0);
    int64_t total = 0;
    for (int64_t b = 0; b < blocks_; b++) {
      if (limits_[b] > 0) total += sums_[b] = sum_of(b);
    }
    return total;
  }

  std::array<int64_t, BLOCK> weigh(int64_t block) const {
    std::array<int64_t, BLOCK> out{};
    each_weight(block, [&](const Weights& weights, int64_t at) { store8(out.data() + at, weights); });
    return out;
  }

  static int64_t share(double part, int64_t total) {
    return std::min(static_cast<int64_t>(part * static_cast<double>(total)), total - 1);
  }

  int64_t draw_all(double uniform) {
    int64_t rest = share(uniform, sum_all()), block = 0;
    while (rest >= sums_[block]) rest -= sums_[block++];
    const auto weights = weigh(block);
    int64_t j = 0;
    while (rest >= weights[j]) rest -= weights[j++];
    return block * BLOCK + j;
  }

  // All tokens of at least that weight, in the order of their ids.
  void collect(int64_t floor) {
    weights_.clear();
    ids_.clear();
    for (int64_t b = 0; b < blocks_; b++) {
      if (limits_[b] < floor) continue;
      const auto weights = weigh(b);
      const size_t before = weights_.size();
      weights_.resize(before + BLOCK);
      ids_.resize(before + BLOCK);
      size_t count = before;
      for (int64_t j = 0; j < BLOCK; j++) {
        weights_[count] = weights[j];
        ids_[count] = static_cast<int32_t>(b * BLOCK + j);
        count += weights[j] >= floor;
      }
      weights_.resize(count);
      ids_.resize(count);
    }
  }

  // The sum, or the number, of the collected weights from ``floor`` on.
  int64_t measure(bool count, int64_t floor) const {
    int64_t out = 0;
    for (const int64_t w : weights_) out += w < floor ? 0 : count ? 1 : w;
    return out;
  }

  // The largest threshold that leaves ``enough`` of the collected weights: 11 bits of it at a time.
  int64_t threshold(int64_t enough, bool count) const {
    std::array<int64_t, 2048> held;
    int64_t prefix = 0;
    for (int shift = 33; shift >= 0; shift -= 11) {
      held.fill(0);
      for (const int64_t w : weights_) {
        if (w >> shift >> 11 == prefix) held[(w >> shift) & 2047] += count ? 1 : w;
      }
      int64_t digit = 2047;
      while (digit > 0 && enough > held[digit]) enough -= held[digit--];
      prefix = prefix << 11 | digit;
    }
    return prefix;
  }

  // Collects until ``enough`` is there, or nothing above ``least`` is missing; then the threshold, at least ``least``.
  int64_t cut(int64_t enough, bool count, int64_t least) {
    for (int64_t floor = std::max(least, LARGEST >> 8);; floor = std::max(least, floor >> 8)) {
      collect(floor);
      if (measure(count, floor) >= enough) return threshold(enough, count);
      if (floor == least) return least;
    }
  }

  int64_t draw_cut(double uniform, const Cuts& cuts) {
    const bool by_mass = cuts.top_p < 1, by_count = cuts.top_k > 0 && cuts.top_k < width_;
    int64_t floor = by_count ? cut(cuts.top_k, true, by_mass ? 1 : cuts.floor) : 0;
    if (by_mass) {
      const int64_t total = by_count ? measure(false, floor) : sum_all();
      const double part = std::ceil(cuts.top_p * static_cast<double>(total));
      const int64_t enough = std::min(static_cast<int64_t>(part), total);
      floor = by_count ? threshold(enough, false) : cut(enough, false, cuts.floor);
    } else if (!by_count) {
      collect(cuts.floor);
    }
    floor = std::max(floor, cuts.floor);
    int64_t rest = share(uniform, measure(false, floor));
    for (size_t i = 0;; i++) {
      if (weights_[i] < floor) continue;
      if (rest < weights_[i]) return ids_[i];
      rest -= weights_[i];
    }
  }

  int64_t width_, blocks_;
  const E* logits_ = nullptr;
  float temperature_ = 1, peak_ = 0, top_ = 0;  // top_: peak_ over the temperature
  std::vector<float> peaks_;
  std::vector<int64_t> limits_, sums_, weights_;  // limits_: the largest weight of each block
  std::vector<int32_t> ids_;
};

// The finalizer of SplitMix64.
inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// float64 (M,) in [0, 1) from seeds (R,) and positions (M,): each seed is that of M / R positions in a row.
Tensor uniforms(const Tensor& seeds, const Tensor& positions) {
  constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
  const int64_t count = positions.numel(), each = count / std::max<int64_t>(1, seeds.numel());
  TORCH_CHECK(seeds.is_contiguous() && positions.is_contiguous() && each * seeds.numel() == count);
  Tensor out = at::empty({count}, positions.options().dtype(at::kDouble));
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  double* y = out.data_ptr<double>();
  for (int64_t i = 0; i < count; i++) {
    const uint64_t own = mixed(static_cast<uint64_t>(seed[i / each]) + GOLDEN);
    y[i] = static_cast<double>(mixed(own + static_cast<uint64_t>(position[i]) * GOLDEN) >> 11) * 0x1p-53;
  }
  return out;
}

// One token for each row of logits (M, V): the most likely where ``cold``, else the draw by ``uniform`` (M,) in [0, 1)
// inside the cuts. 0 for a row that has no distribution. The parameters are (R,): those of M / R rows in a row.
Tensor pick(const Tensor& logits, const Tensor& temperature, const Tensor& cold, const Tensor& uniform,
            const Tensor& top_k, const Tensor& top_p, const Tensor& min_p) {
  const int64_t rows = logits.size(0), width = logits.size(1);
  const int64_t each = rows / std::max<int64_t>(1, temperature.numel());
  TORCH_CHECK(logits.is_contiguous() && width > 0 && uniform.is_contiguous() && uniform.numel() == rows);
  for (const Tensor* x : {&temperature, &cold, &top_k, &top_p, &min_p}) {
    TORCH_CHECK(x->is_contiguous() && x->numel() * each == rows);
  }
  Tensor out = at::empty({rows}, logits.options().dtype(at::kLong));
  const float *heat = temperature.data_ptr<float>(), *mass = top_p.data_ptr<float>(), *least = min_p.data_ptr<float>();
  const bool* still = cold.data_ptr<bool>();
  const double* number = uniform.data_ptr<double>();
  const int64_t* count = top_k.data_ptr<int64_t>();
  int64_t* y = out.data_ptr<int64_t>();
  for_type(logits, [&](auto tag) {
    using E = decltype(tag);
    const E* x = logits.data_ptr<E>();
    at::parallel_for(0, rows, grain(8 * width), [&](int64_t from, int64_t to) {
      Row<E> row(width);
      for (int64_t r = from; r < to; r++) {
        const int64_t of = r / each;
        const double floor = std::ceil(static_cast<double>(least[of]) * static_cast<double>(LARGEST));
        const Cuts cuts{count[of], mass[of], std::max<int64_t>(1, static_cast<int64_t>(floor))};
        if (!row.open(x + r * width)) y[r] = 0;
        else y[r] = still[of] ? row.most_likely() : row.draw(heat[of], number[r], cuts);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def("uniforms(Tensor seeds, Tensor positions) -> Tensor", uniforms);
  m.def(
      "pick(Tensor logits, Tensor temperature, Tensor cold, Tensor uniform, Tensor top_k, Tensor top_p, Tensor min_p)"
      " -> Tensor",
      pick);
}
