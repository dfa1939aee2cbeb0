"""The quantizers of ``tensor.py`` for whole matrices: the same bits, in blocks of rows that stay in the CPU's cache.

The definitions make five to eight float32 copies of what they are given. Here two buffers of one block hold every
intermediate value, which is twice as fast or more. Letters: N rows, K inputs, G = K / 128 groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trtkit.quant.packing import pack_int4
from trtkit.quant.tensor import FP8_MAX, TINY, QuantTensor

__all__ = ["fp8_matrix", "int4_matrix", "int8_matrix", "largest_magnitude"]

_BLOCK_VALUES = 1 << 18
"""Two float32 buffers of that many values are 2 MiB."""


def largest_magnitude(weight: Tensor) -> Tensor:
    """max |w|, () in the weight's dtype, without a copy of the weight."""
    return torch.stack(torch.aminmax(weight)).abs().amax()


def int8_matrix(
    weight: Tensor, *, steps: int, pre_scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> QuantTensor:  # fmt: skip
    """``quantize_int8`` of ``weight / pre_scale``: weight (N, K), pre_scale (K,). ``dtype`` is the model's, if the
    weight has another."""
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    exact = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for part, wide, spare in _blocks(weight, pre_scale):
        scale = exact[part]
        torch.div(torch.abs(wide, out=spare).amax(dim=1), steps, out=scale).clamp_min_(TINY)
        wide.div_(scale[:, None])
        # Halves away from zero: one half more in the value's own direction, and the cast cuts the fraction off.
        wide.add_(torch.sign(wide, out=spare), alpha=0.5).clamp_(-128, 127)
        codes[part].copy_(wide)
    stored = (dtype or weight.dtype) if pre_scale is None else torch.float32
    scale = exact.to(stored).float().clamp_min_(TINY) if steps == 128 else exact
    return QuantTensor(data=codes, scale=scale, format="int8", shape=(rows, width))


def fp8_matrix(weight: Tensor, *, amax: Tensor, pre_scale: Tensor | None = None) -> QuantTensor:
    """``quantize_fp8`` of ``weight / pre_scale`` with the scale that ``amax`` () gives."""
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = (amax.float() / FP8_MAX).clamp_min(TINY)
    for part, wide, _ in _blocks(weight, pre_scale):
        codes[part].copy_(wide.div_(scale).clamp_(-FP8_MAX, FP8_MAX))
    return QuantTensor(data=codes, scale=scale, format="fp8", shape=(rows, width))


def int4_matrix(
    weight: Tensor, *, group_size: int, pre_scale: Tensor | None = None, clip: Tensor | None = None
) -> QuantTensor:
    """``quantize_int4`` of ``weight / pre_scale``: clip (N, G)."""
    rows, width = weight.shape
    groups = width // group_size
    packed = torch.empty(rows // 2, width, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    for part, wide, spare in _blocks(weight, pre_scale):
        amax = torch.abs(wide, out=spare).view(-1, groups, group_size).amax(dim=2)
        if clip is not None:
            amax = amax * clip[part]
        mine = torch.div(amax, 7, out=scale[part]).clamp_min_(TINY)
        wide.view(-1, groups, group_size).div_(mine[:, :, None]).round_().clamp_(-8, 7)
        packed[part.start // 2 : part.stop // 2] = pack_int4(wide.to(torch.int8))
    return QuantTensor(data=packed, scale=scale, format="int4", shape=(rows, width))


def _blocks(weight: Tensor, pre_scale: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their ``weight / pre_scale`` in float32, and a buffer of the same shape: both are overwritten by the next.

    Blocks have an even number of rows, but the last of a matrix with an odd number: int4 packs pairs.
    """
    rows, width = weight.shape
    step = min(max(2, _BLOCK_VALUES // width // 2 * 2), rows)
    wide, spare = torch.empty(2, step, width, dtype=torch.float32, device=weight.device).unbind()
    divisor = None if pre_scale is None else pre_scale.float()
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        count = part.stop - start
        block = wide[:count].copy_(weight[part])
        if divisor is not None:
            block.div_(divisor)
        yield part, block, spare[:count]
