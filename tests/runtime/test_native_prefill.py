"""Prefill on the C++ kernels: keys and values have the same bits, however their tokens come to be computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engines import random_prompts
from tests.runtime.native_here import run_on
from tests.runtime.test_native_layers import Quantized
from tests.tiny import save_tiny
from trtkit.runtime import decode
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.native import kernels
from trtkit.runtime.prefill import Stretch, prefill
from trtkit.scheme import KvDtype

CPU = torch.device("cpu")
SIZE, LENGTH = 16, 45
BLOCKS = (7, 2, 9)


@pytest.fixture(autouse=True, params=["tiles", "dots", "panels"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(request.param, monkeypatch)


def _model(directory: Path, precision: str = "bf16", dtype: torch.dtype = torch.bfloat16) -> DecoderModel:
    return DecoderModel(Quantized(directory, precision), device=CPU, dtype=dtype, max_tokens=1024)


def _cache(model: DecoderModel, kv_dtype: KvDtype = "model", blocks: int = 12) -> KvCache:
    return KvCache(
        model.spec, blocks=blocks, block_size=SIZE, max_rows=2, max_tokens=SIZE * blocks, kv_dtype=kv_dtype,
        dtype=model.dtype, device=CPU,
    )  # fmt: skip


def _found(cache: KvCache, blocks: Sequence[int], length: int) -> Tensor:
    """Keys and values in the first ``length`` slots of ``blocks``."""
    pools = torch.stack(cache.stored)
    own = pools[:, :, :, list(blocks)].view(*pools.shape[:3], len(blocks) * SIZE, -1)
    return own[..., :length, :]


def _one_by_one(model: DecoderModel, cache: KvCache, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    for place, token in enumerate(tokens):
        at = decode.Pending(
            tokens=torch.tensor([token]), cached=torch.tensor([place]), lines=torch.zeros(1, dtype=torch.int64),
            blocks=torch.tensor([blocks]),
        )  # fmt: skip
        decode.verify(model, cache, at, decode.root_only(at))


def _in_parts(model: DecoderModel, cache: KvCache, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    for start, end in ((0, 13), (13, 14), (14, 32), (32, len(tokens))):
        prefill(model, cache, [Stretch(tokens=tokens[start:end], cached=start, blocks=blocks)])


def _in_company(model: DecoderModel, cache: KvCache, tokens: Sequence[int], blocks: Sequence[int]) -> None:
    other = Stretch(tokens=tokens[::-1], cached=0, blocks=[1, 3, 4])
    prefill(model, cache, [other, Stretch(tokens=tokens, cached=0, blocks=blocks)])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "precision"), [("qwen2", "bf16"), ("qwen3", "int4"), ("llama", "int8-sq"), ("qwen2", "fp8")]
)
def test_the_bits_are_those_of_decode_steps(tmp_path: Path, family: str, precision: str) -> None:
    """At once, in parts, beside another prompt, in other blocks: as if the model had written the prompt itself."""
    model = _model(save_tiny(tmp_path, family, dtype=torch.bfloat16), precision)
    tokens = random_prompts(2, [LENGTH])[0]
    cache = _cache(model)
    prefill(model, cache, [Stretch(tokens=tokens, cached=0, blocks=BLOCKS)])
    whole = _found(cache, BLOCKS, LENGTH)
    assert whole.abs().amin(dim=(0, 2, 4)).amax() > 0, "every layer writes"
    elsewhere = [*set(range(12)) - set(BLOCKS)]
    assert not torch.stack(cache.stored)[:, :, :, elsewhere].any(), "and in these blocks alone"
    assert not _found(cache, BLOCKS, LENGTH + 3)[..., LENGTH:, :].any(), "up to its end"
    ways: list[Callable[[DecoderModel, KvCache, Sequence[int], Sequence[int]], None]]
    ways = [_one_by_one, _in_parts, _in_company]
    for blocks in (BLOCKS, (0, 11, 5)):
        for way in ways:
            cache = _cache(model)
            way(model, cache, tokens, blocks)
            assert torch.equal(_found(cache, blocks, LENGTH), whole), (way.__name__, blocks)
    model.native_layers = None  # as ranks have it, which meet twice in each layer
    _in_company(model, cache, tokens, BLOCKS)
    assert torch.equal(_found(cache, BLOCKS, LENGTH), whole)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_keys_and_values_are_those_of_torch(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that is taken without kernels, and by caches that these do not read."""
    model = _model(save_tiny(tmp_path, dtype=dtype), dtype=dtype)
    tokens = random_prompts(3, [LENGTH])[0]

    def computed() -> Tensor:
        cache = _cache(model)
        _in_parts(model, cache, tokens, BLOCKS)
        return _found(cache, BLOCKS, LENGTH)

    found = computed()
    monkeypatch.setattr(kernels, "attend_fits", lambda *_: False)
    exact = dtype == torch.float32
    torch.testing.assert_close(found, computed(), rtol=1e-4 if exact else 0.05, atol=1e-4 if exact else 0.1)
    _in_company(model, _cache(model, "int8"), tokens, BLOCKS)


@torch.inference_mode()
def test_threads_find_what_others_write(tmp_path: Path) -> None:
    model = _model(save_tiny(tmp_path, dtype=torch.bfloat16, max_position_embeddings=1024))
    tokens, blocks = random_prompts(4, [900])[0], range(57)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 2):
            torch.set_num_threads(count)
            cache = _cache(model, blocks=57)
            prefill(model, cache, [Stretch(tokens=tokens, cached=0, blocks=blocks)])
            found.append(_found(cache, blocks, 900))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
