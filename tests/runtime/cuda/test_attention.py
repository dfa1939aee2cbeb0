"""The CUDA attention against its definition: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.runtime.cuda.interpreting import correct_numerics
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.runtime.attention import VerifyBatch, attend_verify
from trtkit.runtime.cuda.attention import attend_verify_triton, combine_splits
from trtkit.runtime.cuda.batch import CudaVerifyBatch
from trtkit.runtime.kv_cache import KvCache
from trtkit.scheme import KvDtype

SIZE = 16
LAYER = 1
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}}


@pytest.fixture(autouse=True)
def _numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        correct_numerics(monkeypatch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 24
    nodes: int = 2
    dtype: torch.dtype = torch.float32
    kv_dtype: KvDtype = "model"


class Step(NamedTuple):
    """One verify step of rows with ``cached`` tokens; block 0 is the one that nobody reads."""

    cache: KvCache
    batch: CudaVerifyBatch
    qkv: tuple[Tensor, Tensor, Tensor]

    def run(self) -> Tensor:
        return attend_verify_triton(self.cache, LAYER, self.batch, *self.qkv)

    def defined(self) -> Tensor:
        """What the plain function makes of the same step, on a cache of its own."""
        batch, cached = self.batch, self.batch.cached.long()
        places = cached[:, None] + torch.arange(batch.nodes, device=cached.device)
        seen = torch.arange(batch.blocks.shape[1] * SIZE, device=cached.device)
        hidden = (seen >= cached[:, None])[:, None, :].repeat(1, batch.nodes, 1)
        hidden.scatter_(2, places[:, None, :].expand(-1, batch.nodes, -1), ~batch.mask)
        plain = VerifyBatch(
            rows=batch.rows, nodes=batch.nodes, blocks=batch.blocks.flatten().long(), slots=batch.slots,
            hidden_slots=hidden,
        )  # fmt: skip
        return attend_verify(self.cache, LAYER, plain, *self.qkv)

    def rows(self, *chosen: int) -> Step:
        """Only those rows, on the same cache."""
        index = torch.tensor(chosen, device=self.batch.cached.device)
        batch, nodes = self.batch, self.batch.nodes
        part = dataclasses.replace(
            batch, rows=len(chosen), blocks=batch.blocks[index], cached=batch.cached[index], mask=batch.mask[index],
            slots=batch.slots.view(-1, nodes)[index].flatten(),
        )  # fmt: skip
        q, k, v = (x.unflatten(0, (-1, nodes))[index].flatten(0, 1) for x in self.qkv)
        return Step(self.cache, part, (q, k, v))

    def wider(self, blocks: int) -> Step:
        """The same in a bucket for longer rows."""
        table = torch.nn.functional.pad(self.batch.blocks, (0, blocks))
        return self._replace(batch=dataclasses.replace(self.batch, blocks=table))


def step(device: torch.device, cached: list[int], shape: Shape, *, chain: bool = False) -> Step:
    """Random keys, values and trees; the cache of a layer is full of numbers, also where no row looks."""
    torch.manual_seed(0)
    rows, nodes = len(cached), shape.nodes
    width = -(-(max(cached) + nodes) // SIZE)
    spec = ModelSpec(
        family="qwen3", layers=2, hidden=64, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate=64, vocab=100, rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied=True,
        max_positions=512, dtype="bfloat16",
    )  # fmt: skip
    cache = KvCache(
        spec, blocks=rows * width + 1, block_size=SIZE, max_rows=rows, max_tokens=width * SIZE,
        kv_dtype=shape.kv_dtype, dtype=shape.dtype, device=device, scales=[(1.0, 1.0), (0.02, 0.03)],
    )  # fmt: skip

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes).to(device, shape.dtype)

    every = torch.arange((rows * width + 1) * SIZE, device=device)
    cache.write(LAYER, every, *(normal(len(every), shape.kv_heads, shape.head_dim) for _ in range(2)))
    blocks = 1 + torch.randperm(rows * width).view(rows, width)
    places = torch.tensor(cached)[:, None] + torch.arange(nodes)
    slots = blocks.gather(1, places // SIZE) * SIZE + places % SIZE
    related = torch.ones(rows, nodes, nodes).bool() if chain else torch.rand(rows, nodes, nodes) < 0.5
    batch = CudaVerifyBatch(
        rows=rows, nodes=nodes, blocks=blocks.to(device), cached=torch.tensor(cached, device=device),
        mask=(related.tril() | torch.eye(nodes).bool()).to(device), slots=slots.flatten().to(device),
    )  # fmt: skip
    # q, k and v are views of one matrix, as the layer hands them in.
    parts = normal(rows * nodes, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = torch.split(parts, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    return Step(cache, batch, (q, k, v))


def codes(cache: KvCache) -> tuple[Tensor, ...]:
    return tuple(pool.view(torch.uint8).clone() for pool in cache.pools(LAYER))


def check(device: torch.device, cached: list[int], shape: Shape) -> None:
    """The outputs within rounding, the stored keys and values bit for bit."""
    found, expected = step(device, cached, shape), step(device, cached, shape)
    torch.testing.assert_close(found.run(), expected.defined(), **TOLERANCE[shape.dtype])
    for mine, theirs in zip(codes(found.cache), codes(expected.cache), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, "model"), (torch.bfloat16, "model"), (torch.float32, "fp8"), (torch.float32, "int8")],
)
def test_it_is_the_plain_attention(device: torch.device, dtype: torch.dtype, kv_dtype: KvDtype) -> None:
    """Rows without a cache, within a block, over a block's and over a split's edge; a head size that is padded."""
    check(device, [0, 30, 255], Shape(dtype=dtype, kv_dtype=kv_dtype))


def test_offsets_of_fresh_keys_need_64_bits(device: torch.device) -> None:
    """Slot times stride reaches 2^31: at 32 slots with this stride, at 300,000 with a 14B model's."""
    shape, cached, stride = Shape(nodes=1), [32, 32], 1 << 26
    made = step(device, cached, shape)
    q, *fresh = made.qkv
    room = torch.empty(stride + 2 * shape.head_dim, dtype=shape.dtype, device=device)  # hardly any of it is touched
    k, v = (room.as_strided(x.shape, (stride, *x.stride()[1:]), at * shape.head_dim) for at, x in enumerate(fresh))
    for far, near in zip((k, v), fresh, strict=True):
        far.copy_(near)
    found = made._replace(qkv=(q, k, v)).run()
    torch.testing.assert_close(found, step(device, cached, shape).defined(), **TOLERANCE[shape.dtype])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", [
    Shape(heads=4, kv_heads=2, head_dim=16, nodes=9, dtype=torch.bfloat16, kv_dtype="int8"),
    Shape(heads=4, kv_heads=2, head_dim=32, nodes=17),
    Shape(heads=10, kv_heads=2, head_dim=64, nodes=13),
    Shape(heads=3, kv_heads=1, head_dim=128, nodes=1, dtype=torch.bfloat16, kv_dtype="fp8"),
], ids=str)  # fmt: skip
def test_trees_and_heads_of_other_sizes(device: torch.device, shape: Shape) -> None:
    """Among them more query rows than one program takes, and more nodes than it writes at once."""
    check(device, [3, 0, 250, 300, 511, 512], shape)


def test_a_row_depends_neither_on_its_neighbours_nor_on_the_bucket(device: torch.device) -> None:
    whole = step(device, [270, 1, 40], Shape())
    together = whole.run().unflatten(0, (3, -1))
    assert torch.equal(whole.rows(0).run(), together[0])
    assert torch.equal(whole.rows(2, 0).wider(40).run().unflatten(0, (2, -1)), together[[2, 0]])


def test_verifying_a_chain_gives_the_bits_of_plain_decoding(device: torch.device) -> None:
    """Over the edge of a tile and of a split: a key counts alike whether it is a node or cached."""
    cached, shape = [30, 255], Shape(nodes=3)
    whole = step(device, cached, shape, chain=True)
    together = whole.run().unflatten(0, (2, -1))
    alone = step(device, cached, shape, chain=True)
    for node in range(3):
        batch = dataclasses.replace(
            alone.batch, nodes=1, cached=alone.batch.cached + node, mask=torch.ones(2, 1, 1).bool().to(device),
            slots=alone.batch.slots.view(2, -1)[:, node].contiguous(),
        )  # fmt: skip
        q, k, v = (x.unflatten(0, (2, -1))[:, node] for x in alone.qkv)
        assert torch.equal(Step(alone.cache, batch, (q, k, v)).run(), together[:, node])


def test_padding_rows_touch_only_the_block_that_nobody_reads(device: torch.device) -> None:
    shape = Shape()
    plain, padded = (step(device, [0, 20, 0], shape) for _ in range(2))
    blocks, slots = padded.batch.blocks.clone(), padded.batch.slots.view(3, -1).clone()
    blocks[[0, 2]] = 0
    slots[[0, 2]] = torch.arange(shape.nodes, device=device)
    padded = padded._replace(
        batch=dataclasses.replace(padded.batch, blocks=blocks, slots=slots.flatten(), cached=padded.batch.cached.int())
    )
    before = codes(padded.cache)
    expected = plain.rows(1).run()
    out = padded.run().unflatten(0, (3, -1))
    assert torch.equal(out[1], expected)
    assert out.isfinite().all()
    for now, was, clean in zip(codes(padded.cache), before, codes(plain.cache), strict=True):
        assert torch.equal(now[:, 1:], clean[:, 1:])
        assert not torch.equal(now[:, 0], was[:, 0])


def test_splits_fold_into_one_softmax(device: torch.device) -> None:
    """More splits than are folded at once, among them one where a node sees nothing, and a node that sees none."""
    torch.manual_seed(0)
    rows, group, splits, used, head_dim, split = 2, 2, 6, 5, 24, 32
    tops, norms = torch.randn(rows, 1, splits, group).mul(4), torch.rand(rows, 1, splits, group) + 0.5
    sums = torch.randn(rows, 1, splits, group, head_dim)
    tops[0, 0, 2, 1] = tops[1, 0, :, 0] = -math.inf
    norms[tops == -math.inf], sums[tops == -math.inf] = 0, 0
    share = torch.exp2(tops - tops[:, :, :used].amax(2, keepdim=True))[:, :, :used].nan_to_num(0)
    whole = (norms[:, :, :used] * share).sum(2).clamp(min=1e-30)
    expected = (sums[:, :, :used] * share[..., None]).sum(2) / whole[..., None] * 0.25
    tops[:, :, used:], sums[:, :, used:] = math.nan, math.nan  # never written, never read
    out = torch.empty(rows, group * head_dim, device=device)
    cached = torch.full((rows,), used * split - 1, device=device)
    combine_splits[(group, rows)](
        out, sums.to(device), tops.to(device), norms.to(device), cached, 1, splits, 0.25,
        group=group, head_dim=head_dim, tile_d=32, split=split, chunk=2,
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().view(rows, 1, group, head_dim), expected, rtol=1e-5, atol=1e-6)


LARGE = Shape(heads=40, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
"""The heads of Qwen2.5-14B."""


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["model", "fp8", "int8"])
@pytest.mark.parametrize("nodes", [1, 4, 13, 30])
def test_long_rows_of_a_large_model(nodes: int, kv_dtype: KvDtype) -> None:
    check(
        torch.device("cuda"), [0, 2047, 2048, 5000, 12345], dataclasses.replace(LARGE, nodes=nodes, kv_dtype=kv_dtype)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("nodes", [1, 4, 13])
def test_long_rows_keep_their_bits(nodes: int) -> None:
    """Again and again: a read that overtook the write of a node would show."""
    whole = step(torch.device("cuda"), [700, 4095, 4096, 9000] * 8, dataclasses.replace(LARGE, nodes=nodes))
    first = whole.run()
    for _ in range(20):
        for pool in whole.cache.pools(LAYER):
            flat = pool.view(LARGE.kv_heads, -1, LARGE.head_dim)
            flat[:, whole.batch.slots] = 1000.0
        assert torch.equal(whole.run(), first)
    rows = first.unflatten(0, (32, -1))
    assert torch.equal(whole.rows(2).wider(300).run(), rows[2])
    assert torch.equal(whole.rows(3, 1).run().unflatten(0, (2, -1)), rows[[3, 1]])


@pytest.mark.gpu
def test_a_cuda_graph_follows_its_tensors() -> None:
    device = torch.device("cuda")
    shape = dataclasses.replace(LARGE, nodes=4)
    work = step(device, [3000, 17, 2000, 900], shape)
    work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work.run()
    for cached in ([3000, 17, 2000, 900], [0, 2999, 512, 1]):
        places = torch.tensor(cached, device=device)[:, None] + torch.arange(4, device=device)
        work.batch.cached.copy_(places[:, 0])
        slots = work.batch.blocks.gather(1, places // SIZE) * SIZE + places % SIZE
        work.batch.slots.copy_(slots.flatten())
        work.batch.mask.copy_(torch.rand(work.batch.mask.shape, device=device) < 0.5)
        work.batch.mask.logical_or_(torch.eye(4, device=device).bool())
        graph.replay()
        torch.testing.assert_close(out, work.defined(), **TOLERANCE[torch.bfloat16])
