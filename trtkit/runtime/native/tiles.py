"""The matrix product on a CPU with matrix units (AMX): weights in the order of its tiles, read as they are stored.

``native/tiles.cpp`` says how. Letters: T tokens, N output features, K input features, G groups of K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights
from trtkit.runtime.native.packed import PackedLinear, packed_linear

__all__ = ["tile_linear", "tiles_fit"]

_BF16, _INT8, _INT8_DIRECT, _FP8, _INT4 = range(5)
"""The numbers of ``tiles.cpp``."""
_UNIT = 64
"""Outputs are padded to a multiple; the number of ``tile_formats.h``."""
_STEP = 32
"""Inputs of a tile that holds bf16: a group is a multiple."""
_MOST_INPUTS = 2**17 - 1
"""Of an int8 product: 2^14 times as much is the largest sum that int32 holds."""


def tiles_fit(weights: LinearWeights) -> bool:
    """Whether this process may use tiles, and the weights' groups are whole steps. The kernels must be loaded."""
    weight = weights.weight
    if weight.format == "int8" and weight.shape[1] > _MOST_INPUTS:
        return False
    whole = weight.format != "int4" or weight.scale is None or weight.shape[1] % (_STEP * weight.scale.shape[1]) == 0
    return bool(torch.ops.trtkit_cpu.tiles_ready()) and whole


def tile_linear(weights: LinearWeights) -> PackedLinear:
    """``linear_reference`` for bf16 x (T, K), contiguous -> bf16 (T, N).

    Codes are multiplied exactly, sums are float32 (int32 in W8A8); x times ``pre_scale`` is rounded to bf16 first.
    """
    kind, stored = _codes(weights)
    codes = torch.ops.trtkit_cpu.pack_tiles(stored.contiguous(), kind)
    width = -(-weights.weight.shape[0] // _UNIT) * _UNIT
    return packed_linear("linear_tiles", weights, codes, kind, width=width)


def _codes(weights: LinearWeights) -> tuple[int, Tensor]:
    weight = weights.weight
    if weight.format == "int4":
        return _INT4, unpack_int4(weight.data)
    if weight.format == "int8":
        return _INT8 if weights.input_scale is None else _INT8_DIRECT, weight.data
    if weight.format == "fp8":
        return _FP8, weight.data.view(torch.uint8)
    return _BF16, weight.data.to(torch.bfloat16).view(torch.int16)
