"""Where weight-only codes lie on the device: words of 16 bits, each with codes of several tiles of 64 inputs.

    int8   word j of a block of 128 inputs: input j in the low byte, input 64 + j in the high one
    int4   word j of a block of 256 inputs: inputs j, 64 + j, 128 + j, 192 + j from the lowest nibble up; code + 8

A tile of words has the layout that bfloat16 has in the tensor cores' registers, so its bytes or nibbles become bfloat16
tiles in place, two codes per instruction, and each is multiplied with a plain slice of x.

The group scales of int4, float32 in the checkpoint, are kept as a float32 scale per row, applied to the sum as for
int8, and a float16 ratio per group in (0, 1]: half the bytes, and 8 times more exact than bfloat16 scales.

Letters: N rows, K inputs, G = K / 128 groups, B blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUP", "TILE", "from_words", "group_ratios", "to_words"]

GROUP = 128
"""Inputs of int4 that share a scale."""
TILE = 64
"""Inputs between the codes of one word."""


def to_words(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (N, K), signed, of ``bits`` 4 or 8 -> int16 (N, B * 64); a last block is filled with zero codes."""
    parts = 16 // bits
    width = codes.shape[1]
    codes = F.pad(codes, (0, -width % (parts * TILE)))
    if bits == 4:
        codes = codes + 8
    tiles = codes.reshape(codes.shape[0], -1, parts, TILE)
    words = torch.zeros_like(tiles[:, :, 0], dtype=torch.int16)
    for part in range(parts):
        words |= (tiles[:, :, part].to(torch.int16) & ((1 << bits) - 1)) << (bits * part)
    return words.reshape(codes.shape[0], -1)


def from_words(words: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of :func:`to_words` for K = ``width``."""
    tiles = words.reshape(words.shape[0], -1, 1, TILE)
    parts = [(tiles >> (bits * part)) & ((1 << bits) - 1) for part in range(16 // bits)]
    codes = torch.cat(parts, dim=2).reshape(words.shape[0], -1)[:, :width]
    return (codes - 8).to(torch.int8) if bits == 4 else codes.to(torch.int8)


def group_ratios(scale: Tensor) -> tuple[Tensor, Tensor]:
    """float32 group scales (N, G) -> float16 ratios (G or G + 1, N), even in number, and float32 row scales (N,)."""
    row_scale = scale.float().amax(dim=1)
    ratios = (scale.float() / row_scale[:, None]).half()
    return F.pad(ratios, (0, ratios.shape[1] % 2)).T.contiguous(), row_scale
