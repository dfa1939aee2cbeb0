"""The two activation-aware scale choices, as pure functions: SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978).

Both return the ``pre_scale`` that multiplies the activation, rounded to the model's dtype, so that the weights can be
divided by exactly what is stored. Letters: N rows, K inputs, G = K / 128 groups, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trtkit.quant.tensor import dequantize, quantize_int4

__all__ = ["awq_pre_scale", "clip_ranges", "smooth_pre_scale"]

_LEAST, _MOST = 1e-4, 1e4
_STEPS = 10
_CLIPS = tuple(1 - 0.05 * step for step in range(1, 9))


def smooth_pre_scale(
    amax_x: Tensor, weights: Sequence[Tensor], alpha: float, *, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """1 / s with s = amax_x^alpha / amax_w^(1 - alpha) per input (K,), amax_w over all parts of the product.

    Inputs that were never active keep 1: nothing is known about them. ``dtype`` is the model's, if the weights have
    another.
    """
    amax_w = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    scale = amax_w.pow(1 - alpha) / amax_x.float().pow(alpha)
    silent = (amax_x <= 0) | (amax_w <= 0)
    return torch.where(silent, 1.0, scale).clamp(_LEAST, _MOST).to(dtype or weights[0].dtype)


def awq_pre_scale(
    mean_x: Tensor, weights: Sequence[Tensor], samples: Tensor, *, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:  # fmt: skip
    """The best of 21 candidates by the squared error of the product on ``samples`` (S, K): (K,).

    Candidates: the paper's mean|x|^a and ModelOpt's mean|x|^a / w^(1 - a), with w the mean of |weight| relative to its
    group's maximum, each normalised to geometric centre 1. The first, a = 0, is plain rounding. ``dtype`` as for
    SmoothQuant.
    """
    wide = torch.cat([weight.float() for weight in weights])
    best, least = None, float("inf")
    for scale in _awq_candidates(mean_x.float(), wide, group_size):
        pre = (1 / scale).to(dtype or weights[0].dtype)
        divisor = pre.float()
        rounded = dequantize(quantize_int4(wide / divisor, group_size=group_size)) * divisor
        error = float((samples @ (rounded - wide).T).square().mean())
        if best is None or error < least:
            best, least = pre, error
    assert best is not None
    return best


def _awq_candidates(mean_x: Tensor, weight: Tensor, group_size: int) -> Iterator[Tensor]:
    tiny = torch.finfo(torch.float32).tiny
    groups = weight.abs().reshape(weight.shape[0], -1, group_size)
    relative = (groups / (groups.amax(dim=2, keepdim=True) + tiny)).mean(dim=0).reshape(-1)
    for step in range(_STEPS):
        yield _centred(mean_x.pow(step / _STEPS))
    for step in range(_STEPS + 1):
        alpha = step / _STEPS
        yield _centred(mean_x.pow(alpha) / (relative.pow(1 - alpha) + tiny))


def _centred(scale: Tensor) -> Tensor:
    scale = scale.clamp(_LEAST, _MOST)
    return scale / (scale.max() * scale.min()).sqrt()


def clip_ranges(weight: Tensor, pre_scale: Tensor, samples: Tensor, *, group_size: int) -> Tensor:
    """The share of each group's range to keep, (N, G): the one that errs least on the group's own partial product.

    The error of a group's rounding d is d H d with H the Gram matrix of its sampled inputs, so the samples are needed
    once, whatever the number of rows and shares tried.
    """
    scaled = weight.float() / pre_scale.float()
    groups = scaled.reshape(weight.shape[0], -1, group_size).transpose(0, 1)  # (G, N, 128)
    x = (samples * pre_scale.float()).reshape(samples.shape[0], -1, group_size).transpose(0, 1)
    gram = x.transpose(1, 2) @ x  # (G, 128, 128)

    def error(clip: Tensor | None) -> Tensor:
        rounded = dequantize(quantize_int4(scaled, group_size=group_size, clip=clip))
        off = rounded.reshape(weight.shape[0], -1, group_size).transpose(0, 1) - groups
        return ((off @ gram) * off).sum(dim=2).T  # (N, G)

    least = error(None)
    best = torch.ones_like(least)
    for share in _CLIPS:
        now = error(torch.full_like(least, share))
        better = now < least
        best = torch.where(better, share, best)
        least = torch.where(better, now, least)
    return best
