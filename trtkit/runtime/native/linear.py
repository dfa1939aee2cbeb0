"""The C++ matrix product for CPUs without bf16 instructions: weights packed in panels, read as they are stored.

``native/linear.cpp`` says how. Sums are float32 in one order, so that a row's result depends on nothing but the row.
Letters: T tokens, N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights, QuantTensor
from trtkit.runtime.native.packed import PackedLinear, packed_linear

__all__ = ["native_linear"]


def native_linear(weights: LinearWeights) -> PackedLinear:
    """``linear_reference`` for bf16 x (T, K), contiguous -> bf16 (T, N). The kernels must be loaded.

    The activation is multiplied by ``pre_scale`` and rounded by ``input_scale`` in float32; the output is rounded once.
    """
    bits, stored = _codes(weights.weight)
    codes, factor = torch.ops.trtkit_cpu.pack_linear(stored.contiguous(), bits)
    return packed_linear("linear", weights, codes, bits, width=factor.numel(), factor=factor)


def _codes(weight: QuantTensor) -> tuple[int, Tensor]:
    """(bits of a code in memory, the codes (N, K) as whole numbers). e4m3 values are exact in bf16, and fast there."""
    if weight.format == "int4":
        return 4, unpack_int4(weight.data)
    if weight.format == "int8":
        return 8, weight.data
    return 16, weight.data.to(torch.bfloat16).view(torch.int16)
