"""Quantize the linears that read one input together: q, k, v are one product at run time, and so are gate and up.

Letters: N rows, K inputs, G = K / 128 groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.quant.in_cache import fp8_matrix, int4_matrix, int8_matrix, largest_magnitude
from trtkit.quant.tensor import LinearWeights, QuantTensor
from trtkit.scheme import QuantScheme

__all__ = ["GroupScales", "effective_weight", "quantize_group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScales:
    """What calibration decides for one product; empty for formats that need no data."""

    pre_scale: Tensor | None = None
    """(K,) in the model's dtype: multiplies the activation; the weights are divided by it."""
    input_scale: Tensor | None = None
    """float32 ()."""
    clips: tuple[Tensor, ...] | None = None
    """int4, one per part: (N, G), shrinks each group's range."""


def quantize_group(
    parts: Sequence[LinearWeights], scheme: QuantScheme, scales: GroupScales, *, dtype: torch.dtype | None = None
) -> list[LinearWeights]:
    """The parts of one product, each dense, in the format of ``scheme`` with shared scales.

    ``dtype`` is the model's, which int8 scales are rounded to, if the weights have another.
    """
    if scheme.weight_format == "bf16":
        return list(parts)
    amax = None
    if scheme.weight_format == "fp8":
        amax = torch.stack([largest_magnitude(part.weight.data) for part in parts]).amax()
    clips = scales.clips or (None,) * len(parts)
    return [
        LinearWeights(
            weight=_quantize(part.weight.data, scheme, scales.pre_scale, amax, clip, dtype),
            bias=part.bias,
            input_scale=scales.input_scale,
            pre_scale=scales.pre_scale,
        )
        for part, clip in zip(parts, clips, strict=True)
    ]


def _quantize(
    weight: Tensor,
    scheme: QuantScheme,
    pre_scale: Tensor | None,
    amax: Tensor | None,
    clip: Tensor | None,
    dtype: torch.dtype | None,
) -> QuantTensor:
    if scheme.weight_format == "fp8":
        assert amax is not None
        return fp8_matrix(weight, amax=amax, pre_scale=pre_scale)
    if scheme.weight_format == "int8":
        steps = 127 if scheme.activations == "int8" else 128
        return int8_matrix(weight, steps=steps, pre_scale=pre_scale, dtype=dtype)
    assert scheme.group_size is not None
    return int4_matrix(weight, group_size=scheme.group_size, pre_scale=pre_scale, clip=clip)


def effective_weight(linear: LinearWeights, dequantized: Tensor) -> Tensor:
    """The matrix that multiplies the plain activation: ``dequantized`` (N, K) with the pre-scale folded in."""
    return dequantized if linear.pre_scale is None else dequantized * linear.pre_scale.to(dequantized)
