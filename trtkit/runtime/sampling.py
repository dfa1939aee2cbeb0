"""Logits to tokens: counter-based noise, one definition of the sampling distribution, an exact inverse CDF.

A pick depends on the row's logits, its sampling parameters and one uniform number that is a hash of (seed, position).
No generator is advanced, so a sample never depends on what else is in the batch, and a speculative step that looks at
several positions draws the numbers that plain decoding would have drawn.

One uniform and a two-level inverse CDF cost a seventh of ``torch.multinomial`` over a 152k vocabulary on a CPU.
Letters: M picks (rows, or rows x nodes), V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.runtime.api import SamplingParams
from trtkit.runtime.native.kernels import draw_tokens, loaded

__all__ = ["SamplingRows", "invert_cdf", "pick", "pick_plain", "sampling_rows", "sampling_weights", "uniforms"]

_CDF_BLOCK = 128


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
    """bool (M,): temperature 0."""
    greedy: bool
    """Every row has temperature 0."""
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


_TENSORS = ("seeds", "temperature", "top_k", "top_p", "min_p", "cold")
_FLAGS = ("greedy", "any_greedy", "any_top_k", "any_top_p", "any_min_p", "any_switch")


def sampling_rows(params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device) -> SamplingRows:
    """Gather the parameters of M rows. Seeds of any size are taken modulo 2^64."""
    greedy = [param.temperature == 0 for param in params]
    words = [_signed(seed % (1 << 64)) for seed in seeds]

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return SamplingRows(
        seeds=torch.tensor(words, dtype=torch.int64, device=device),
        temperature=floats([param.temperature or 1.0 for param in params]),
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


def sampling_weights(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The sampling distribution up to a factor: float32 (M, V), largest weight 1, zero outside the cuts.

    softmax(logits / temperature), then top_k, then top_p on what is left, then min_p. Tokens that tie with the last
    one inside a cut are all kept, so that the set does not depend on a sort order.
    """
    scaled = logits.float() / rows.temperature[:, None]
    weights = (scaled - scaled.amax(dim=1, keepdim=True)).exp_()
    if rows.any_top_k:
        weights = _cut_top_k(weights, rows.top_k)
    if rows.any_top_p:
        weights = _cut_top_p(weights, rows.top_p)
    if rows.any_min_p:
        weights = weights * (weights >= rows.min_p[:, None])
    return weights


def _cut_top_k(weights: Tensor, top_k: Tensor) -> Tensor:
    width = weights.shape[1]
    kept = torch.where(top_k > 0, top_k, width).clamp_max(width)
    largest = torch.topk(weights, int(torch.where(kept < width, kept, 1).max()), dim=1).values
    floor = largest.gather(1, (kept.clamp_max(largest.shape[1]) - 1)[:, None])
    floor = torch.where((kept < width)[:, None], floor, 0.0)
    return weights * (weights >= floor)


def _cut_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Keep the largest weights until their sum reaches top_p of the total.

    The head of the sorted distribution is enough: it is grown until it covers every row, instead of sorting the
    whole vocabulary.
    """
    target = weights.sum(dim=1, dtype=torch.float64) * top_p.double()
    # A hair below the total: float32 weights summed in another order must not make 0.9999999 * total unreachable.
    target = target.clamp_max(weights.sum(dim=1, dtype=torch.float64) * (1 - 1e-9))
    width = weights.shape[1]
    size = min(256, width)
    while True:
        head = torch.topk(weights, size, dim=1).values
        mass = head.cumsum(dim=1, dtype=torch.float64)
        if size == width or bool((mass[:, -1] >= target).all()):
            break
        size = min(size * 8, width)
    last = (mass < target[:, None]).sum(dim=1, keepdim=True).clamp_max(size - 1)
    floor = torch.where((top_p < 1)[:, None], head.gather(1, last), 0.0)
    return weights * (weights >= floor)


def invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform x total: int64 (M,). Never picks a zero weight.

    Two levels: sums over blocks of 128 ids locate the block, a short cumulative sum the token.
    """
    picks, width = weights.shape
    blocks = -(-width // _CDF_BLOCK)
    if blocks * _CDF_BLOCK != width:
        weights = torch.nn.functional.pad(weights, (0, blocks * _CDF_BLOCK - width))
    weights = weights.view(picks, blocks, _CDF_BLOCK)
    cumulative = weights.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    target = uniform * cumulative[:, -1]
    # cumulative > target holds at the last block with weight, because uniform < 1.
    block = (cumulative <= target[:, None]).sum(dim=1).clamp_max(blocks - 1)
    row = torch.arange(picks, device=weights.device)
    inside = weights[row, block].double().cumsum(dim=1)
    before = torch.where(block > 0, cumulative[row, (block - 1).clamp_min(0)], 0.0)
    index = (inside <= (target - before)[:, None]).sum(dim=1)
    # Rounding between the two levels can push the target past the block's own sum: then take its last token.
    last = (inside < inside[:, -1:]).sum(dim=1)
    return block * _CDF_BLOCK + torch.minimum(index, last)


def _most_likely(logits: Tensor) -> Tensor:
    """The largest logit's id, the lowest on a tie: int64 (M,)."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    return torch.where(logits == logits.amax(dim=1, keepdim=True), ids, logits.shape[1]).amin(dim=1)


def pick(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Draw one token for each row of logits (M, V) at its position (M,): int64 (M,)."""
    if loaded() and logits.device.type == "cpu" and not (rows.any_top_k or rows.any_top_p or rows.any_min_p):
        picks = draw_tokens(logits, rows.temperature, rows.cold, uniforms(rows.seeds, positions))
        if bool((picks >= 0).all()):
            return picks
        return torch.where(picks >= 0, picks, pick_plain(logits, rows, positions))
    return pick_plain(logits, rows, positions)


def pick_plain(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """``pick`` in plain torch: the definition, also where the C++ kernels are loaded."""
    if rows.greedy:
        return _most_likely(logits)
    drawn = invert_cdf(sampling_weights(logits, rows), uniforms(rows.seeds, positions))
    if not rows.any_greedy:
        return drawn
    return torch.where(rows.cold, _most_likely(logits), drawn)
