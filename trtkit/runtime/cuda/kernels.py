"""Whether the Triton kernels run here; they are imported on the first yes."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from trtkit.decoder import Pointwise
from trtkit.log import logger
from trtkit.runtime.native.loader import SWITCH
from trtkit.scheme import KvDtype

__all__ = ["attend_fits", "open_cuda_kernels", "triton_runs"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_runs(device: torch.device) -> bool:
    """On a CUDA device of compute capability 8.0 or more, where triton is installed and can compile, unless the
    environment switches kernels off."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0" or torch.version.hip is not None:
        return False
    if importlib.util.find_spec("triton") is None:
        logger.debug("no CUDA kernels: triton is not installed")
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        logger.debug("no CUDA kernels: they need compute capability 8.0")
        return False
    return _compiles(device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """A kernel can be compiled and run: that takes a C compiler for its launcher."""
    try:
        from trtkit.runtime.cuda import launch

        launch.probe(device)
    except Exception as problem:  # whatever it is, there is a way without
        logger.warning("no Triton kernels on %s: %s", device, str(problem).strip()[:500])
        return False
    return True


def open_cuda_kernels(device: torch.device, dtype: torch.dtype) -> Pointwise | None:
    """The kernels between a layer's products; None where they do not run: torch's own."""
    if dtype not in _DTYPES or not triton_runs(device):
        return None
    from trtkit.runtime.cuda.pointwise import TritonPointwise

    return TritonPointwise()


def attend_fits(device: torch.device, kv_dtype: KvDtype) -> bool:
    """Whether ``attend_verify_triton`` reads such a cache there: fp8 came with compute capability 8.9."""
    return kv_dtype != "fp8" or torch.cuda.get_device_capability(device) >= (8, 9)
