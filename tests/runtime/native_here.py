"""Whether the C++ kernels run here: tests of what cannot run are skipped."""

from __future__ import annotations

import pytest
import torch

from trtkit.quant.tensor import LinearWeights
from trtkit.runtime import linear
from trtkit.runtime.native import kernels, loader
from trtkit.runtime.native.linear import Product, kind_of


def need_kernels() -> None:
    """Skip without a compiler, or on a CPU without AVX2."""
    if not loader.load():
        pytest.skip("no compiler, or a CPU without AVX2")


def need_product(product: Product, weights: LinearWeights | None = None) -> None:
    """Skip on a CPU without AMX (tiles), or without BF16 in AVX512 (dots; codes of x want VNNI only)."""
    ops = torch.ops.trtkit_cpu
    if product == "tiles" and not ops.tiles_ready():
        pytest.skip("a CPU without AMX")
    if product == "dots" and not ops.dots_ready(0 if weights is None else kind_of(weights)):
        pytest.skip("a CPU whose vectors have no products of this format")


def run_on(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take the C++ kernels, and this product for their linears. Skips where it does not run."""
    monkeypatch.setenv(loader.SWITCH, "1")
    need_kernels()
    need_product(product)
    monkeypatch.setattr(kernels, "_loaded", True)
    monkeypatch.setattr(linear, "packed_product", lambda _: product)
