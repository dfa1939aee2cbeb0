"""A linear as the operators of the C++ kernels take it: packed codes, and what their sums are multiplied by.

Letters: T tokens, N output features (padded: Np), K input features, G groups of K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.quant.tensor import LinearWeights, QuantTensor

__all__ = ["Operator", "PackedLinear", "packed_linear"]

Operator: TypeAlias = Literal["linear", "linear_dots", "linear_tiles"]

_AS_IS, _TO_INT8, _TO_FP8 = 0, 1, 2
"""What x is rounded to first; the numbers of ``activations.h``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """bf16 x (T, K) -> bf16 (T, N), by an operator that is called with x, ``weights`` and ``form``."""

    operator: Operator
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    """Codes; float32 (G, Np), what a group's sum of code * x is multiplied by; float32 bias (Np,); float32 (K,), what x
    is multiplied by first."""
    form: tuple[int, int, int, float]
    """The operator's number of the format; N; what x is rounded to, after it was multiplied by the last number."""
    _product: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_product", getattr(torch.ops.trtkit_cpu, self.operator).default)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, K) -> (T, N)"""
        return self._product(x.contiguous(), *self.weights, *self.form)


def packed_linear(
    operator: Operator, weights: LinearWeights, codes: Tensor, kind: int, *, width: int, factor: Tensor | None = None
) -> PackedLinear:
    """``weights`` with the operator's codes, of ``width`` (Np) outputs; ``factor`` (Np,) multiplies the scales."""
    scale, step = _padded(_weight_scale(weights.weight), width), weights.input_scale
    rounding, inverse = _AS_IS, 1.0
    if step is not None:
        rounding, inverse = _TO_FP8 if weights.weight.format == "fp8" else _TO_INT8, float(1 / step)
        scale = scale * step
    bias, pre_scale = weights.bias, weights.pre_scale
    return PackedLinear(
        operator=operator,
        weights=(
            codes,
            scale if factor is None else scale * factor,
            None if bias is None else _padded(bias.float(), width),
            None if pre_scale is None else pre_scale.float().contiguous(),
        ),
        form=(kind, weights.weight.shape[0], rounding, inverse),
    )


def _weight_scale(weight: QuantTensor) -> Tensor:
    rows = weight.shape[0]
    if weight.scale is None:
        return torch.ones(1, rows)
    if weight.format == "int4":
        return weight.scale.float().T
    return weight.scale.float().expand(rows).reshape(1, rows)


def _padded(values: Tensor, width: int) -> Tensor:
    """The last dimension filled up with zeros."""
    return F.pad(values, (0, width - values.shape[-1])).contiguous()
