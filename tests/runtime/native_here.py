"""Whether the C++ kernels run here: tests of what cannot run are skipped."""

from __future__ import annotations

import pytest
import torch

from trtkit.runtime.native import loader


def need_kernels() -> None:
    """Skip without a compiler, or on a CPU without AVX2."""
    if not loader.load():
        pytest.skip("no compiler, or a CPU without AVX2")


def need_tiles() -> None:
    """Skip on a CPU without AMX. The kernels must be loaded."""
    if not torch.ops.trtkit_cpu.tiles_ready():
        pytest.skip("a CPU without AMX")
