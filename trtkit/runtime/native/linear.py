"""The C++ matrix product for CPUs without bf16 instructions: weights packed in panels, read as they are stored.

``native/linear.cpp`` says how. Sums are float32 in one order, so that a row's result depends on nothing but the row.
Letters: T tokens, N output features, K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights, QuantTensor

__all__ = ["native_linear", "padded", "sum_scale"]

_AS_IS, _TO_INT8, _TO_FP8 = 0, 1, 2
"""What x is rounded to first; the numbers of ``activations.h``."""


def native_linear(weights: LinearWeights) -> Callable[[Tensor], Tensor]:
    """``linear_reference`` for bf16 x (T, K), contiguous -> bf16 (T, N). The kernels must be loaded.

    The activation is multiplied by ``pre_scale`` and rounded by ``input_scale`` in float32; the output is rounded once.
    """
    weight = weights.weight
    bits, stored = _codes(weight)
    codes, factor = torch.ops.trtkit_cpu.pack_linear(stored.contiguous(), bits)
    scale, rounding, inverse = sum_scale(weights)
    scale = padded(scale, factor.numel()) * factor
    bias = None if weights.bias is None else padded(weights.bias.float(), factor.numel())
    pre_scale = None if weights.pre_scale is None else weights.pre_scale.float().contiguous()
    out, product = weight.shape[0], torch.ops.trtkit_cpu.linear.default

    def run(x: Tensor) -> Tensor:
        y: Tensor = product(x.contiguous(), codes, scale, bias, pre_scale, bits, out, rounding, inverse)
        return y

    return run


def _codes(weight: QuantTensor) -> tuple[int, Tensor]:
    """(bits of a code in memory, the codes (N, K) as whole numbers). e4m3 values are exact in bf16, and fast there."""
    if weight.format == "int4":
        return 4, unpack_int4(weight.data)
    if weight.format == "int8":
        return 8, weight.data
    return 16, weight.data.to(torch.bfloat16).view(torch.int16)


def sum_scale(weights: LinearWeights) -> tuple[Tensor, int, float]:
    """float32 (G, N), what a group's sum of code * x is multiplied by; what x is rounded to first, after it was
    multiplied by the last number."""
    weight, step = weights.weight, weights.input_scale
    scale = _weight_scale(weight)
    if step is None:
        return scale, _AS_IS, 1.0
    return scale * step, _TO_FP8 if weight.format == "fp8" else _TO_INT8, float(1 / step)


def _weight_scale(weight: QuantTensor) -> Tensor:
    rows = weight.shape[0]
    if weight.scale is None:
        return torch.ones(1, rows)
    if weight.format == "int4":
        return weight.scale.float().T
    return weight.scale.float().expand(rows).reshape(1, rows)


def padded(values: Tensor, width: int) -> Tensor:
    """The last dimension filled up with zeros."""
    return F.pad(values, (0, width - values.shape[-1])).contiguous()
