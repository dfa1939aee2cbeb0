"""Triton kernels around the products: activations to codes, weights to bfloat16, integer sums to outputs.

Letters: M rows of x, N output features, K input features.
"""
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from trtkit.runtime.cuda.products import activation_codes, high_codes, low_codes

__all__ = ["expand_int4", "expand_int8", "quantize_activations", "rescale"]


@triton.jit(do_not_specialize=["count"])
def quantize_activations(x_ptr, pre_ptr, inverse_ptr, codes_ptr, count, K, PRE: tl.constexpr, BLOCK: tl.constexpr):
    """``count`` values of x (M, K), times ``pre`` (K,), to int8 or e4m3 codes of a static step."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if PRE:
        x = x * tl.load(pre_ptr + at % K, mask=inside, other=0.0).to(tl.float32)
    codes = activation_codes(x, tl.load(inverse_ptr), codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + at, codes, mask=inside)


@triton.jit
def expand_int8(w_ptr, scale_ptr, out_ptr, K, BLOCK: tl.constexpr):
    """Row ``program_id(0)`` of int8 codes (N, K) to bfloat16 numbers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(w_ptr + row * K + k, mask=k < K, other=0)
    values = codes.to(tl.bfloat16).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * K + k, values.to(tl.bfloat16), mask=k < K)


@triton.jit
def expand_int4(w_ptr, ratio_ptr, scale_ptr, out_ptr, N, K, WIDTH, COLUMNS: tl.constexpr):
    """One pair of groups of ``COLUMNS`` rows of paired int4 codes to bfloat16 numbers (N, K)."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.program_id(1)
    depth = tl.arange(0, 128)
    inside = (n < N)[:, None]
    packed = tl.load(w_ptr + n[:, None].to(tl.int64) * WIDTH + (pair * 128 + depth)[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    ratios = ratio_ptr + pair * 2 * N + n
    low = low_codes(packed).to(tl.float32) * (tl.load(ratios, mask=n < N, other=0.0) * scale)[:, None]
    high = high_codes(packed).to(tl.float32) * (tl.load(ratios + N, mask=n < N, other=0.0) * scale)[:, None]
    k = pair * 256 + depth
    out = out_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(out, low.to(tl.bfloat16), mask=inside & (k < K)[None, :])
    tl.store(out + 128, high.to(tl.bfloat16), mask=inside & (k + 128 < K)[None, :])


@triton.jit(do_not_specialize=["count"])
def rescale(sums_ptr, scale_ptr, bias_ptr, out_ptr, count, N, BLOCK: tl.constexpr):
    """``count`` int32 sums (M, N) times the scale of their column, plus its bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    n = at % N
    y = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32) * tl.load(scale_ptr + n, mask=inside, other=0.0)
    y += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
