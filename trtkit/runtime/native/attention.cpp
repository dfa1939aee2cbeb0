// Attention over the block table, without a copy of the cache.
#include <optional>
#include <type_traits>

#include "attention_dots.h"
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

// Q pointers to queries (group, nodes) of one row and KV head -> room.result.
template <typename E>
void attend_head(const Work<E>& work, const Shape& shape, const E* const* queries, float scale, Room& room) {
  const int64_t count = shape.group * shape.nodes, dim = shape.dim;
  room.resize(count, dim), room.scratch.resize((count + W) * dim);
  float *scaled = room.scratch, *turned = scaled + count * dim;  // 16 slots: keys, later values
  for (int64_t q = 0; q < count; q++)
    for (int64_t d = 0; d < dim; d += W) store(scaled + q * dim + d, load(queries[q] + d) * scale);
  const auto score_keys = [&](int64_t start, int64_t end) {
    for (int64_t slot = start; slot < end; slot += W) {
      transpose(work.at(work.keys, slot, shape), dim, turned);
      score(scaled, turned, count, dim, room.lines + (slot - start), SPAN);
    }
  };
  const auto blend_values = [&](int64_t start, int64_t end) {
    for (int64_t slot = start; slot < end; slot += W) {
      const E* values = work.at(work.values, slot, shape);
      for (int64_t i = 0; i < dim * W; i += W) store(turned + i, load(values + i));
      for (int64_t q = 0; q < count; q++)
        blend(room.lines + q * SPAN + (slot - start), turned, dim, room.result + q * dim);
    }
  };
  attend_spans(work, shape, room, score_keys, blend_values);
}

// By the best kernel that fits. ``after``: the work that comes next.
template <typename E>
void attend_best(const Work<E>& work, [[maybe_unused]] const Work<E>& after, const Shape& shape, const E* const* queries,
                 float scale, Room& room) {
  if constexpr (std::is_same_v<E, bf16>) {
#ifdef TRTKIT_TILES
    if (tiles_attend(shape)) return attend_head_tiles(work, shape, queries, scale, room);
#endif
#ifdef TRTKIT_BF16_DOTS
    if (dots_attend(shape)) return attend_head_dots(work, after, shape, queries, scale, room);
#endif
  }
  attend_head(work, shape, queries, scale, room);
}

inline int64_t seen(const bool* hidden, int64_t nodes, int64_t slots) {
  int64_t length = 0;
  for (int64_t n = 0; n < nodes; n++) {
    int64_t last = slots;
    while (last > length && hidden[n * slots + last - 1]) last--;
    length = std::max(length, last);
  }
  return length;
}

// Whether two rows in a row have one table: parts of one text, of which the later look at what the earlier write.
inline bool texts_in_parts(const int64_t* table, int64_t rows, int64_t width) {
  for (int64_t row = 1; row < rows; row++)
    if (std::equal(table + (row - 1) * width, table + row * width, table + row * width)) return true;
  return false;
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
    const Shape shape{nodes, group, dim, block, table.numel() / rows};
    const auto plane = [&](int64_t task) { return task % kv_heads * blocks * block * dim; };
    const auto write = [&](int64_t task) {
      for (int64_t token = task / kv_heads * nodes, end = token + nodes; token < end; token++) {
        const int64_t at = plane(task) + place[token] * dim, head = task % kv_heads;
        std::memcpy(pool_k + at, fresh_k + token * k.stride(0) + head * dim, dim * sizeof(E));
        std::memcpy(pool_v + at, fresh_v + token * v.stride(0) + head * dim, dim * sizeof(E));
      }
    };
    // Rows of their own write as they go: what a thread has just written it need not get from another core.
    const bool first = texts_in_parts(listed, rows, shape.blocks_per_row);
    if (first) {
      at::parallel_for(0, rows * kv_heads, std::max<int64_t>(1, 65536 / (nodes * dim)), [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; task++) write(task);
      });
    }
    // A piece holds about 2^16 multiply-adds at least.
    const int64_t piece = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, group * nodes * width * dim * 2));
    at::parallel_for(0, rows * kv_heads, piece, [&](int64_t from, int64_t to) {
      Room room;
      std::vector<const E*> queries(group * nodes);
      const auto work_of = [&](int64_t task) {
        const int64_t row = task / kv_heads;
        const bool* mine = dark + row * nodes * width;
        return Work<E>{pool_k + plane(task), pool_v + plane(task), listed + row * shape.blocks_per_row, mine,
                       width, seen(mine, nodes, width)};
      };
#ifdef TRTKIT_TILES
      std::optional<trtkit::Configured> units;  // while this thread works
      if (std::is_same_v<E, bf16> && tiles_attend(shape)) units.emplace(std::initializer_list<int>{}, SIDE);
#endif
      Work<E> work = work_of(from);
      for (int64_t task = from; task < to; task++) {
        const int64_t row = task / kv_heads, head = task % kv_heads;
        if (!first) write(task);
        for (int64_t n = 0; n < nodes; n++)
          for (int64_t g = 0; g < group; g++)
            queries[g * nodes + n] = query + (row * nodes + n) * q.stride(0) + (head * group + g) * dim;
        const Work<E> after = task + 1 < to ? work_of(task + 1) : work;
        attend_best(work, after, shape, queries.data(), scale, room);
        work = after;
        for (int64_t n = 0; n < nodes; n++) {
          for (int64_t g = 0; g < group; g++) {
            E* target = y + (row * nodes + n) * heads * dim + (head * group + g) * dim;
            const float* sums = room.result + (g * nodes + n) * dim;
            for (int64_t d = 0; d < dim; d += W) store(target + d, load(sums + d));
          }
        }
      }
    });
  });
  return out;
}

// Where nodes go that follow what each row has in the cache: blocks (R, B), cached (R,), depth (R, N), mask (R, N, N) ->
// slots (R * N,), positions (R * N,), and hidden (R, N, S): what each must not look at.
std::tuple<Tensor, Tensor, Tensor> place_nodes(
    const Tensor& blocks, const Tensor& cached, const Tensor& depth, const Tensor& mask, int64_t block) {
  const int64_t rows = depth.size(0), nodes = depth.size(1), width = blocks.size(1) * block;
  Tensor slots = at::empty({rows * nodes}, cached.options()), positions = at::empty({rows * nodes}, cached.options());
  Tensor hidden = at::empty({rows, nodes, width}, mask.options());
  const auto table = blocks.accessor<int64_t, 2>(), deep = depth.accessor<int64_t, 2>();
  const auto have = cached.accessor<int64_t, 1>();
  const auto seen = mask.accessor<bool, 3>();
  int64_t *slot = slots.data_ptr<int64_t>(), *position = positions.data_ptr<int64_t>();
  bool* dark = hidden.data_ptr<bool>();
  for (int64_t r = 0; r < rows; r++) {
    const int64_t first = have[r];
    TORCH_CHECK(first >= 0 && first + nodes <= width, "trtkit_cpu: nodes beyond the block table");
    for (int64_t n = 0; n < nodes; n++, dark += width) {
      const int64_t place = first + n;
      *slot++ = table[r][place / block] * block + place % block;
      *position++ = first + deep[r][n];
      std::fill(dark, dark + first, false), std::fill(dark + first, dark + width, true);
      for (int64_t j = 0; j < nodes; j++) dark[first + j] = !seen[r][n][j];
    }
  }
  return {slots, positions, hidden};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(trtkit_cpu, m) {
  m.def(
      "place_nodes(Tensor blocks, Tensor cached, Tensor depth, Tensor mask, int block) -> (Tensor, Tensor, Tensor)",
      place_nodes);
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor table, Tensor slots, Tensor hidden)"
      " -> Tensor",
      attend);
}
