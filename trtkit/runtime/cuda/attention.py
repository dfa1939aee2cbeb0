"""Verify attention on a GPU: write the nodes' keys and values, attend over the blocks, split along the cache.

Two launches (flash decoding, https://pytorch.org/blog/flash-decoding/). The first gives every (row, KV head, split) to
one program: it walks its stretch of slots in tiles, with the query heads of the KV head folded into query rows, and
leaves max, sum and weighted values. The second folds the splits of each query row in order.

Nothing depends on host values but the shapes, so a CUDA graph can replay a step. Tiles and splits lie at fixed slots:
a row's bits depend neither on the rows beside it nor on the width of the block table, and a chain that is verified
gives the bits of plain decoding while its query rows fit one tensor-core tile shape.

Letters: R rows, N nodes, B blocks of the widest row, D head_dim, g = heads / kv_heads, M = N * g query rows.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.runtime.cuda.batch import CudaVerifyBatch
from trtkit.runtime.cuda.dependent import FUSED, dependent, started
from trtkit.runtime.kv_cache import KvCache

__all__ = ["attend_split", "attend_verify_triton", "combine_splits", "split_shape"]

_TILE = 32
"""Slots of a tile. Registers allow three or four programs on a multiprocessor, enough reads in flight for its share of
the memory's bandwidth."""
_STAGES = 5
"""The pipeliner's: two tiles in shared memory at a time, as a tile's addresses wait for the block table."""
_COMBINED = 32
"""Splits that the second launch folds at once."""


def split_shape(query_rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """(query rows of a program, slots of a split), powers of two, for M query rows.

    Tensor cores ask for 16 rows; above 64 the accumulators spill, and the rows are tiled. float32 is multiplied without
    them and has spilled 60 KB a thread at 64: no GPU has the memory behind that. A split leaves M * D partial sums
    behind: the more query rows, the longer it should be. Never of the batch or its lengths: bits depend on it.
    """
    tile_m = min(max(16, triton.next_power_of_2(query_rows)), 16 if dtype == torch.float32 else 64)
    return tile_m, 256 if tile_m <= 32 else 512


@triton.jit
def _tiles(keys, values, blocks, slot, end, d, like, block_size: tl.constexpr, head_dim: tl.constexpr):
    """Keys and values (S, D) at the slots before ``end``, in the dtype of ``like``; their scale is for the sums."""
    place = tl.load(blocks + slot // block_size, mask=slot < end, other=0).to(tl.int64) * block_size
    where = (place + slot % block_size)[:, None] * head_dim + d[None, :]
    real = (slot < end)[:, None] & (d < head_dim)[None, :]
    tile_k = tl.load(keys + where, mask=real, other=0.0)
    tile_v = tl.load(values + where, mask=real, other=0.0)
    return tile_k.to(like.dtype), tile_v.to(like.dtype)


@triton.jit
def _encoded(x, scale, stored: tl.constexpr):
    """As ``KvCache._encode``: the codes of fresh keys or values."""
    if stored == tl.int8:
        # Adding 1.5 * 2^23 rounds to an integer, ties to even, in float32.
        steps = tl.minimum(tl.maximum(tl.div_rn(x.to(tl.float32), scale), -128.0), 127.0)
        codes = ((steps + 12582912.0) - 12582912.0).to(tl.int8)
    elif stored == tl.float8e4nv:
        steps = tl.div_rn(x.to(tl.float32), scale)
        codes = tl.minimum(tl.maximum(steps, -448.0), 448.0).to(tl.float8e4nv)
    else:
        codes = x.to(stored)
    return codes


@triton.jit
def _write_nodes(
    k, v, key_scale, value_scale, keys, values, slots, first, end, k_stride, v_stride, d, head_dim: tl.constexpr
):
    """Store the row's slots ``first`` to ``end``. k, v and ``slots`` point to where slot 0 would be.

    Every program that reads a node writes it itself, query tiles of one stretch the same numbers: none waits for
    another.
    """
    for at in range(first, end, 16):
        slot = (at + tl.arange(0, 16)).to(tl.int64)  # times a stride of 7168, 2^31 is passed at 300,000 tokens
        fresh = (slot < end)[:, None] & (d < head_dim)[None, :]
        where = tl.load(slots + slot, mask=slot < end, other=0)[:, None] * head_dim + d[None, :]
        new_k = tl.load(k + slot[:, None] * k_stride + d[None, :], mask=fresh, other=0.0)
        new_v = tl.load(v + slot[:, None] * v_stride + d[None, :], mask=fresh, other=0.0)
        tl.store(keys + where, _encoded(new_k, key_scale, keys.dtype.element_ty), mask=fresh)
        tl.store(values + where, _encoded(new_v, value_scale, values.dtype.element_ty), mask=fresh)


@triton.jit
def _absorb(query, keys, values, seen, top, norm, acc, scale):
    """Take one tile into the running max (M,), sums (M, S) and weighted values (M, D). ``seen`` (M, S) or a scalar.

    The sums over S wait for the end: each would make the warps wait for one another.
    """
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # Nothing seen yet: any finite number keeps exp2(-inf - higher) at 0.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - finite[:, None])
    fade = tl.exp2(top - finite)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return higher, norm * fade[:, None] + weights, acc


# Nothing that changes from step to step makes a new variant: a CUDA graph must not meet the compiler.
@triton.jit(
    do_not_specialize=["table_width", "mask_row", "mask_node", "nodes", "splits", "m_tiles"],
    do_not_specialize_on_alignment=["table", "cached", "mask", "slots", "tops", "norms"],
)
def attend_split(
    q, k, v, key_pool, value_pool, table, cached, mask, slots, sums, tops, norms,
    q_stride, k_stride, v_stride, pool_stride, table_width, mask_row, mask_node, nodes, splits, m_tiles,
    key_scale, value_scale, softmax_scale,
    group: tl.constexpr, head_dim: tl.constexpr, block_size: tl.constexpr,
    tile_m: tl.constexpr, tile_s: tl.constexpr, tile_d: tl.constexpr, split: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """One (split, query tile), KV head and row. Writes the fresh keys and values of its slots on the way.

    sums (R, kv_heads, splits, M, D), tops and norms (R, kv_heads, splits, M), all float32; tops in units of log2.
    """
    started(early)
    part = tl.program_id(0) // m_tiles
    m_tile = tl.program_id(0) % m_tiles
    head = tl.program_id(1)
    row = tl.program_id(2)
    before = tl.load(cached + row).to(tl.int32)
    total = before + nodes
    start = part * split
    if start >= total:
        return
    end = tl.minimum(start + split, total)
    line = m_tile * tile_m + tl.arange(0, tile_m)
    node = line // group
    d = tl.arange(0, tile_d)
    asked = (node < nodes)[:, None] & (d < head_dim)[None, :]
    at_q = (row * nodes + node) * q_stride + (head * group + line % group) * head_dim
    query = tl.load(q + at_q[:, None] + d[None, :], mask=asked, other=0.0)
    if key_pool.dtype.element_ty.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        # float16 holds 8-bit codes, rounds the weights finer, and is one instruction away on every GPU with fp8.
        query = query.to(tl.float16)
    keys = key_pool + head.to(tl.int64) * pool_stride
    values = value_pool + head.to(tl.int64) * pool_stride
    blocks = table + row * table_width
    scale = key_scale * softmax_scale
    top = tl.full((tile_m,), float("-inf"), tl.float32)
    norm = tl.zeros((tile_m, tile_s), tl.float32)
    acc = tl.zeros((tile_m, tile_d), tl.float32)

    if end > before:
        shift = (row * nodes - before).to(tl.int64)  # from a slot to its node's token
        _write_nodes(
            k + shift * k_stride + head * head_dim, v + shift * v_stride + head * head_dim, key_scale, value_scale,
            keys, values, slots + shift, tl.maximum(start, before), end, k_stride, v_stride, d, head_dim,
        )  # fmt: skip
        tl.debug_barrier()

    # Tiles of cached slots only: everything is seen.
    own = tl.minimum(end, before // tile_s * tile_s)
    for at in range(start, own, tile_s):
        slot = at + tl.arange(0, tile_s)
        tile_k, tile_v = _tiles(keys, values, blocks, slot, own, d, query, block_size, head_dim)
        top, norm, acc = _absorb(query, tile_k, tile_v, True, top, norm, acc, scale)

    # The last tiles: cached slots, then the nodes.
    for at in tl.range(tl.maximum(start, own), end, tile_s, num_stages=1):
        slot = at + tl.arange(0, tile_s)
        tile_k, tile_v = _tiles(keys, values, blocks, slot, end, d, query, block_size, head_dim)
        other = slot - before
        at_mask = row * mask_row + node[:, None] * mask_node + other[None, :]
        is_node = (other >= 0) & (slot < end)
        related = tl.load(mask + at_mask, mask=(node < nodes)[:, None] & is_node[None, :], other=0) != 0
        top, norm, acc = _absorb(query, tile_k, tile_v, (other < 0)[None, :] | related, top, norm, acc, scale)

    at_part = ((row * tl.num_programs(1) + head) * splits + part).to(tl.int64) * (nodes * group) + line
    tl.store(tops + at_part, top, mask=node < nodes)
    tl.store(norms + at_part, tl.sum(norm, 1), mask=node < nodes)
    tl.store(sums + at_part[:, None] * head_dim + d[None, :], acc, mask=asked)


@triton.jit(do_not_specialize=["nodes", "splits"], do_not_specialize_on_alignment=["tops", "norms", "cached"])
def combine_splits(
    out, sums, tops, norms, cached, nodes, splits, value_scale,
    group: tl.constexpr, head_dim: tl.constexpr, tile_d: tl.constexpr, split: tl.constexpr, chunk: tl.constexpr,
    early: tl.constexpr = False,
):  # fmt: skip
    """One query head of one node: fold its splits, ``chunk`` at a time, in order of their slots."""
    started(early)
    head = tl.program_id(0)
    token = tl.program_id(1)
    row = token // nodes
    line = (token % nodes) * group + head % group
    used = (tl.load(cached + row).to(tl.int32) + nodes + split - 1) // split
    first = (row * (tl.num_programs(0) // group) + head // group).to(tl.int64) * splits
    d = tl.arange(0, tile_d)
    top = tl.full((1,), float("-inf"), tl.float32)
    norm = tl.zeros((1,), tl.float32)
    acc = tl.zeros((tile_d,), tl.float32)
    for at in range(0, used, chunk):
        part = at + tl.arange(0, chunk)
        place = (first + part) * (nodes * group) + line
        tops_here = tl.load(tops + place, mask=part < used, other=float("-inf"))
        norms_here = tl.load(norms + place, mask=part < used, other=0.0)
        real = (part < used)[:, None] & (d < head_dim)[None, :]
        sums_here = tl.load(sums + place[:, None] * head_dim + d[None, :], mask=real, other=0.0)
        higher = tl.maximum(top, tl.max(tops_here, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(tops_here - finite)
        fade = tl.exp2(top - finite)
        norm = norm * fade + tl.sum(norms_here * share, 0)
        acc = acc * fade + tl.sum(sums_here * share[:, None], 0)
        top = higher
    # A node that sees nothing, itself included, gives 0.
    result = acc / tl.where(norm == 0.0, 1.0, norm) * value_scale
    at_out = (token * tl.num_programs(0) + head) * head_dim
    tl.store(out + at_out + d, result.to(out.dtype.element_ty), mask=d < head_dim)


def attend_verify_triton(cache: KvCache, layer: int, batch: CudaVerifyBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As :func:`trtkit.runtime.attention.attend_verify`: q (R * N, heads, D), k and v (R * N, kv_heads, D), which may
    be strided along their tokens, -> (R * N, heads * D)."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    for x in (q, k, v):
        assert x.stride()[1:] == (head_dim, 1)
    assert batch.blocks.is_contiguous()
    mask = batch.mask.to(torch.int32)
    assert batch.nodes == 1 or mask.stride(2) == 1
    group = heads // kv_heads
    lines = batch.nodes * group
    key_pool, value_pool = cache.pools(layer)
    key_scale, value_scale = cache.scales(layer)
    tile_m, split = split_shape(lines, q.dtype)
    splits = -(-batch.blocks.shape[1] * cache.block_size // split)
    m_tiles = -(-lines // tile_m)
    tile_d = max(16, triton.next_power_of_2(head_dim))
    stats = torch.empty(2, batch.rows, kv_heads, splits, lines, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch.rows, kv_heads, splits, lines, head_dim, dtype=torch.float32, device=q.device)
    out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    attend_split[(splits * m_tiles, kv_heads, batch.rows)](
        q, k, v, key_pool, value_pool, batch.blocks, batch.cached, mask, batch.slots, sums, stats[0], stats[1],
        q.stride(0), k.stride(0), v.stride(0), key_pool.stride(0), batch.blocks.stride(0), mask.stride(0),
        mask.stride(1), batch.nodes, splits, m_tiles, key_scale, value_scale, head_dim**-0.5 * math.log2(math.e),
        group=group, head_dim=head_dim, block_size=cache.block_size, tile_m=tile_m, tile_s=_TILE,
        tile_d=tile_d, split=split, num_warps=4, num_stages=_STAGES, **FUSED, **dependent(q.device),
    )  # fmt: skip
    combine_splits[(heads, tokens)](
        out, sums, stats[0], stats[1], batch.cached, batch.nodes, splits, value_scale,
        group=group, head_dim=head_dim, tile_d=tile_d, split=split, chunk=_COMBINED, num_warps=4, **FUSED,
        **dependent(q.device),
    )  # fmt: skip
    return out
