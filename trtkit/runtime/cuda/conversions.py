"""Triton kernels around the products: activations to codes, weights to bfloat16, integer sums to outputs.

Letters: M rows of x, N output features, K input features.
"""
# ruff: noqa: N803, N806 -- constants of a kernel are in capitals, as are the sizes of its tensors
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from trtkit.runtime.cuda.dependent import started
from trtkit.runtime.cuda.products import activation_codes, codes_of

__all__ = ["expand_words", "quantize_activations", "rescale"]


@triton.jit
def quantize_activations(
    x_ptr, pre_ptr, inverse_ptr, codes_ptr, K,
    PRE: tl.constexpr, BLOCK: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """Row ``program_id(0)`` of x (M, K), times ``pre`` (K,), to int8 or e4m3 codes of a static step."""
    started(early)
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + k, mask=k < K, other=0.0).to(tl.float32)
    if PRE:
        x = x * tl.load(pre_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    codes = activation_codes(x, tl.load(inverse_ptr), codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + row + k, codes, mask=k < K)


@triton.jit
def expand_words(
    w_ptr, ratio_ptr, scale_ptr, out_ptr, N, K, WIDTH, ratio_stride, COLUMNS: tl.constexpr, BITS: tl.constexpr
):
    """64 words of ``COLUMNS`` rows of int8 or int4 codes to bfloat16 numbers (N, K)."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(1)
    depth = tl.arange(0, 64)
    inside = (n < N)[:, None]
    words = tl.load(w_ptr + n[:, None].to(tl.int64) * WIDTH + (block * 64 + depth)[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    PARTS: tl.constexpr = 16 // BITS
    for part in tl.static_range(PARTS):
        factor = scale
        if BITS == 4:
            factor *= tl.load(ratio_ptr + (block * 2 + part // 2) * ratio_stride + n, mask=n < N, other=0.0)
        values = codes_of(words, BITS, part).to(tl.float32) * factor[:, None]
        k = (block * PARTS + part) * 64 + depth
        where = out_ptr + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(where, values.to(tl.bfloat16), mask=inside & (k < K)[None, :])


@triton.jit
def rescale(sums_ptr, scale_ptr, bias_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """Row ``program_id(0)`` of int32 sums (M, N) times the scale of each column, plus its bias."""
    row = tl.program_id(0).to(tl.int64) * N
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y = tl.load(sums_ptr + row + n, mask=inside, other=0).to(tl.float32) * tl.load(
        scale_ptr + n, mask=inside, other=0.0
    )
    y += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + row + n, y.to(out_ptr.dtype.element_ty), mask=inside)
