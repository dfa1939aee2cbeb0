"""All layers in one C++ call against the same pieces called from Python: not a bit may differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.tree import TokenTree
from tests.engines import random_prompts
from tests.runtime.native_here import run_on
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import LinearName
from trtkit.quant.tensor import LinearWeights, quantize_fp8, quantize_int4, quantize_int8
from trtkit.runtime import decode, linear
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.scheme import KvDtype

CPU = torch.device("cpu")


class Quantized:
    """A checkpoint whose products are rounded on the way, with scales nobody calibrated."""

    def __init__(self, directory: Path, precision: str) -> None:
        self._stored, self._precision = open_unified(directory), precision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        stored = self._stored.linear(layer, name)
        matrix = stored.weight.data.float()
        step = torch.tensor(0.03)
        match self._precision:
            case "int8":
                return dataclasses.replace(stored, weight=quantize_int8(matrix, steps=128))
            case "int8-sq":
                scaled = torch.linspace(0.5, 1.5, matrix.shape[1])
                return dataclasses.replace(
                    stored, weight=quantize_int8(matrix, steps=127), input_scale=step, pre_scale=scaled
                )
            case "fp8":
                return dataclasses.replace(stored, weight=quantize_fp8(matrix), input_scale=step)
            case "int4":
                return dataclasses.replace(stored, weight=quantize_int4(matrix))
        return stored


@pytest.fixture(autouse=True, params=["tiles", "dots", "panels"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tiles`` and ``dots`` want their instructions; ``panels`` run on any CPU with kernels."""
    run_on(request.param, monkeypatch)


def _model(directory: Path, precision: str = "bf16") -> DecoderModel:
    return DecoderModel(Quantized(directory, precision), device=CPU, dtype=torch.bfloat16, max_tokens=256)


def _verified(model: DecoderModel, kv_dtype: KvDtype) -> tuple[decode.Verified, KvCache]:
    """Three rows of several lengths and five nodes each, over a cache of noise."""
    rows, nodes, size, width = 3, 5, 16, 4
    cache = KvCache(
        model.spec, blocks=rows * width, block_size=size, max_rows=rows, max_tokens=size * width, kv_dtype=kv_dtype,
        dtype=torch.bfloat16, device=CPU,
    )  # fmt: skip
    torch.manual_seed(0)
    for pool in cache.stored:
        pool.copy_(torch.randn(pool.shape))
    at = decode.Pending(
        tokens=torch.tensor([5, 6, 7]), cached=torch.tensor([0, 17, 58]), lines=torch.arange(rows),
        blocks=torch.randperm(rows * width).view(rows, width),
    )  # fmt: skip
    tokens = torch.tensor(random_prompts(0, [rows * nodes])).view(rows, nodes)
    parent = torch.tensor([[-1, 0, 0, 1, 3]]).expand(rows, -1)
    mask = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        mask[node] |= mask[parent[0, node]]
    tree = TokenTree(
        tokens=tokens, parent=parent, depth=torch.tensor([[0, 1, 1, 2, 3]]).expand(rows, -1),
        mask=mask.expand(rows, -1, -1), levels=3, chain=False,
    )  # fmt: skip
    with torch.inference_mode():
        return decode.verify(model, cache, at, tree), cache


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("qwen2", "bf16"),
        ("qwen3", "bf16"),
        ("llama", "int8"),
        ("qwen2", "int8-sq"),
        ("qwen3", "int4"),
        ("qwen2", "fp8"),
    ],
)
def test_the_pieces_called_from_python_give_the_same_bits(tmp_path: Path, family: str, precision: str) -> None:
    model = _model(save_tiny(tmp_path, family, dtype=torch.bfloat16), precision)
    assert model.native_layers is not None
    fast, fast_cache = _verified(model, "model")
    model.native_layers = None
    plain, plain_cache = _verified(model, "model")
    assert torch.equal(fast.hidden, plain.hidden)
    assert torch.equal(fast.logits, plain.logits)
    assert all(torch.equal(a, b) for a, b in zip(fast_cache.stored, plain_cache.stored, strict=True))


def test_a_cache_that_the_kernels_do_not_read_takes_the_long_way(tmp_path: Path) -> None:
    model = _model(save_tiny(tmp_path, dtype=torch.bfloat16))
    assert model.native_layers is not None
    fast, _ = _verified(model, "int8")
    model.native_layers = None
    assert torch.equal(fast.logits, _verified(model, "int8")[0].logits)


def test_without_packed_products_there_is_no_such_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "loaded", lambda: False)
    model = _model(save_tiny(tmp_path, dtype=torch.bfloat16))
    assert model.native
    assert model.native_layers is None
