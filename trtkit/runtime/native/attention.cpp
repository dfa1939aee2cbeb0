// Attention over the block table, without a copy of the cache.
#include <optional>
#include <type_traits>

#include "attention_tiles.h"

namespace {

constexpr int64_t MOST = W == 16 ? 8 : 6;  // queries whose sums fit into the registers

// Scores of P queries against W keys. Each query has two sums, whatever P is: a single chain of additions would wait for
// itself, and its order must not depend on the company.
template <int P>
inline void score_part(const float* queries, const float* turned, int64_t dim, float* out, int64_t stride) {
  vec even[P] = {}, odd[P] = {};
  for (int64_t d = 0; d < dim; d += 2) {
    const vec first = load(turned + d * W), second = load(turned + (d + 1) * W);
    for (int p = 0; p < P; p++) {
      even[p] += first * queries[p * dim + d];
      odd[p] += second * queries[p * dim + d + 1];
    }
  }
  for (int p = 0; p < P; p++) store(out + p * stride, even[p] + odd[p]);
}

inline void score(const float* queries, const float* turned, int64_t count, int64_t dim, float* out, int64_t stride) {
  for (int64_t q = 0; q < count; q += MOST) {
    const float* from = queries + q * dim;
    float* to = out + q * stride;
    switch (std::min(count - q, MOST)) {
      case 1: score_part<1>(from, turned, dim, to, stride); break;
      case 2: score_part<2>(from, turned, dim, to, stride); break;
      case 3: score_part<3>(from, turned, dim, to, stride); break;
      case 4: score_part<4>(from, turned, dim, to, stride); break;
      case 5: score_part<5>(from, turned, dim, to, stride); break;
      case 6: score_part<6>(from, turned, dim, to, stride); break;
      case 7: score_part<7>(from, turned, dim, to, stride); break;
      default: score_part<8>(from, turned, dim, to, stride);
    }
  }
}

// result (D) += the sum over W keys of weight x value
template <int P>
inline void blend_part(const float* weights, const float* values, int64_t dim, float* result) {
  vec part[P];
  for (int p = 0; p < P; p++) part[p] = load(result + p * W);
  for (int s = 0; s < W; s++) {
    for (int p = 0; p < P; p++) part[p] += load(values + s * dim + p * W) * weights[s];
  }
  for (int p = 0; p < P; p++) store(result + p * W, part[p]);
}

inline void blend(const float* weights, const float* values, int64_t dim, float* result) {
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) blend_part<4>(weights, values + d, dim, result + d);
  for (; d < dim; d += W) blend_part<1>(weights, values + d, dim, result + d);
}

// Queries (group, nodes, D), scaled, of one row and KV head -> result of the same shape.
template <typename E>
void attend_head(const Work<E>& work, const Shape& shape, const float* queries, float* result, std::vector<float>& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  room.resize(count * (SPAN + 2) + dim * W);
  float *scores = room.data(), *top = scores + count * SPAN, *mass = top + count, *turned = mass + count;  // later: the values
  std::fill(result, result + count * dim, 0.0f);
  std::fill(top, top + count, LOWEST);
  std::fill(mass, mass + count, 0.0f);
  for (int64_t start = 0; start < work.length; start += SPAN) {
    const int64_t end = std::min(start + SPAN, work.length), whole = (end - start + W - 1) / W * W;
    for (int64_t slot = start; slot < end; slot += W) {
      const int64_t block = work.table[slot / shape.block], offset = slot % shape.block;
      transpose(work.keys + (block * shape.block + offset) * dim, dim, turned);
      score(queries, turned, count, dim, scores + (slot - start), SPAN);
    }
    for (int64_t q = 0; q < count; q++) {
      const bool* dark = work.hidden + (q % shape.nodes) * work.slots + start;
      const float keep = weigh(scores + q * SPAN, dark, end - start, whole, top + q, mass + q);
      if (keep != 1.0f) {
        for (int64_t d = 0; d < dim; d++) result[q * dim + d] *= keep;
      }
    }
    for (int64_t slot = start; slot < end; slot += W) {
      const int64_t block = work.table[slot / shape.block], offset = slot % shape.block;
      const E* values = work.values + (block * shape.block + offset) * dim;
      for (int64_t i = 0; i < dim * W; i += W) store(turned + i, load(values + i));
      for (int64_t q = 0; q < count; q++) blend(scores + q * SPAN + (slot - start), turned, dim, result + q * dim);
    }
  }
  for (int64_t q = 0; q < count; q++) {
    const float scale = 1.0f / mass[q];
    for (int64_t d = 0; d < dim; d++) result[q * dim + d] *= scale;
  }
}

// The matrix units, where they fit: ``run`` says whether it has done the work.
struct Tiles {
#ifdef TRTKIT_TILES
  std::optional<trtkit::Configured> shapes;
  std::vector<const bf16*> queries;
  TileRoom room;
  Tiles(const Shape& shape, bool fits) {
    if (fits && tiles_attend(shape)) shapes.emplace(std::initializer_list<int>{}, SIDE);
  }
  bool run(const Work<bf16>& work, const Shape& shape, const auto& source, float scale, float* result) {
    if (!shapes) return false;
    queries.clear();
    for (int64_t g = 0; g < shape.group; g++)
      for (int64_t n = 0; n < shape.nodes; n++) queries.push_back(source(g, n));
    attend_head_tiles(work, shape, queries.data(), scale, result, room);
    return true;
  }
#else
  Tiles(const Shape&, bool) {}
#endif
  bool run(const auto&...) { return false; }
};

inline int64_t seen(const bool* hidden, int64_t nodes, int64_t slots) {
  int64_t length = 0;
  for (int64_t n = 0; n < nodes; n++) {
    int64_t last = slots;
    while (last > length && hidden[n * slots + last - 1]) last--;
    length = std::max(length, last);
  }
  return length;
}

// Write k and v at their slots, then attend over the block table.
// q (R * N, heads, D), k and v (R * N, kv_heads, D): views of one qkv matrix. keys, values (kv_heads, blocks, block * D).
// table (R, B), slots (R * N), hidden (R, N, S) -> (R * N, heads * D)
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
              const Tensor& table, const Tensor& slots, const Tensor& hidden) {
  const int64_t rows = hidden.size(0), nodes = hidden.size(1), width = hidden.size(2), heads = q.size(1), dim = q.size(2);
  const int64_t kv_heads = k.size(1), group = heads / kv_heads, blocks = keys.size(1), block = keys.size(2) / dim;
  TORCH_CHECK(dim % W == 0 && block % W == 0 && width == table.numel() / rows * block && q.size(0) == rows * nodes);
  for (const Tensor* x : {&q, &k, &v}) TORCH_CHECK(x->stride(2) == 1 && x->stride(1) == dim);
  for (const Tensor* x : {&keys, &values, &table, &slots, &hidden}) TORCH_CHECK(x->is_contiguous());
  TORCH_CHECK(keys.scalar_type() == q.scalar_type() && values.scalar_type() == q.scalar_type());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type());
  Tensor out = at::empty({rows * nodes, heads * dim}, q.options());
  const int64_t *listed = table.data_ptr<int64_t>(), *place = slots.data_ptr<int64_t>();
  const bool* dark = hidden.data_ptr<bool>();
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for_type(q, [&](auto tag) {
    using E = decltype(tag);
    const E *query = q.data_ptr<E>(), *fresh_k = k.data_ptr<E>(), *fresh_v = v.data_ptr<E>();
    E *pool_k = keys.data_ptr<E>(), *pool_v = values.data_ptr<E>(), *y = out.data_ptr<E>();
    const Shape shape{nodes, group, kv_heads, dim, block, table.numel() / rows, q.stride(0)};
    // A piece holds about 2^16 multiply-adds at least.
    const int64_t piece = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, group * nodes * width * dim * 2));
    at::parallel_for(0, rows * kv_heads, piece, [&](int64_t from, int64_t to) {
      std::vector<float> room, work(2 * group * nodes * dim);
      float *queries = work.data(), *result = queries + group * nodes * dim;
      [[maybe_unused]] Tiles tiles(shape, std::is_same_v<E, bf16>);
      for (int64_t task = from; task < to; task++) {
        const int64_t row = task / kv_heads, head = task % kv_heads, plane = head * blocks * block * dim;
        for (int64_t n = 0; n < nodes; n++) {
          const int64_t token = row * nodes + n, at = plane + place[token] * dim;
          std::memcpy(pool_k + at, fresh_k + token * k.stride(0) + head * dim, dim * sizeof(E));
          std::memcpy(pool_v + at, fresh_v + token * v.stride(0) + head * dim, dim * sizeof(E));
        }
        const bool* mine = dark + row * nodes * width;
        const Work<E> job{pool_k + plane, pool_v + plane, listed + row * shape.blocks_per_row, mine,
                          width, seen(mine, nodes, width)};
        const auto source = [&](int64_t g, int64_t n) {
          return query + (row * nodes + n) * q.stride(0) + (head * group + g) * dim;
        };
        if (!tiles.run(job, shape, source, scale, result)) {
          for (int64_t g = 0; g < group; g++)
            for (int64_t n = 0; n < nodes; n++)
              for (int64_t d = 0; d < dim; d += W)
                store(queries + (g * nodes + n) * dim + d, load(source(g, n) + d) * scale);
          attend_head(job, shape, queries, result, room);
        }
        for (int64_t n = 0; n < nodes; n++) {
          for (int64_t g = 0; g < group; g++) {
            E* target = y + (row * nodes + n) * heads * dim + (head * group + g) * dim;
            const float* sums = result + (g * nodes + n) * dim;
            for (int64_t d = 0; d < dim; d += W) store(target + d, load(sums + d));
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor slots, Tensor hidden)"
      " -> Tensor",
      attend);
}
