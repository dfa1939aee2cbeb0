"""Logits that kernels of the pick may stumble over."""

from __future__ import annotations

import torch

KINDS = ("flat", "normal", "wide", "peaked", "ties", "one-hot", "masked", "huge", "tail", "no numbers")


def adversarial_logits(kind: str, rows: int, vocab: int, seed: int) -> torch.Tensor:
    """float32 (rows, vocab) of one of ``KINDS``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=generator)
    chance = torch.rand(rows, vocab, generator=generator)
    if kind == "flat":
        return x * 0
    if kind == "wide":
        return x * 40
    if kind == "peaked":
        return x * 2 + 15 * (chance < 3 / vocab)
    if kind == "ties":
        return x.round()
    if kind == "one-hot":
        return torch.where(torch.arange(vocab) == seed % vocab, 0.0, -torch.inf).expand(rows, -1)
    if kind == "masked":
        return torch.where(chance < 0.9, -torch.inf, x * 5)
    if kind == "huge":
        return x * 1e37
    if kind == "tail":  # the largest and a long tail at the smallest weights
        return torch.where(torch.arange(vocab) == seed % vocab, 0.0, -27 - chance)
    if kind == "no numbers":
        broken = torch.tensor([torch.nan, torch.inf, -torch.inf])
        return torch.where(chance < 0.5 / vocab, broken[seed % 3], x)
    return x * 3
