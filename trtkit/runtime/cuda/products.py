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
  that issues 128 lanes. Weight-only codes come in 16-bit words whose tiles already lie as the tensor cores want
  bfloat16 (:mod:`layout`): with everything, int8 takes 2.7 instructions per weight and int4 2.4, where codes stored
  row by row took 4.2 and 3.9, half of them moves and permutations. Codes of fp8 and int8-sq go to the tensor cores as
  they are, with about one.

Products run on the tensor cores even for one row (16 rows are the least, empty ones cost nothing but idle lanes): with
``swap`` W is the left operand, which is how Hopper's wgmma takes 64 rows of W by 16 columns of x from shared memory;
without it mma.sync takes W as the right operand from registers, the better place for weights that are dequantized.
A row of the result depends on that row of x alone, and not on M within one configuration.

``one_row`` is the plain dot product without tensor cores or shared memory, for M = 1.

Letters: M rows of x, N output features, K input features.
"""
# ruff: noqa: N803, N806 -- constants of a kernel are in capitals, as are the sizes of its tensors
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from trtkit.runtime.cuda.dependent import fetch, started

__all__ = ["activation_codes", "codes_of", "one_row", "product", "product_words"]

# 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even, as torch.round does.
_ROUND = tl.constexpr(12582912.0)

# Two codes of a 32-bit register at once, as bfloat16. A nibble u under the bit pattern of 128 is the number 128 + u; u
# is code + 8, so 136 is taken off. Of a byte the low seven bits become 128 + them, the sign bit 128 or, being the last
# bit of the exponent, 256: their difference is the code. All of it is exact.
_NIBBLES = (
    "{{ .reg .b32 a, one, off; mov.b32 one, 0x3f803f80; mov.b32 off, 0xc308c308; shr.b32 a, $1, {shift};"
    " lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, a, one, off; }}"
)
_BYTES = (
    "{{ .reg .b32 a, b, minus; mov.b32 minus, 0xbf80bf80; shr.b32 a, $1, {shift};"
    " lop3.b32 b, a, 0x00800080, 0x43004300, 0xea; lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea;"
    " fma.rn.bf16x2 $0, b, minus, a; }}"
)
_NIBBLES_0, _NIBBLES_1 = tl.constexpr(_NIBBLES.format(shift=0)), tl.constexpr(_NIBBLES.format(shift=4))
_NIBBLES_2, _NIBBLES_3 = tl.constexpr(_NIBBLES.format(shift=8)), tl.constexpr(_NIBBLES.format(shift=12))
_BYTES_0, _BYTES_1 = tl.constexpr(_BYTES.format(shift=0)), tl.constexpr(_BYTES.format(shift=8))


@triton.jit
def codes_of(words, BITS: tl.constexpr, PART: tl.constexpr):
    """The codes of one part of the words, as bfloat16."""
    if BITS == 8:
        text: tl.constexpr = _BYTES_0 if PART == 0 else _BYTES_1
    elif PART < 2:
        text: tl.constexpr = _NIBBLES_0 if PART == 0 else _NIBBLES_1
    else:
        text: tl.constexpr = _NIBBLES_2 if PART == 2 else _NIBBLES_3
    return tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


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
    # Hopper adds e4m3 products with fewer than 24 bits: such sums are moved to float32 every 128 inputs at the latest.
    short: tl.constexpr = 128 if x.shape[1] > 128 else x.shape[1]
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=short, out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=short, out_dtype=acc.dtype)
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
    EVEN: tl.constexpr, PRE: tl.constexpr, QUANTIZE: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """bf16 weights or codes of fp8 and int8-sq (N, K), row by row as they are stored.

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
    ahead = first + tl.arange(0, 4) * (1024 // w_ptr.dtype.element_ty.primitive_bitwidth)
    fetch(w_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + tl.minimum(ahead, K - 1)[None, :], early)
    started(early)
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


@triton.jit
def _part(x_pointers, m, M, k, K, pre_ptr, words, acc, BITS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
          PRE: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """One tile of 64 inputs: ``acc`` plus its product."""
    k += 64 * PART
    inside = m[:, None] < M if EVEN else (m[:, None] < M) & (k[None, :] < K)
    x = _input(x_pointers + 64 * PART, inside, pre_ptr + k, k < K, 1.0, x_pointers.dtype.element_ty, PRE)
    return _multiply(x, codes_of(words, BITS, PART), acc, SWAP)


@triton.jit(do_not_specialize=["M", "steps", "splits"])
def product_words(
    x_ptr, w_ptr, ratio_ptr, scale_ptr, bias_ptr, pre_ptr, out_ptr, partial_ptr, arrived_ptr,
    M, N, K, WIDTH, steps, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, SWAP: tl.constexpr,
    EVEN: tl.constexpr, PRE: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """bf16 x against int8 or int4 codes in words (N, WIDTH), as :mod:`layout` puts them.

    A step is 64 words of a row. Those of int4 are two groups, whose sums are multiplied with their ratios (float16,
    (groups, N)) before they are added; ratios are fetched a step ahead.
    """
    block_m, block_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block_m * ROWS + tl.arange(0, ROWS)
    n = block_n * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, 64)
    row = tl.minimum(n, N - 1)
    first = split * steps
    PARTS: tl.constexpr = 16 // BITS
    k = first * (64 * PARTS) + depth
    x_pointers = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    w_pointers = w_ptr + row[:, None].to(tl.int64) * WIDTH + (first * 64 + depth)[None, :]
    count = tl.minimum(steps, WIDTH // 64 - first)
    ahead = tl.minimum(first * 64 + tl.arange(0, 4) * 64, WIDTH - 1)
    fetch(w_ptr + row[:, None].to(tl.int64) * WIDTH + ahead[None, :], early)
    started(early)
    acc = tl.zeros((COLUMNS, ROWS) if SWAP else (ROWS, COLUMNS), tl.float32)
    if BITS == 4:
        ratio_pointers = ratio_ptr + first * 2 * N + row
        ratio_0, ratio_1 = tl.load(ratio_pointers), tl.load(ratio_pointers + N)
    for step in range(count):
        words = tl.load(w_pointers)
        if BITS == 8:
            acc = _part(x_pointers, m, M, k, K, pre_ptr, words, acc, BITS, 0, EVEN, PRE, SWAP)
            acc = _part(x_pointers, m, M, k, K, pre_ptr, words, acc, BITS, 1, EVEN, PRE, SWAP)
        else:
            # The ratios after the last step are those of the last again: nothing is read past the end.
            ratio_pointers += tl.where(step + 1 < count, 2 * N, 0)
            next_0, next_1 = tl.load(ratio_pointers), tl.load(ratio_pointers + N)
            group = tl.zeros_like(acc)
            group = _part(x_pointers, m, M, k, K, pre_ptr, words, group, BITS, 0, EVEN, PRE, SWAP)
            group = _part(x_pointers, m, M, k, K, pre_ptr, words, group, BITS, 1, EVEN, PRE, SWAP)
            acc += group * (ratio_0[:, None] if SWAP else ratio_0[None, :])
            group = tl.zeros_like(acc)
            group = _part(x_pointers, m, M, k, K, pre_ptr, words, group, BITS, 2, EVEN, PRE, SWAP)
            group = _part(x_pointers, m, M, k, K, pre_ptr, words, group, BITS, 3, EVEN, PRE, SWAP)
            acc += group * (ratio_1[:, None] if SWAP else ratio_1[None, :])
            ratio_0, ratio_1 = next_0, next_1
        k += 64 * PARTS
        x_pointers += 64 * PARTS
        w_pointers += 64
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
    EVEN: tl.constexpr, PRE: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """M = 1 against bf16 weights (N, K): products and sums in float32, straight from registers."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    w_pointers = w_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + depth[None, :]
    acc = tl.zeros((COLUMNS, DEPTH), tl.float32)
    started(early)
    for start in range(0, K, DEPTH):
        k = start + depth
        x = _input(x_ptr + k[None, :], k[None, :] < K, pre_ptr + k, k < K, 1.0, x_ptr.dtype.element_ty, PRE)
        w = tl.load(w_pointers) if EVEN else _load(w_pointers, k[None, :] < K)
        acc += w.to(tl.float32) * x.to(tl.float32)
        w_pointers += DEPTH
    y = tl.sum(acc, axis=1)[None, :]
    _write(y, tl.zeros((1,), tl.int32), n, 1, N, scale_ptr, bias_ptr, out_ptr)
