"""Quantized tensors: ``quantize`` and ``dequantize``, one pure function per format, and the reference product.

Letters: N output features (rows), K input features, G = K / 128 groups, T tokens. Sources of the formats: the
TensorRT-LLM weight-only loader (``symmetric_quantize_last_axis``) for int8, ModelOpt's export for the others; the exact
rules stand in ``docs/formats.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.quant.packing import pack_int4, unpack_int4
from trtkit.scheme import WeightFormat

__all__ = [
    "FP8_MAX",
    "TINY",
    "LinearWeights",
    "QuantTensor",
    "concat_rows",
    "dense",
    "dequantize",
    "linear_reference",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
]

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

TINY = torch.finfo(torch.float32).tiny
"""Smallest scale: that of zero weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantTensor:
    """A weight matrix (N, K) in one of the formats.

    | format | data                  | scale            | value                        |
    |--------|-----------------------|------------------|------------------------------|
    | bf16   | float (N, K)          | None             | data                         |
    | int8   | int8 (N, K)           | float32 (N,)     | data * scale[:, None]        |
    | fp8    | float8_e4m3fn (N, K)  | float32 ()       | data * scale                 |
    | int4   | uint8 (N / 2, K)      | float32 (N, G)   | code * scale of its group    |
    """

    data: Tensor
    scale: Tensor | None
    format: WeightFormat
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearWeights:
    """One linear layer: y = W (pre_scale * x) + bias, with x quantized by ``input_scale`` where that is given."""

    weight: QuantTensor
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    """float32 (): static activation scale; x is rounded to multiples of it, int8 or e4m3 as the weights."""
    pre_scale: Tensor | None = None
    """(K,): multiplies the activation first (SmoothQuant, AWQ)."""


def _round_half_away(x: Tensor) -> Tensor:
    """C's ``round``, which the TensorRT-LLM loader uses; torch rounds half to even."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def dense(weight: Tensor) -> QuantTensor:
    """An unquantized weight (N, K)."""
    return QuantTensor(data=weight, scale=None, format="bf16", shape=(weight.shape[0], weight.shape[1]))


def quantize_int8(weight: Tensor, *, steps: int) -> QuantTensor:
    """Symmetric int8 per output row: scale = amax / steps, codes in -128..127.

    ``steps`` is 128 for W8A16 (the TensorRT-LLM loader's rule; the stored scale is rounded to the weight's dtype, the
    codes are made with the unrounded one) and 127 for SmoothQuant (ModelOpt's rule, scale kept in float32).
    """
    wide = weight.float()
    exact = (wide.abs().amax(dim=1) / steps).clamp_min(TINY)
    codes = _round_half_away(wide / exact[:, None]).clamp_(-128, 127).to(torch.int8)
    scale = exact.to(weight.dtype).float().clamp_min(TINY) if steps == 128 else exact
    return QuantTensor(data=codes, scale=scale, format="int8", shape=(weight.shape[0], weight.shape[1]))


def quantize_fp8(weight: Tensor, *, amax: Tensor | None = None) -> QuantTensor:
    """e4m3 with one scale for the whole tensor: amax / 448.

    ``amax`` is the joint maximum of tensors that are fused later (q, k, v; gate, up), so that they share the scale.
    """
    wide = weight.float()
    top = wide.abs().amax() if amax is None else amax.float()
    scale = (top / FP8_MAX).clamp_min(TINY)
    codes = (wide / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return QuantTensor(data=codes, scale=scale, format="fp8", shape=(weight.shape[0], weight.shape[1]))


def quantize_int4(weight: Tensor, *, group_size: int = 128, clip: Tensor | None = None) -> QuantTensor:
    """Symmetric int4 over groups of ``group_size`` inputs: scale = amax / 7, codes in -8..7, packed in pairs of rows.

    ``clip`` (N, G), each in (0, 1], shrinks a group's amax before the scale is made.
    """
    rows, width = weight.shape
    groups = weight.float().reshape(rows, width // group_size, group_size)
    amax = groups.abs().amax(dim=2)
    if clip is not None:
        amax = amax * clip
    scale = (amax / 7).clamp_min(TINY)
    codes = torch.round(groups / scale[:, :, None]).clamp_(-8, 7).to(torch.int8).reshape(rows, width)
    return QuantTensor(data=pack_int4(codes), scale=scale, format="int4", shape=(rows, width))


def dequantize(tensor: QuantTensor) -> Tensor:
    """The matrix that the codes stand for, float32 (N, K)."""
    if tensor.format == "bf16":
        return tensor.data.float()
    assert tensor.scale is not None
    if tensor.format == "int8":
        return tensor.data.float() * tensor.scale[:, None]
    if tensor.format == "fp8":
        return tensor.data.float() * tensor.scale
    rows, width = tensor.shape
    codes = unpack_int4(tensor.data).float().reshape(rows, tensor.scale.shape[1], -1)
    return (codes * tensor.scale[:, :, None]).reshape(rows, width)


def quantize_activation(x: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """x rounded to the grid of the activation format, as float32 values (not codes)."""
    steps = x.float() / scale
    if format == "fp8":
        return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return torch.round(steps).clamp(-128, 127) * scale


def linear_reference(x: Tensor, linear: LinearWeights) -> Tensor:
    """The product by definition, in float32: x (T, K) -> (T, N). What every kernel is tested against."""
    wide = x.float()
    if linear.pre_scale is not None:
        wide = wide * linear.pre_scale.float()
    if linear.input_scale is not None:
        wide = quantize_activation(wide, linear.input_scale, linear.weight.format)
    product = wide @ dequantize(linear.weight).T
    return product if linear.bias is None else product + linear.bias.float()


def concat_rows(parts: Sequence[LinearWeights]) -> LinearWeights:
    """Fuse linears that read the same input (q, k, v; gate, up) into one with stacked rows.

    The parts share format, pre_scale and input_scale; per-tensor scales must be equal. Both are the writer's duty, so
    a breach is a programming error here.
    """
    first = parts[0]
    weights = [part.weight for part in parts]
    assert all(weight.format == first.weight.format for weight in weights)
    scale = first.weight.scale
    if scale is not None:
        scales = [weight.scale for weight in weights if weight.scale is not None]
        if scale.ndim == 0:
            assert all(torch.equal(other, scale) for other in scales), "fused linears must share their fp8 scale"
        else:
            scale = torch.cat(scales)
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts))
    return LinearWeights(
        weight=QuantTensor(
            data=torch.cat([weight.data for weight in weights]),
            scale=scale,
            format=first.weight.format,
            shape=(sum(weight.shape[0] for weight in weights), first.weight.shape[1]),
        ),
        bias=torch.cat(biases) if biases else None,
        input_scale=first.input_scale,
        pre_scale=first.pre_scale,
    )
