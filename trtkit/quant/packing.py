"""Bit layouts: ``pack`` and its inverse ``unpack``.

int4 follows ModelOpt and the TensorRT-LLM AWQ loader: byte [r, c] holds code[2r, c] in the low nibble and
code[2r + 1, c] in the high one; codes are signed, two's complement.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, (N, K) with N even -> uint8 (N / 2, K)."""
    assert codes.dtype == torch.int8
    assert codes.shape[0] % 2 == 0
    # As signed bytes: 16 * high + (low mod 16) lies in -128..127.
    return (codes[0::2] & 0x0F).add_(codes[1::2], alpha=16).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (N / 2, K) -> int8 codes (N, K)."""
    assert packed.dtype == torch.uint8
    low = (packed & 0x0F).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    codes = torch.stack([low, high], dim=1).reshape(2 * packed.shape[0], packed.shape[1])
    return torch.where(codes > 7, codes - 16, codes)
