"""Kernels that start while the one before them still runs (programmatic dependent launch, compute capability 9.0).

A decode step is a row of some 500 small launches, each of which reads what the one before it wrote; between two of them
the memory stands idle for a microsecond. Launched so, a kernel's programs come to the multiprocessors while the last
programs of its predecessor run, fetch the first weights into the L2, and wait there: ``started`` is passed when the
predecessor is done and its stores are seen. Rules that make this as safe as a plain launch:

- every program of such a kernel calls ``started`` before it reads or writes anything but weights, also one that has
  nothing to do. So a kernel that is done means that all before it are;
- it lets its successor come only after that: at most two kernels are on the device at once.

Off unless the environment says ``TRTKIT_EARLY_START=1``: it has not run on a GPU.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["FUSED", "SWITCH", "dependent", "fetch", "started"]

SWITCH = "TRTKIT_EARLY_START"
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
"""Multiply-adds in one rounding, said with every launch but those of the pick, which cannot have it: Triton 3.9 warns
where it is left open, and 3.10 has another default."""


@functools.cache
def dependent(device: torch.device) -> dict[str, Any]:
    """What a launch on ``device`` is given beside its arguments: nothing where kernels start one by one."""
    if device.type != "cuda" or os.environ.get(SWITCH) != "1" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"early": True, "launch_pdl": True}


@triton.jit
def started(early: tl.constexpr):
    """Wait for the kernel before this one."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(pointers, early: tl.constexpr):
    """Bring the lines of 128 bytes at these pointers to the L2, without waiting for them."""
    if early:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
