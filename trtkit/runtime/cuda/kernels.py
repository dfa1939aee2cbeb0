"""Whether the Triton kernels run here; they are imported on the first yes."""

from __future__ import annotations

import importlib.util
import os

import torch

from trtkit.decoder import Pointwise
from trtkit.log import logger
from trtkit.runtime.native.loader import SWITCH
from trtkit.scheme import KvDtype

__all__ = ["attend_fits", "open_cuda_kernels"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def open_cuda_kernels(device: torch.device, dtype: torch.dtype) -> Pointwise | None:
    """The kernels between a layer's products on a CUDA device of compute capability 8.0 or more, where triton is
    installed and the environment does not switch kernels off; else None: torch's own."""
    if device.type != "cuda" or dtype not in _DTYPES or os.environ.get(SWITCH) == "0":
        return None
    if importlib.util.find_spec("triton") is None:
        logger.debug("no CUDA kernels: triton is not installed")
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        logger.debug("no CUDA kernels: they need compute capability 8.0")
        return None
    from trtkit.runtime.cuda.pointwise import TritonPointwise

    return TritonPointwise()


def attend_fits(device: torch.device, kv_dtype: KvDtype) -> bool:
    """Whether ``attend_verify_triton`` reads such a cache there: fp8 came with compute capability 8.9."""
    return kv_dtype != "fp8" or torch.cuda.get_device_capability(device) >= (8, 9)
