"""Triton kernels for y = x W^T with few rows, where reading W is nearly all of the time.

What has to hold for the weights to arrive at the speed of the memory (H200: 4.8 TB/s over 132 SMs, 18 bytes per clock
and SM, about 25 KB per SM in flight to cover 700 ns):

- every program streams its rows of W through shared memory with 16-byte asynchronous copies, ``stages`` tiles ahead;
  two or three programs per SM keep 50 to 100 KB in flight;
- there are enough programs for all SMs: K is split where N alone gives too few. The parts of a tile go to a workspace;
  the program that arrives last adds them, in the order of K, so the sum never depends on who was last. It costs two
  trips to the L2 instead of a second launch, which for the smallest products would be a third of their time;
- x is read once per tile of W, from the L2. ``columns`` must grow with the rows: at 16 rows of bf16, 128 rows of int8
  weights have a quarter as many bytes to fetch for x as for W;
- dequantization fits beside the loads: at full speed 18 int8 or 36 int4 weights per clock and SM pass through a machine
  that issues 128 lanes. int8 takes 2.5 instructions per weight (Triton's own bf16 trick), int4 1.6 (below), e4m3 and
  W8A8 none, their codes go to the tensor cores as they are.

Products run on the tensor cores even for one row (16 rows are the least, empty ones cost nothing but idle lanes): with
``swap`` W is the left operand, which is how Hopper's wgmma takes 64 rows of W by 16 columns of x from shared memory;
without it mma.sync takes W as the right operand from registers, the better place for weights that are dequantized.
A row of the result depends on that row of x alone, and not on M within one configuration.

``one_row`` is the plain dot product without tensor cores or shared memory, for M = 1.

Letters: M rows of x, N output features, K input features.
"""
# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["one_row", "product", "product_int4"]

# 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even, as torch.round does.
_ROUND = tl.constexpr(12582912.0)

# A nibble u under the bf16 pattern of 128 is the number 128 + u; u is code + 8, so 136 is taken off, exactly.
_LOW = tl.constexpr(
    "{ .reg .b32 a, b, one, off;"
    " mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308;"
    " prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342;"
    " lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;"
    " fma.rn.bf16x2 $0, a, one, off; fma.rn.bf16x2 $1, b, one, off; }"
)
_HIGH = tl.constexpr(
    "{ .reg .b32 a, b, one, off;"
    " mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308;"
    " shr.b32 b, $2, 4;"
    " prmt.b32 a, b, 0, 0x4140; prmt.b32 b, b, 0, 0x4342;"
    " lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;"
    " fma.rn.bf16x2 $0, a, one, off; fma.rn.bf16x2 $1, b, one, off; }"
)


@triton.jit
def low_codes(packed):
    """The codes in the low nibbles, as bf16."""
    return tl.inline_asm_elementwise(_LOW, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def high_codes(packed):
    """The codes in the high nibbles, as bf16."""
    return tl.inline_asm_elementwise(_HIGH, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def activation_codes(x, inverse, code_type: tl.constexpr):
    """float32 x as codes of a static step size, given its inverse."""
    steps = x * inverse
    if code_type == tl.int8:
        steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
        steps = (steps + _ROUND) - _ROUND
    else:
        steps = tl.minimum(tl.maximum(steps, -448.0), 448.0)
    return steps.to(code_type)


@triton.jit
def _load(pointers, mask):
    """Zero where the mask does not hold, in the type of what is read (an integer zero is none to float8)."""
    if pointers.dtype.element_ty.is_int():
        values = tl.load(pointers, mask=mask, other=0)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values


@triton.jit
def _input(pointers, mask, pre_pointers, pre_mask, inverse, code_type: tl.constexpr, PRE: tl.constexpr):
    """A tile of x, with the scale in front and the quantization where they are not done beforehand."""
    x = _load(pointers, mask)
    if PRE:
        scaled = x.to(tl.float32) * _load(pre_pointers, pre_mask).to(tl.float32)[None, :]
        # Codes are made of the product as it is; otherwise it is an activation, rounded like any other.
        x = scaled if code_type != x.dtype else scaled.to(x.dtype)
    if code_type != x.dtype:
        x = activation_codes(x.to(tl.float32), inverse, code_type)
    return x


@triton.jit
def _multiply(x, w, acc, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _write(y, m, n, M, N, scale_ptr, bias_ptr, out_ptr):
    inside = n < N
    scale, bias = tl.load(scale_ptr + n, mask=inside, other=0.0), tl.load(bias_ptr + n, mask=inside, other=0.0)
    y = y * scale[None, :] + bias[None, :]
    where = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & inside[None, :])


@triton.jit
def _finish(
    y, m, n, M, N, tile, split, splits, scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a finished tile; of a split one, leave the part, and whoever comes last adds them up."""
    if splits == 1:
        _write(y, m, n, M, N, scale_ptr, bias_ptr, out_ptr)
    else:
        cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        first = partial_ptr + tile.to(tl.int64) * splits * ROWS * COLUMNS
        here = (m[:, None] < M) & (n[None, :] < N)
        tl.store(first + split * (ROWS * COLUMNS) + cell, y, mask=here)
        tl.debug_barrier()  # all stores of this program come before its arrival
        arrived = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for part in range(splits):
                # Past the L1, which knows nothing of other SMs' stores.
                total += tl.load(first + part * (ROWS * COLUMNS) + cell, mask=here, other=0.0, cache_modifier=".cg")
            _write(total, m, n, M, N, scale_ptr, bias_ptr, out_ptr)
            tl.store(arrived_ptr + tile, 0)  # ready for the next launch


@triton.jit(do_not_specialize=["M", "steps", "splits"])
def product(
    x_ptr, w_ptr, scale_ptr, bias_ptr, pre_ptr, inverse_ptr, out_ptr, partial_ptr, arrived_ptr,
    M, N, K, steps, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SWAP: tl.constexpr,
    EVEN: tl.constexpr, PRE: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """bf16 or 8-bit weights (N, K), row by row as they are stored.

    x is bf16, or codes of the weights' type; with ``QUANTIZE`` it is bf16 and becomes codes here. Each of ``splits``
    parts of K is ``steps`` tiles of ``DEPTH`` inputs; ``EVEN``: K is a multiple of ``DEPTH``.
    """
    block_m, block_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block_m * ROWS + tl.arange(0, ROWS)
    n = block_n * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    first = split * steps * DEPTH
    x_pointers = x_ptr + m[:, None].to(tl.int64) * K + (first + depth)[None, :]
    w_pointers = w_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + (first + depth)[None, :]
    code_type: tl.constexpr = w_ptr.dtype.element_ty if QUANTIZE else x_ptr.dtype.element_ty
    inverse = tl.load(inverse_ptr) if QUANTIZE else 1.0
    integers: tl.constexpr = code_type == tl.int8
    acc = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.int32 if integers else tl.float32)
    for step in range(tl.minimum(steps, tl.cdiv(K, DEPTH) - split * steps)):
        k = first + step * DEPTH + depth
        inside = m[:, None] < M if EVEN else (m[:, None] < M) & (k[None, :] < K)
        x = _input(x_pointers, inside, pre_ptr + k, k < K, inverse, code_type, PRE)
        w = tl.load(w_pointers) if EVEN else _load(w_pointers, k[None, :] < K)
        acc = _multiply(x, w.to(code_type), acc, SWAP)
        x_pointers += DEPTH
        w_pointers += DEPTH
    y = (tl.trans(acc) if SWAP else acc).to(tl.float32)
    tile = block_m * tl.num_programs(1) + block_n
    _finish(
        y, m, n, M, N, tile, split, splits, scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
        ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "steps", "splits"])
def product_int4(
    x_ptr, w_ptr, ratio_ptr, scale_ptr, bias_ptr, pre_ptr, out_ptr, partial_ptr, arrived_ptr,
    M, N, K, WIDTH, steps, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr,
    EVEN: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """int4 weights as ``layout.pair_groups`` lays them out: one byte holds a code of each of two groups.

    ``WIDTH`` is the bytes of a row. A step is 128 of them: 256 inputs, two groups, each with its own product so that
    its ratio (float16, group scale over row scale, (groups, N)) multiplies 32-bit sums. Ratios are fetched a step ahead.
    """
    block_m, block_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block_m * ROWS + tl.arange(0, ROWS)
    n = block_n * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, 128)
    row = tl.minimum(n, N - 1)
    first = split * steps
    x_pointers = x_ptr + m[:, None].to(tl.int64) * K + (first * 256 + depth)[None, :]
    w_pointers = w_ptr + row[:, None].to(tl.int64) * WIDTH + (first * 128 + depth)[None, :]
    count = tl.minimum(steps, WIDTH // 128 - first)
    ratio_pointers = ratio_ptr + first * 2 * N + row
    low_ratio, high_ratio = tl.load(ratio_pointers), tl.load(ratio_pointers + N)
    acc = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)
    for step in range(count):
        k = (first + step) * 256 + depth
        w = tl.load(w_pointers)
        # The ratios after the last step are those of the last again: nothing is read past the end.
        ratio_pointers += tl.where(step + 1 < count, 2 * N, 0)
        next_low, next_high = tl.load(ratio_pointers), tl.load(ratio_pointers + N)
        inside = m[:, None] < M if EVEN else (m[:, None] < M) & (k[None, :] < K)
        x = _input(x_pointers, inside, pre_ptr + k, k < K, 1.0, x_ptr.dtype.element_ty, PRE)
        part = _multiply(x, low_codes(w), tl.zeros_like(acc), SWAP)
        acc += part * (low_ratio[:, None] if SWAP else low_ratio[None, :])
        inside = m[:, None] < M if EVEN else (m[:, None] < M) & (k[None, :] + 128 < K)
        x = _input(x_pointers + 128, inside, pre_ptr + k + 128, k + 128 < K, 1.0, x_ptr.dtype.element_ty, PRE)
        part = _multiply(x, high_codes(w), tl.zeros_like(acc), SWAP)
        acc += part * (high_ratio[:, None] if SWAP else high_ratio[None, :])
        low_ratio, high_ratio = next_low, next_high
        x_pointers += 256
        w_pointers += 128
    y = tl.trans(acc) if SWAP else acc
    tile = block_m * tl.num_programs(1) + block_n
    _finish(
        y, m, n, M, N, tile, split, splits, scale_ptr, bias_ptr, out_ptr, partial_ptr, arrived_ptr,
        ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def one_row(
    x_ptr, w_ptr, scale_ptr, bias_ptr, pre_ptr, out_ptr, N, K,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """M = 1 against bf16 or int8 weights (N, K): products and sums in float32, straight from registers."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    w_pointers = w_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + depth[None, :]
    acc = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for start in range(0, K, DEPTH):
        k = start + depth
        x = _input(x_ptr + k[None, :], k[None, :] < K, pre_ptr + k, k < K, 1.0, x_ptr.dtype.element_ty, PRE)
        w = tl.load(w_pointers) if EVEN else _load(w_pointers, k[None, :] < K)
        # int8 goes through bf16, in which it is exact: that conversion has no slow instruction.
        acc += w.to(x_ptr.dtype.element_ty).to(tl.float32) * x.to(tl.float32)
        w_pointers += DEPTH
    y = tl.sum(acc, axis=1)[None, :]
    _write(y, tl.zeros((1,), tl.int32), n, 1, N, scale_ptr, bias_ptr, out_ptr)
