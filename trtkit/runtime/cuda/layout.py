"""Where int4 codes lie on the device: a byte holds one code of each of two neighbouring groups.

A tile of 128 bytes of a row is then two whole groups of 128 inputs: the low nibbles are one, the high nibbles the
other, and each is multiplied with plain slices of x; nothing has to be interleaved in registers. Codes are stored plus
8, as the kernel's conversion wants them.

The group scales, float32 in the checkpoint, are kept as a float32 scale per row, applied to the sum as for int8, and a
float16 ratio per group in (0, 1]: half the bytes, and 8 times more exact than rounding the scales to bfloat16.

Letters: N rows, K inputs, G = K / 128 groups, B = ceil(K / 256) pairs of groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUP", "PairedInt4", "pair_groups", "split_groups"]

GROUP = 128
"""Inputs that share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedInt4:
    """An int4 weight as the kernel reads it."""

    packed: Tensor
    """uint8 (N, B * 128): byte j of pair p holds input 256 p + j low and 256 p + 128 + j high, each code + 8."""
    ratios: Tensor
    """float16 (2 B, N): group scale over row scale; 0 for a group that only fills the last pair."""
    row_scale: Tensor
    """float32 (N,): the largest group scale of a row."""


def pair_groups(codes: Tensor, scale: Tensor) -> PairedInt4:
    """int8 codes (N, K) in -8..7 and their scale (N, G), K a multiple of 128."""
    rows, width = codes.shape
    assert scale.shape == (rows, width // GROUP)
    row_scale = scale.float().amax(dim=1)
    ratios = (scale.float() / row_scale[:, None]).half()
    shifted = (codes + 8).view(torch.uint8)
    if width % (2 * GROUP):
        shifted, ratios = F.pad(shifted, (0, GROUP), value=8), F.pad(ratios, (0, 1))
    pairs = shifted.reshape(rows, -1, 2, GROUP)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(rows, -1)
    return PairedInt4(packed=packed.contiguous(), ratios=ratios.T.contiguous(), row_scale=row_scale)


def split_groups(paired: PairedInt4, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pair_groups` for K = ``width``: codes (N, K), exactly, and scale (N, G), as the kernel sees it."""
    rows = paired.packed.shape[0]
    bytes_ = paired.packed.reshape(rows, -1, 1, GROUP)
    codes = torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).reshape(rows, -1)[:, :width].to(torch.int8) - 8
    scale = paired.ratios.T.float() * paired.row_scale[:, None]
    return codes, scale[:, : width // GROUP]
