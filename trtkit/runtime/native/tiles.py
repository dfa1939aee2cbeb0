"""The matrix product on a CPU with matrix units (AMX): weights in the order of its tiles, read as they are stored.

``native/tiles.cpp`` says how. Letters: T tokens, N output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights

__all__ = ["tile_linear", "tiles_fit"]

_BF16, _INT8, _INT8_DIRECT, _FP8, _INT4 = range(5)
_AS_IS, _TO_INT8, _TO_FP8 = range(3)
"""What x is rounded to first. Both lists are the numbers of the C++ sources."""
_PIECE = 64
"""Inputs widened at once: a group is a multiple."""
_MOST_INPUTS = 2**17 - 1
"""Of an int8 product: 2^14 times as much is the largest sum that int32 holds."""


def tiles_fit(weights: LinearWeights) -> bool:
    """Whether this process may use tiles, and the weights' groups are whole pieces. The kernels must be loaded."""
    weight = weights.weight
    if weight.format == "int8" and weight.shape[1] > _MOST_INPUTS:
        return False
    whole = weight.format != "int4" or weight.scale is None or weight.shape[1] % (_PIECE * weight.scale.shape[1]) == 0
    return bool(torch.ops.trtkit_cpu.tiles_ready()) and whole


def tile_linear(weights: LinearWeights) -> Callable[[Tensor], Tensor]:
    """``linear_reference`` for bf16 x (T, K), contiguous -> bf16 (T, N).

    Codes are multiplied exactly, sums are float32 (int32 in W8A8); x times ``pre_scale`` is rounded to bf16 first.
    """
    weight, step = weights.weight, weights.input_scale
    kind, stored = _codes(weights)
    codes = torch.ops.trtkit_cpu.pack_tiles(stored.contiguous(), kind)
    scale = _scale(weights)
    rounding, inverse = _AS_IS, 1.0
    if step is not None:
        scale, inverse = scale * step, float(1 / step)
        rounding = _TO_FP8 if weight.format == "fp8" else _TO_INT8
    scale = _padded(scale)
    bias = None if weights.bias is None else _padded(weights.bias.float())
    pre_scale = None if weights.pre_scale is None else weights.pre_scale.float().contiguous()
    out, product = weight.shape[0], torch.ops.trtkit_cpu.linear_tiles.default

    def run(x: Tensor) -> Tensor:
        y: Tensor = product(x.contiguous(), codes, scale, bias, pre_scale, kind, out, rounding, inverse)
        return y

    return run


def _codes(weights: LinearWeights) -> tuple[int, Tensor]:
    weight = weights.weight
    if weight.format == "int4":
        return _INT4, unpack_int4(weight.data)
    if weight.format == "int8":
        return _INT8 if weights.input_scale is None else _INT8_DIRECT, weight.data
    if weight.format == "fp8":
        return _FP8, weight.data.view(torch.uint8)
    return _BF16, weight.data.to(torch.bfloat16).view(torch.int16)


def _scale(weights: LinearWeights) -> Tensor:
    """float32 (G, N): what a group's sum of code * x is multiplied by."""
    weight, rows = weights.weight, weights.weight.shape[0]
    if weight.scale is None:
        return torch.ones(1, rows)
    if weight.format == "int4":
        return weight.scale.float().T
    return weight.scale.float().expand(rows).reshape(1, rows)


def _padded(values: Tensor) -> Tensor:
    return F.pad(values, (0, -values.shape[-1] % 64)).contiguous()
