"""Whether the C++ kernels run here: tests of what cannot run are skipped."""

from __future__ import annotations

import pytest
import torch

from trtkit.runtime.native import loader
from trtkit.runtime.native.linear import Product


def need_kernels() -> None:
    """Skip without a compiler, or on a CPU without AVX2."""
    if not loader.load():
        pytest.skip("no compiler, or a CPU without AVX2")


def need_product(product: Product) -> None:
    """Skip on a CPU without AMX (tiles), or without BF16 in AVX512 (dots). The kernels must be loaded."""
    if product == "tiles" and not torch.ops.trtkit_cpu.tiles_ready():
        pytest.skip("a CPU without AMX")
    if product == "dots" and not torch.ops.trtkit_cpu.dots_ready():
        pytest.skip("a CPU without AVX512 and its BF16, VNNI and VBMI")
