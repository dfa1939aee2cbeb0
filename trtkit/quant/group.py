"""Quantize the linears that read one input together: q, k, v are one product at run time, and so are gate and up.

Letters: N rows, K inputs, G = K / 128 groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.quant.tensor import LinearWeights, QuantTensor, quantize_fp8, quantize_int4, quantize_int8
from trtkit.scheme import QuantScheme

__all__ = ["GroupScales", "effective_weight", "quantize_group"]

_BLOCK_VALUES = 1 << 20
"""Weights quantized at a time: the float32 copies then stay in the CPU's cache, and memory stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScales:
    """What calibration decides for one product; empty for formats that need no data."""

    pre_scale: Tensor | None = None
    """(K,) in the model's dtype: multiplies the activation; the weights are divided by it."""
    input_scale: Tensor | None = None
    """float32 ()."""
    clips: tuple[Tensor, ...] | None = None
    """int4, one per part: (N, G), shrinks each group's range."""


def quantize_group(parts: Sequence[LinearWeights], scheme: QuantScheme, scales: GroupScales) -> list[LinearWeights]:
    """The parts of one product, each dense, in the format of ``scheme`` with shared scales."""
    if scheme.weight_format == "bf16":
        return list(parts)
    amax = None
    if scheme.weight_format == "fp8":
        amax = torch.stack([part.weight.data.abs().amax() for part in parts]).amax().float()
    clips = scales.clips or (None,) * len(parts)
    return [
        LinearWeights(
            weight=_quantize(part.weight.data, scheme, scales.pre_scale, amax, clip),
            bias=part.bias,
            input_scale=scales.input_scale,
            pre_scale=scales.pre_scale,
        )
        for part, clip in zip(parts, clips, strict=True)
    ]


def _quantize(
    weight: Tensor, scheme: QuantScheme, pre_scale: Tensor | None, amax: Tensor | None, clip: Tensor | None
) -> QuantTensor:
    rows, width = weight.shape
    # An even number of rows: int4 packs pairs.
    step = max(2, _BLOCK_VALUES // width // 2 * 2)
    blocks: list[QuantTensor] = []
    for start in range(0, rows, step):
        block = weight[start : start + step]
        if pre_scale is not None:
            block = block.float() / pre_scale.float()
        if scheme.weight_format == "fp8":
            blocks.append(quantize_fp8(block, amax=amax))
        elif scheme.weight_format == "int8":
            blocks.append(quantize_int8(block, steps=127 if scheme.activations == "int8" else 128))
        else:
            assert scheme.group_size is not None
            part = None if clip is None else clip[start : start + step]
            blocks.append(quantize_int4(block, group_size=scheme.group_size, clip=part))
    scales = [block.scale for block in blocks if block.scale is not None]
    return dataclasses.replace(
        blocks[0],
        data=torch.cat([block.data for block in blocks]),
        scale=scales[0] if scheme.weight_format == "fp8" else torch.cat(scales),
        shape=(rows, width),
    )


def effective_weight(linear: LinearWeights, dequantized: Tensor) -> Tensor:
    """The matrix that multiplies the plain activation: ``dequantized`` (N, K) with the pre-scale folded in."""
    return dequantized if linear.pre_scale is None else dequantized * linear.pre_scale.to(dequantized)
