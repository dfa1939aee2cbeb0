"""Logits to tokens: counter-based noise, one definition of the sampling distribution, an exact inverse CDF.

A pick depends on the row's logits, its sampling parameters and one uniform number that is a hash of (seed, position).
No generator is advanced, so a sample never depends on what else is in the batch, and a speculative step that looks at
several positions draws the numbers that plain decoding would have drawn.

Weights are whole numbers. Each is made from its logit by float32 operations that IEEE 754 rounds in one way, and from
there on everything is integer arithmetic, whose sums do not depend on their order. So torch, the C++ kernel and the
Triton kernel draw the same token from the same logits, on any device, with any number of threads. What that costs in
exactness is bounded in :func:`sampling_weights`.

Letters: M picks (rows, or rows x nodes), V vocab.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.runtime.api import SamplingParams
from trtkit.runtime.cuda.kernels import triton_runs
from trtkit.runtime.native.kernels import draw_tokens, loaded, noise

__all__ = [
    "LARGEST_WEIGHT",
    "SamplingRows",
    "invert_cdf",
    "pick",
    "pick_plain",
    "sampling_rows",
    "sampling_weights",
    "uniforms",
]

LARGEST_WEIGHT = 1 << 40
"""The weight of a row's most likely token. The sum over a vocabulary of up to 2^22 stays inside int64."""


def _signed(value: int) -> int:
    """The two's complement reading of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 words (torch's own is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1), (M,), from int64 seeds and positions (M,): the same on every device and in every batch."""
    word = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    return _shift_right(word, 11).double() * 2.0**-53


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """``SamplingParams`` and seeds of M picks as tensors, and which cuts any of them asks for."""

    seeds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    cold: Tensor
    """bool (M,): temperature 0, or next to it."""
    greedy: bool
    """Every row is cold."""
    any_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_switch: bool
    """A row has a switch penalty, which ``accept`` applies: it depends on the path to a node."""

    def repeat(self, nodes: int) -> SamplingRows:
        """The same parameters for ``nodes`` consecutive picks of each row."""
        if nodes == 1:
            return self
        return SamplingRows(
            **{name: getattr(self, name).repeat_interleave(nodes) for name in _TENSORS},
            **{name: getattr(self, name) for name in _FLAGS},
        )


_COLDEST = 1e-6
"""Below it logits divided by the temperature leave float32, and only ties would be drawn otherwise."""
_TENSORS = ("seeds", "temperature", "top_k", "top_p", "min_p", "cold")
_FLAGS = ("greedy", "any_greedy", "any_top_k", "any_top_p", "any_min_p", "any_switch")


def sampling_rows(params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device) -> SamplingRows:
    """Gather the parameters of M rows. Seeds of any size are taken modulo 2^64."""
    greedy = [param.temperature < _COLDEST for param in params]
    words = [_signed(seed % (1 << 64)) for seed in seeds]

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return SamplingRows(
        seeds=torch.tensor(words, dtype=torch.int64, device=device),
        temperature=floats([1.0 if cold else param.temperature for param, cold in zip(params, greedy, strict=True)]),
        top_k=torch.tensor([param.top_k for param in params], dtype=torch.int64, device=device),
        top_p=floats([param.top_p for param in params]),
        min_p=floats([param.min_p for param in params]),
        cold=torch.tensor(greedy, dtype=torch.bool, device=device),
        greedy=all(greedy),
        any_greedy=any(greedy),
        any_top_k=any(param.top_k > 0 for param in params),
        any_top_p=any(param.top_p < 1 for param in params),
        any_min_p=any(param.min_p > 0 for param in params),
        any_switch=any(param.switch is not None for param in params),
    )


# e^r = 1 + r + r^2 q(r) for |r| <= ln2 / 2, within 2^-27.9: minimax coefficients of q, highest power first.
_EXP = (0.0013814611593261361, 0.008368710987269878, 0.04166838899254799, 0.1666652113199234, 0.4999999403953552)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_TO_WHOLE = 12582912.0
"""1.5 x 2^23: adding and subtracting it rounds a small float32 to the nearest whole number."""
_DEAD = -40.0
"""Logits further below the largest have weight 0 (from -27.8 on)."""


def _weights_of(x: Tensor) -> Tensor:
    """floor(2^40 e^x) for float32 x <= 0, up to the rounding of p: int64, never falling as x grows; 0 for a NaN.

    e^x = p 2^-n with p in [0.7, 1.42]. Each line below is one or more rounded float32 operations, none fused.
    """
    x = x.nan_to_num(nan=_DEAD).clamp_min(_DEAD)
    n = x.mul(_LOG2_E).add_(_TO_WHOLE).sub_(_TO_WHOLE)
    r = x.sub_(n * _LN2_HIGH).sub_(n * _LN2_LOW)
    q = r * _EXP[0]
    for coefficient in _EXP[1:-1]:
        q = q.add_(coefficient).mul_(r)
    p = q.add_(_EXP[-1]).mul_(r * r).add_(r).add_(1.0)
    return p.mul_(2.0**24).long().bitwise_left_shift_(16).bitwise_right_shift_(n.neg_().long())


def sampling_weights(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The sampling distribution up to a factor: int64 (M, V), largest weight 2^40, zero outside the cuts.

    softmax(logits / temperature), then top_k, then top_p on what is left, then min_p. The first two are the largest
    thresholds that leave enough: top_k tokens; a sum of top_p x the sum before, rounded up. min_p's is its share of
    2^40, rounded up. Tokens that tie with the last one inside a cut are all kept, so that the set does not depend on
    a sort order.

    A weight is e^(x / temperature) 2^40, x the distance to the largest logit, within one unit and a relative 2^-23.5
    (twice float32's own rounding). So a probability is off by 2^-40 of the largest one, and tokens below 2^-40 of it
    are never drawn: over 151,936 tokens 1.4e-7 of the largest at most. A larger logit never has a smaller weight.

    A row with a NaN, and one whose largest logit is infinite, has no distribution: all its weights are 0.
    """
    scaled = logits.float() / rows.temperature[:, None]
    weights = _weights_of(scaled - scaled.amax(dim=1, keepdim=True))
    if rows.any_top_k:
        cut = (rows.top_k > 0) & (rows.top_k < weights.shape[1])
        weights = _keep_largest(weights, cut, rows.top_k, count=True)
    if rows.any_top_p:
        total = weights.sum(dim=1)
        enough = torch.minimum((total.double() * rows.top_p.double()).ceil().long(), total)
        weights = _keep_largest(weights, rows.top_p < 1, enough, count=False)
    if rows.any_min_p:
        floor = (rows.min_p.double() * LARGEST_WEIGHT).ceil().long()
        weights = weights * (weights >= floor[:, None])
    return weights


def _keep_largest(weights: Tensor, cut: Tensor, enough: Tensor, *, count: bool) -> Tensor:
    """Keep the largest weights until their sum, or with ``count`` their number, reaches ``enough`` (M,), where ``cut``.

    On a CPU the head of the sorted distribution is grown until it covers every row, instead of sorting the whole
    vocabulary; elsewhere looking would cost a synchronization.
    """
    width = weights.shape[1]
    enough = torch.where(cut, enough, 1)[:, None]
    size = min(256, width) if weights.device.type == "cpu" else width
    while True:
        head = torch.topk(weights, size, dim=1).values
        reached = (torch.ones_like(head) if count else head).cumsum(dim=1)
        if size == width or bool((reached[:, -1:] >= enough).all()):
            break
        size = min(size * 8, width)
    last = (reached < enough).sum(dim=1, keepdim=True).clamp_max(size - 1)
    floor = torch.where(cut[:, None], head.gather(1, last), 0)
    return weights * (weights >= floor)


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform x total: int64 (M,). Never picks a zero weight.

    weights int64 (M, V), uniform float64 (M,). Of a row without any weight it picks token 0.
    """
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1]
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _most_likely(logits: Tensor) -> Tensor:
    """The largest logit's id, the lowest on a tie: int64 (M,); 0 in a row with a NaN."""
    width = logits.shape[1]
    ids = torch.arange(width, device=logits.device)
    return torch.where(logits == logits.amax(dim=1, keepdim=True), ids, width).amin(dim=1) % width


def pick(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Draw one token for each row of logits (M, V) at its position (M,): int64 (M,). Each of ``rows`` is that of as
    many picks in a row as their numbers say.

    Whatever runs it, the token is that of ``pick_plain``, and on a GPU nothing waits for the device. A row with a NaN,
    and a sampled one whose largest logit is infinite, gives token 0.
    """
    if loaded() and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        return draw_tokens(
            logits, rows.temperature, rows.cold, noise(rows.seeds, positions), rows.top_k, rows.top_p, rows.min_p
        )
    rows = rows.repeat(logits.shape[0] // rows.seeds.shape[0])
    if _triton_runs(logits.device, logits.dtype):
        from trtkit.runtime.cuda import sampling as cuda

        return cuda.draw_tokens(logits, rows, positions)
    return pick_plain(logits, rows, positions)


@functools.cache
def _triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Asked in every step, so kept."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and triton_runs(device)


def pick_plain(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """``pick`` in plain torch: the definition, also where kernels run."""
    if rows.greedy:
        return _most_likely(logits)
    drawn = invert_cdf(sampling_weights(logits, rows), uniforms(rows.seeds, positions))
    if not rows.any_greedy:
        return drawn
    return torch.where(rows.cold, _most_likely(logits), drawn)
