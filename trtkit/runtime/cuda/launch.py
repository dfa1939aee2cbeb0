"""Launches: a weight on a device, a choice, and the kernels' arguments.

Letters: M rows of x, N output features, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights
from trtkit.runtime.cuda.choices import Choice, Kind, Shape
from trtkit.runtime.cuda.conversions import expand_words, quantize_activations, rescale
from trtkit.runtime.cuda.dependent import FUSED, dependent
from trtkit.runtime.cuda.layout import TILE, group_ratios, to_words
from trtkit.runtime.cuda.products import one_row, product, product_words
from trtkit.runtime.cuda.workspace import workspace_of

__all__ = ["DeviceWeights", "kind_of", "place", "probe", "run"]

_BLOCK = 1024
_COLUMNS = 32
"""Of one program that expands weights."""
_EXPANDED_VALUES = 1 << 26
"""Most weights that stand expanded at a time, 128 MiB of them: the 778 million of a 14B's lm_head would take all that
an engine leaves beside its keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeights:
    """One linear on its device: the output is (codes of x) (codes of W)^T * scale + bias."""

    shape: Shape
    codes: Tensor
    """(N, K) as stored; int8 and int4: int16 words (N, B * 64) as :mod:`layout` makes them."""
    scale: Tensor
    """float32 (N,): of the weight row, times the activation's step where there is one; ones for bf16."""
    bias: Tensor
    """float32 (N,): zeros where there is none."""
    bits: int | None = None
    """Of a code in a word; None where codes are not in words."""
    ratios: Tensor | None = None
    """float16 (G, N), int4: group scale over row scale."""
    pre_scale: Tensor | None = None
    inverse_step: Tensor | None = None
    """float32 (): one over the activation's step."""
    tensor_scales: tuple[Tensor, Tensor] | None = None
    """float32 (), (): the steps of x and of W, for cuBLAS's e4m3 product."""
    rounded_bias: Tensor | None = None
    """bfloat16 (N,), for cuBLAS."""

    @property
    def device(self) -> torch.device:
        return self.codes.device


def kind_of(weights: LinearWeights) -> Kind:
    """The kind of product that a stored linear asks for."""
    kind = weights.weight.format
    return "int8-sq" if kind == "int8" and weights.input_scale is not None else kind


def place(weights: LinearWeights, device: torch.device) -> DeviceWeights:
    """Copy a linear to the device, in the layout of the kernels."""
    stored, kind = weights.weight, kind_of(weights)
    columns, depth = stored.shape
    codes, bits, ratios, steps = stored.data.to(device), None, None, None
    scale = torch.ones(columns, device=device)
    if kind == "bf16":
        codes = codes.to(torch.bfloat16)
    elif kind == "int4":
        assert stored.scale is not None
        bits = 4
        codes = to_words(unpack_int4(codes), bits)
        ratios, scale = group_ratios(stored.scale.to(device))
    else:
        assert stored.scale is not None
        scale = stored.scale.float().to(device)
        if weights.input_scale is not None:
            step = weights.input_scale.float().reshape(()).to(device)
            steps = (step, scale) if scale.ndim == 0 else None
            scale = scale * step
        scale = scale.expand(columns).contiguous()
        if kind == "int8":
            bits = 8
            codes = to_words(codes, bits)
    bias = None if weights.bias is None else weights.bias.to(device)
    return DeviceWeights(
        shape=Shape(
            kind=kind, columns=columns, depth=depth,
            prepared_input=weights.pre_scale is not None or weights.input_scale is not None,
        ),
        codes=codes.contiguous(),
        scale=scale,
        bias=torch.zeros(columns, device=device) if bias is None else bias.float().contiguous(),
        bits=bits,
        ratios=ratios,
        pre_scale=None if weights.pre_scale is None else weights.pre_scale.to(device).contiguous(),
        inverse_step=None if weights.input_scale is None else (1 / weights.input_scale.float()).to(device),
        tensor_scales=steps,
        rounded_bias=None if bias is None else bias.to(torch.bfloat16),
    )  # fmt: skip


def probe(device: torch.device) -> None:
    """Compile and run a small kernel; raises whatever Triton raises where that cannot be."""
    sums, scale = torch.ones((1, 16), dtype=torch.int32, device=device), torch.ones(16, device=device)
    out = torch.empty((1, 16), dtype=torch.bfloat16, device=device)
    rescale[(1, 1)](sums, scale, scale, out, 16, BLOCK=_BLOCK, num_warps=4, **FUSED)
    assert out[0, 0].item() == 2


def run(x: Tensor, weights: DeviceWeights, choice: Choice) -> Tensor:
    """x bfloat16 (M, K), contiguous, M > 0 -> bfloat16 (M, N)."""
    if choice.kernel == "one_row":
        return _one_row(x, weights, choice)
    prepared = x if choice.fused else prepare_input(x, weights)
    if choice.kernel == "library":
        return _library(prepared, weights)
    return _product(prepared, weights, choice)


def prepare_input(x: Tensor, weights: DeviceWeights) -> Tensor:
    """The scale in front, and the codes of x where the product takes codes."""
    pre = weights.pre_scale
    if weights.inverse_step is None:
        return x if pre is None else (x.float() * pre).to(x.dtype) if pre.dtype == torch.float32 else x * pre
    codes = torch.empty_like(x, dtype=weights.codes.dtype)
    rows, depth = x.shape
    quantize_activations[(rows, -(-depth // _BLOCK))](
        x, x if pre is None else pre, weights.inverse_step, codes, depth,
        PRE=pre is not None, BLOCK=_BLOCK, num_warps=4, **FUSED, **dependent(x.device),
    )  # fmt: skip
    return codes


def _product(x: Tensor, weights: DeviceWeights, choice: Choice) -> Tensor:
    rows, depth = x.shape
    columns = weights.shape.columns
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    tiles_m, tiles_n = -(-rows // choice.rows), -(-columns // choice.columns)
    total_steps = -(-depth // choice.depth)
    steps = -(-total_steps // choice.splits)
    splits = -(-total_steps // steps)
    space = workspace_of(x.device)
    if splits > 1:
        cells = tiles_m * tiles_n * splits * choice.rows * choice.columns
        space.reserve(partial=cells, tiles=tiles_m * tiles_n)
    pre = weights.pre_scale if choice.fused else None
    after = (out, space.partial, space.arrived)
    tile = {
        "ROWS": choice.rows, "COLUMNS": choice.columns, "SWAP": choice.swap, "EVEN": depth % choice.depth == 0,
        "PRE": pre is not None, "num_warps": choice.warps, "num_stages": choice.stages, **FUSED,
        **dependent(x.device),
    }  # fmt: skip
    grid = (tiles_m, tiles_n, splits)
    if weights.bits is not None:
        assert choice.depth * weights.bits == 16 * TILE
        product_words[grid](
            x, weights.codes, weights.scale if weights.ratios is None else weights.ratios, weights.scale, weights.bias,
            x if pre is None else pre, *after,
            rows, columns, depth, weights.codes.shape[1], steps, splits, BITS=weights.bits, **tile,
        )  # fmt: skip
        return out
    quantize = choice.fused and weights.inverse_step is not None
    product[grid](
        x, weights.codes, weights.scale, weights.bias, x if pre is None else pre,
        weights.inverse_step if quantize else weights.scale, *after,
        rows, columns, depth, steps, splits, DEPTH=choice.depth, QUANTIZE=quantize, **tile,
    )  # fmt: skip
    return out


def _one_row(x: Tensor, weights: DeviceWeights, choice: Choice) -> Tensor:
    columns, depth = weights.shape.columns, weights.shape.depth
    out = torch.empty((1, columns), dtype=torch.bfloat16, device=x.device)
    pre = weights.pre_scale
    one_row[(-(-columns // choice.columns),)](
        x, weights.codes, weights.scale, weights.bias, x if pre is None else pre, out, columns, depth,
        COLUMNS=choice.columns, DEPTH=choice.depth, EVEN=depth % choice.depth == 0, PRE=pre is not None,
        num_warps=choice.warps, num_stages=choice.stages, **FUSED, **dependent(x.device),
    )  # fmt: skip
    return out


def _library(x: Tensor, weights: DeviceWeights) -> Tensor:
    """Many rows; x is prepared."""
    kind, codes = weights.shape.kind, weights.codes
    if kind == "bf16":
        return F.linear(x, codes, weights.rounded_bias)
    if kind == "int8-sq":
        return _rescaled(torch._int_mm(x, codes.T), weights)
    if kind == "fp8" and weights.inverse_step is not None:
        assert weights.tensor_scales is not None
        step, scale = weights.tensor_scales
        out: Tensor = torch._scaled_mm(
            x, codes.T, scale_a=step, scale_b=scale, bias=weights.rounded_bias, out_dtype=torch.bfloat16
        )
        return out
    return _by_parts(x, weights)


def _by_parts(x: Tensor, weights: DeviceWeights) -> Tensor:
    """The product with weights that cuBLAS has no kernel for, as many columns at a time as may stand expanded."""
    columns, bias = weights.shape.columns, weights.rounded_bias
    parts = -(-columns * weights.shape.depth // _EXPANDED_VALUES)
    if parts == 1:
        return F.linear(x, _expanded(weights, slice(0, columns)), bias)
    out = torch.empty((x.shape[0], columns), dtype=torch.bfloat16, device=x.device)
    step = -(-columns // (parts * _COLUMNS)) * _COLUMNS
    for start in range(0, columns, step):
        part = slice(start, min(start + step, columns))
        matrix = _expanded(weights, part).T
        if bias is None:
            torch.mm(x, matrix, out=out[:, part])
        else:
            torch.addmm(bias[part], x, matrix, out=out[:, part])
    return out


def _rescaled(sums: Tensor, weights: DeviceWeights) -> Tensor:
    out = torch.empty_like(sums, dtype=torch.bfloat16)
    rows, columns = sums.shape
    grid = (rows, -(-columns // _BLOCK))
    rescale[grid](sums, weights.scale, weights.bias, out, columns, BLOCK=_BLOCK, num_warps=4, **FUSED)
    return out


def _expanded(weights: DeviceWeights, part: slice) -> Tensor:
    """The weights of these columns as bfloat16 numbers, in the shared workspace: good until the next call."""
    columns, depth = part.stop - part.start, weights.shape.depth
    space = workspace_of(weights.device)
    space.reserve(expanded=columns * depth)
    out = space.expanded[: columns * depth].view(columns, depth)
    codes, scale = weights.codes[part], weights.scale[part]
    if weights.bits is None:
        return torch.mul(codes.to(torch.bfloat16), scale[:, None], out=out)
    width = codes.shape[1]
    expand_words[(-(-columns // _COLUMNS), width // TILE)](
        codes, scale if weights.ratios is None else weights.ratios[:, part], scale, out,
        columns, depth, width, weights.shape.columns, COLUMNS=_COLUMNS, BITS=weights.bits, num_warps=4, **FUSED,
    )  # fmt: skip
    return out
