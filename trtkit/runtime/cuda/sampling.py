"""The pick on a GPU: the tokens of ``trtkit.runtime.sampling.pick_plain``, bit for bit, without waiting for the device.

The vocabulary of each row is split into chunks, one program each. A pick without cuts takes three launches: the largest
logit of each chunk, its sum of weights, the draw. A cut by top_k or top_p adds one launch for each 9 bits of the
threshold: every chunk adds its weights, or their number, to 512 counters of the row by their next bits, which whole
numbers allow in any order; and one for the sums of what is left. Weights are never stored: each launch makes them from
the logits again.

Letters: M picks, V vocab, C chunks.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.runtime.sampling import SamplingRows

__all__ = ["draw", "draw_tokens", "narrow", "peak", "weigh"]

_CHUNK = 4096
"""Tokens of one program."""
_PASSES = 5
"""9 bits each: a weight has 41."""
_LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
"""A fused multiply-add would change the bits of the weights."""
_BY_ROW = ("temperature", "top_k", "top_p", "min_p", "cold", "seeds", "positions")
"""One number for each row. In a graph's input they lie at places that depend on the number of rows: no reason for the
compiler to begin anew."""


@triton.jit
def _weights(logits, largest, temperature):
    """``sampling._weights_of`` of (logit - largest) / temperature: int64; 0 for a NaN."""
    x = tl.math.div_rn(logits, temperature) - tl.math.div_rn(largest, temperature)
    x = tl.where(x > -40.0, x, -40.0)
    n = (x * 1.4426950408889634 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    q = r * 0.0013814611593261361
    q = (q + 0.008368710987269878) * r
    q = (q + 0.04166838899254799) * r
    q = (q + 0.1666652113199234) * r
    p = ((q + 0.4999999403953552) * (r * r) + r) + 1.0
    whole = (p * 16777216.0).to(tl.int32).to(tl.int64)
    return (whole << 16) >> (-n).to(tl.int32).to(tl.int64)


@triton.jit
def _chunk_weights(
    logits, peaks, temperature, row, part, stride, width, chunks, chunk: tl.constexpr, tile: tl.constexpr
):
    """The weights of one chunk; the tokens beyond the vocabulary have none."""
    token = part * chunk + tl.arange(0, chunk)
    x = tl.load(logits + row * stride + token, mask=token < width, other=float("-inf")).to(tl.float32)
    return _weights(x, _largest(peaks, row, chunks, tile), tl.load(temperature + row))


@triton.jit
def _largest(peaks, row, chunks, tile: tl.constexpr):
    """The row's largest logit, NaN where there is one."""
    part = tl.arange(0, tile)
    tops = tl.load(peaks + row * chunks + part, mask=part < chunks, other=float("-inf"))
    wrong = tl.max((tops != tops).to(tl.int32), 0)
    return tl.where(wrong > 0, float("nan"), tl.max(tl.where(tops == tops, tops, float("-inf")), 0))


@triton.jit(do_not_specialize=["chunks"])
def peak(peaks, first, logits, stride, width, chunks, chunk: tl.constexpr):
    """peaks, first (M, C): the largest logit of each chunk, NaN where there is one, and its lowest token."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * chunk + tl.arange(0, chunk)
    x = tl.load(logits + row * stride + token, mask=token < width, other=float("-inf")).to(tl.float32)
    wrong = tl.max((x != x).to(tl.int32), 0)
    top = tl.max(tl.where(x == x, x, float("-inf")), 0)
    tl.store(peaks + row * chunks + part, tl.where(wrong > 0, float("nan"), top))
    tl.store(first + row * chunks + part, tl.min(tl.where(x == top, token, width), 0))


@triton.jit
def _wanted(top_k, top_p, row, width, count: tl.constexpr):
    """Whether the row asks for that cut."""
    if count:
        kept = tl.load(top_k + row)
        return (kept > 0) & (kept < width)
    return tl.load(top_p + row) < 1


@triton.jit
def _enough(sums, top_k, top_p, row, chunks, count: tl.constexpr, tile: tl.constexpr):
    """How many tokens, or what sum of weights, the cut leaves at least."""
    if count:
        return tl.load(top_k + row)
    part = tl.arange(0, tile)
    total = tl.sum(tl.load(sums + row * chunks + part, mask=part < chunks, other=0), 0)
    share = tl.math.ceil(tl.load(top_p + row).to(tl.float64) * total.to(tl.float64))
    return tl.minimum(share.to(tl.int64), total)


@triton.jit
def _decided(counters, decisions, row, rows, passed):
    """(threshold's first 9 x ``passed`` bits, what is left to reach) after as many passes."""
    at = (passed - 1) * rows + row
    prefix = tl.load(decisions + at * 2)
    enough = tl.load(decisions + at * 2 + 1)
    digit = tl.arange(0, 512)
    held = tl.load(counters + at * 512 + digit)
    reached = tl.cumsum(held, 0, reverse=True)
    chosen = tl.sum(((reached >= enough) & (digit > 0)).to(tl.int64), 0)
    return prefix * 512 + chosen, enough - tl.sum(tl.where(digit > chosen, held, 0), 0)


@triton.jit(do_not_specialize=["chunks", "rows", "passed"], do_not_specialize_on_alignment=_BY_ROW)
def narrow(
    counters, decisions, logits, peaks, sums, temperature, top_k, top_p, stride, width, chunks, rows, passed,
    count: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Pass ``passed`` of a cut: add the chunk's weights, or with ``count`` their number, to counters (passes, M, 512)
    by their next 9 bits, where the bits before are the threshold's. Bits of 0 are what remains, and not counted.

    decisions (passes, M, 2): the bits and what is left to reach before each pass.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if _wanted(top_k, top_p, row, width, count):
        if passed > 0:
            prefix, enough = _decided(counters, decisions, row, rows, passed)
        else:
            prefix = tl.full((), 0, tl.int64)
            enough = _enough(sums, top_k, top_p, row, chunks, count, tile)
        at = passed * rows + row
        if part == 0:
            tl.store(decisions + at * 2, prefix)
            tl.store(decisions + at * 2 + 1, enough)
        weight = _chunk_weights(logits, peaks, temperature, row, part, stride, width, chunks, chunk, tile)
        shift = 36 - 9 * passed
        digit = (weight >> shift) & 511
        chosen = (weight >> (shift + 9) == prefix) & (digit > 0)
        added = tl.full((chunk,), 1, tl.int64) if count else weight
        tl.atomic_add(counters + at * 512 + digit, added, mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=["chunks", "rows"], do_not_specialize_on_alignment=_BY_ROW)
def weigh(
    sums, floors, logits, peaks, counters, decisions, temperature, top_k, top_p, min_p, stride, width, chunks, rows,
    cut: tl.constexpr, count: tl.constexpr, last: tl.constexpr, passes: tl.constexpr, chunk: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    """sums (M, C): the weights of a chunk from the threshold on. floors (M, 2): thresholds after a first and a second
    ``cut``, by ``count`` or sum; min_p joins in the ``last``."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    floor = tl.full((), 0, tl.int64)
    if cut > 1:
        floor = tl.load(floors + row * 2)
    wanted = _wanted(top_k, top_p, row, width, count) & (cut > 0)
    if wanted:
        threshold, _ = _decided(counters, decisions, row, rows, passes)
        floor = tl.maximum(floor, threshold)
    if last:
        share = tl.math.ceil(tl.load(min_p + row).to(tl.float64) * 1099511627776.0)
        floor = tl.maximum(floor, share.to(tl.int64))
    if part == 0:
        tl.store(floors + row * 2 + last, floor)
    weight = _chunk_weights(logits, peaks, temperature, row, part, stride, width, chunks, chunk, tile)
    tl.store(sums + row * chunks + part, tl.sum(tl.where(weight >= floor, weight, 0), 0))


@triton.jit
def _mix(z):
    """The finalizer of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, position):
    """``sampling.uniforms``."""
    golden: tl.constexpr = 0x9E3779B97F4A7C15
    word = _mix(_mix(seed.to(tl.uint64) + golden) + position.to(tl.uint64) * golden)
    return (word >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=_BY_ROW)
def draw(
    out, logits, peaks, first, sums, floors, temperature, cold, seeds, positions, stride, width, chunks,
    chunk: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """out (M,): the most likely token of a ``cold`` row, else the inverse CDF over the chunks and inside one."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, tile)
    real = part < chunks
    if tl.load(cold + row):
        top = _largest(peaks, row, chunks, tile)
        tops = tl.load(peaks + row * chunks + part, mask=real, other=float("-inf"))
        tokens = tl.load(first + row * chunks + part, mask=real, other=width)
        token = tl.min(tl.where(tops == top, tokens, width), 0)
        tl.store(out + row, tl.where(token < width, token, 0).to(tl.int64))
    else:
        held = tl.load(sums + row * chunks + part, mask=real, other=0)
        total = tl.sum(held, 0)
        uniform = _uniform(tl.load(seeds + row), tl.load(positions + row))
        target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
        place = tl.sum((tl.cumsum(held, 0) <= target).to(tl.int32), 0)
        rest = target - tl.sum(tl.where(part < place, held, 0), 0)
        weight = _chunk_weights(logits, peaks, temperature, row, place, stride, width, chunks, chunk, tile)
        weight = tl.where(weight >= tl.load(floors + row * 2 + 1), weight, 0)
        inside = tl.sum((tl.cumsum(weight, 0) <= rest).to(tl.int32), 0)
        tl.store(out + row, (place * chunk + inside).to(tl.int64))


def draw_tokens(logits: Tensor, rows: SamplingRows, positions: Tensor, chunk: int = _CHUNK) -> Tensor:
    """int64 (M,): the tokens of ``pick_plain``.

    logits (M, V) in float32, bfloat16 or float16; ``chunk`` tokens for one program, a power of 2.
    """
    picks, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    chunks = -(-width // chunk)
    size = {"chunk": chunk, "tile": triton.next_power_of_2(chunks), **_LAUNCH}
    shape = (logits.stride(0), width, chunks)
    grid, device = (picks, chunks), logits.device
    peaks = torch.empty(picks, chunks, dtype=torch.float32, device=device)
    first = torch.empty(picks, chunks, dtype=torch.int32, device=device)
    sums = torch.empty(picks, chunks, dtype=torch.int64, device=device)
    floors = torch.empty(picks, 2, dtype=torch.int64, device=device)
    out = torch.empty(picks, dtype=torch.int64, device=device)
    peak[grid](peaks, first, logits, *shape, chunk=chunk, **_LAUNCH)
    if not rows.greedy:
        cuts = [count for count, asked in ((True, rows.any_top_k), (False, rows.any_top_p)) if asked]
        counters = torch.zeros(max(1, len(cuts)), _PASSES, picks, 512, dtype=torch.int64, device=device)
        decisions = torch.empty(_PASSES, picks, 2, dtype=torch.int64, device=device)
        heat, cut = rows.temperature, (rows.top_k, rows.top_p)

        def sum_up(done: int, count: bool) -> None:
            weigh[grid](
                sums, floors, logits, peaks, counters[max(0, done - 1)], decisions, heat, *cut, rows.min_p, *shape,
                picks, cut=done, count=count, last=int(done == len(cuts)), passes=_PASSES, **size,
            )  # fmt: skip

        if not cuts or not cuts[0]:
            sum_up(0, False)
        for done, count in enumerate(cuts):
            for passed in range(_PASSES):
                narrow[grid](
                    counters[done], decisions, logits, peaks, sums, heat, *cut, *shape, picks, passed, count=count,
                    **size,
                )  # fmt: skip
            sum_up(done + 1, count)
    draw[(picks,)](
        out, logits, peaks, first, sums, floors, rows.temperature, rows.cold, rows.seeds, positions, *shape, **size
    )
    return out
