"""The C++ matrix products: which one this CPU's instructions allow, and the weights packed for it.

``tiles``: matrix units (AMX), ``native/tiles.cpp``. ``dots``: vectors that multiply bf16 and int8 numbers (AVX512 with
BF16 and VNNI; with VNNI alone int8 weights and codes), ``native/dots.cpp``. ``panels``: float32 multiply-adds (AVX2 or
AVX512), ``native/linear.cpp``. In all of them codes are multiplied exactly, and a row's sum has one order, so that it
depends on nothing but the row. ``docs/cpu.md`` says more.

Letters: T tokens, N output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights
from trtkit.runtime.native.packed import PackedLinear, packed_linear

__all__ = ["PACKERS", "Product", "dot_linear", "kind_of", "packed_product", "panel_linear", "tile_linear"]

Product: TypeAlias = Literal["tiles", "dots", "panels"]

_BF16, _INT8, _INT8_CODES, _FP8, _INT4 = range(5)
_UNIT = 64
"""There, outputs are padded to a multiple; the number of ``weight_formats.h``."""
_STEP = 32
"""There, inputs of a tile that holds bf16: a group is a multiple."""
_MOST_INPUTS = 2**16 - 1
"""Of a product of int8 codes: 2^15 times as much is the largest sum that int32 holds."""


def packed_product(weights: LinearWeights) -> Product:
    """What multiplies these weights fastest here. The kernels must be loaded."""
    weight, ops = weights.weight, torch.ops.trtkit_cpu
    fits = weight.format != "int8" or weight.shape[1] <= _MOST_INPUTS
    if weight.format == "int4" and weight.scale is not None:
        fits = weight.shape[1] % (_STEP * weight.scale.shape[1]) == 0
    if fits and ops.tiles_ready():
        return "tiles"
    return "dots" if fits and ops.dots_ready(kind_of(weights)) else "panels"


def tile_linear(weights: LinearWeights) -> PackedLinear:
    """``linear_reference`` for bf16 x (T, K), contiguous -> bf16 (T, N), on matrix units.

    Sums are float32 (int32 for codes of x); x times ``pre_scale`` is rounded to bf16 first, unless weights are int8.
    """
    kind = kind_of(weights)
    codes = torch.ops.trtkit_cpu.pack_tiles(_codes(weights).contiguous(), kind)
    return packed_linear("linear_tiles", weights, codes, kind, width=_width(weights))


def dot_linear(weights: LinearWeights) -> PackedLinear:
    """As :func:`tile_linear`, on vectors; x times ``pre_scale`` is rounded to bf16 unless it is rounded to codes."""
    kind, width = kind_of(weights), _width(weights)
    codes = torch.ops.trtkit_cpu.pack_dots(_codes(weights).contiguous(), kind)
    doubled = torch.full((width,), 0.5) if kind == _INT8 else None  # int8 weights become 2 code + 1
    return packed_linear("linear_dots", weights, codes, kind, width=width, factor=doubled)


def panel_linear(weights: LinearWeights) -> PackedLinear:
    """As :func:`tile_linear`, on any CPU with AVX2; ``pre_scale`` and ``input_scale`` are applied in float32."""
    kind, stored = kind_of(weights), _codes(weights)
    if kind == _FP8:  # exact in bf16, and fast there
        stored = weights.weight.data.to(torch.bfloat16).view(torch.int16)
    bits = {_INT8: 8, _INT8_CODES: 8, _INT4: 4}.get(kind, 16)
    codes, factor = torch.ops.trtkit_cpu.pack_linear(stored.contiguous(), bits)
    return packed_linear("linear", weights, codes, bits, width=factor.numel(), factor=factor)


PACKERS: Mapping[Product, Callable[[LinearWeights], PackedLinear]] = MappingProxyType(
    {"tiles": tile_linear, "dots": dot_linear, "panels": panel_linear}
)


def _width(weights: LinearWeights) -> int:
    return -(-weights.weight.shape[0] // _UNIT) * _UNIT


def kind_of(weights: LinearWeights) -> int:
    """The number of their format in ``tiles.cpp`` and ``dots.cpp``."""
    kinds = {"bf16": _BF16, "int8": _INT8 if weights.input_scale is None else _INT8_CODES, "fp8": _FP8, "int4": _INT4}
    return kinds[weights.weight.format]


def _codes(weights: LinearWeights) -> Tensor:
    weight = weights.weight
    if weight.format == "int4":
        return unpack_int4(weight.data)
    if weight.format == "int8":
        return weight.data
    if weight.format == "fp8":
        return weight.data.view(torch.uint8)
    return weight.data.to(torch.bfloat16).view(torch.int16)
