"""A pytest plugin (``-p tests.runtime.other_cpu``): the kernels' tests on the build of another kind of CPU.

``TRTKIT_TEST_CPU`` names it. Builds for older CPUs run as they are; that for matrix units runs, slowly, on the unit in
software of ``tile_unit.h``. Each library is compiled apart from the one in use and kept beside it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from trtkit.runtime.native import loader
from trtkit.runtime.native.linear import Product

_UNIT = Path(__file__).with_name("tile_unit.h")
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

KINDS: dict[str, tuple[set[str], list[str]]] = {
    "haswell": ({"avx2", "fma", "bmi2"}, ["-march=haswell"]),
    "skylake-avx512": (_AVX512, ["-march=skylake-avx512"]),
    "cascadelake": (_AVX512 | {"avx512_vnni"}, ["-march=cascadelake"]),
    "tile-unit": (
        _AVX512 | loader._BF16_DOTS,
        ["-D__AMX_TILE__=1", "-D__AMX_BF16__=1", "-D__AMX_INT8__=1", f'-DTRTKIT_TILE_UNIT="{_UNIT}"',
         f"-DTRTKIT_TILE_UNIT_VERSION={int(hashlib.sha256(_UNIT.read_bytes()).hexdigest()[:8], 16)}"],
    ),
}  # fmt: skip
"""The flags of /proc/cpuinfo that a build needs, and what the compiler is told."""
PRODUCTS: dict[str, list[Product]] = {
    "haswell": ["panels"], "skylake-avx512": ["panels"], "cascadelake": ["panels", "dots"],
    "tile-unit": ["panels", "dots", "tiles"],
}  # fmt: skip
"""The linears that each build must have."""


def pytest_configure() -> None:
    """Tests that are skipped for want of a kernel would pass unseen: it has to be there."""
    name = os.environ["TRTKIT_TEST_CPU"]
    loader._FLAGS = (*loader._FLAGS, *KINDS[name][1])
    assert loader.load(), f"no kernels for {name}: see the debug log"
    ops, wanted = torch.ops.trtkit_cpu, PRODUCTS[name]
    assert ops.tiles_ready() == ("tiles" in wanted)
    assert ops.dots_ready(2) == ("dots" in wanted)  # codes of x
