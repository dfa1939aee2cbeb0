"""What the cache stores of keys and values, and the memory that is planned for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trtkit.known_models import known_model
from trtkit.model_spec import ModelSpec
from trtkit.runtime.kv_cache import KvCache, kv_block_bytes
from trtkit.scheme import KvDtype

CPU = torch.device("cpu")


@pytest.fixture
def spec() -> ModelSpec:
    spec = known_model("nemotron-14b")
    assert spec is not None
    return replace(spec, layers=2, kv_heads=2, head_dim=8)


def _cache(spec: ModelSpec, kv_dtype: KvDtype, scales: list[tuple[float, float]] | None = None) -> KvCache:
    return KvCache(
        spec, blocks=5, block_size=4, max_rows=2, max_tokens=16, kv_dtype=kv_dtype, dtype=torch.bfloat16, device=CPU,
        scales=scales,
    )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", ["model", "fp8", "int8"])
def test_blocks_take_the_memory_that_is_counted(spec: ModelSpec, kv_dtype: KvDtype) -> None:
    stored = _cache(spec, kv_dtype).stored
    assert sum(pool.nbytes for pool in stored) == (5 + 1) * kv_block_bytes(spec, kv_dtype, torch.bfloat16, 4)


@pytest.mark.parametrize(("kv_dtype", "low", "high"), [("fp8", -448.0, 448.0), ("int8", -128.0, 127.0)])
@pytest.mark.parametrize("sizes", [(0.25, 2.0), None])
def test_values_beyond_the_range_are_clipped_and_others_rounded(
    spec: ModelSpec, kv_dtype: KvDtype, low: float, high: float, sizes: tuple[float, float] | None
) -> None:
    """Keys and values have steps of their own size, by default 1. bfloat16 and fp8 keep 8 and 4 significant bits."""
    cache = _cache(spec, kv_dtype, None if sizes is None else [sizes] * spec.layers)
    codes = torch.tensor([-1e6, -900.0, -449.0, -300.0, -100.3, -0.7, 0.0, 1.0, 90.6, 127.4, 447.0, 600.0, 1e6])
    wanted = codes.clamp(low, high)
    margin = (
        wanted.abs() * (2**-4 if kv_dtype == "fp8" else 0) + wanted.abs() * 2**-8 + (0.5 if kv_dtype == "int8" else 0)
    )
    shape = (len(codes), spec.kv_heads, spec.head_dim)
    fresh = [(codes * size)[:, None, None].expand(shape) for size in sizes or (1.0, 1.0)]
    cache.write(1, torch.arange(len(codes)) + 4, *fresh)
    assert cache.scales(1) == (sizes or (1.0, 1.0))
    for found, size in zip(cache.read(1, torch.tensor([1, 2, 3, 4]), 1), sizes or (1.0, 1.0), strict=True):
        kept = found[:, 0, : len(codes)].float() / size
        assert ((kept - wanted[:, None]).abs() <= margin[:, None]).all()
    assert not cache.read(0, torch.tensor([1]), 1)[0].any(), "the other layers are untouched"
