"""Slow and obvious: which tokens the cuts keep, and the draw, one Python integer after the other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from trtkit.runtime.api import SamplingParams


def keep(weights: list[int], params: SamplingParams) -> list[int]:
    """The weights after top_k, top_p on what is left, and min_p; ties at an edge stay."""
    largest = max(weights)
    if 0 < params.top_k < len(weights):
        edge = sorted(weights, reverse=True)[params.top_k - 1]
        weights = [w if w >= edge else 0 for w in weights]
    if params.top_p < 1:
        wanted = min(math.ceil(single(params.top_p) * float(sum(weights))), sum(weights))
        held, edge = 0, 0
        for edge in sorted(weights, reverse=True):
            held += edge
            if held >= wanted:
                break
        weights = [w if w >= edge else 0 for w in weights]
    least = Fraction(single(params.min_p)) * largest
    return [w if w >= least else 0 for w in weights]


def scan(weights: list[int], uniform: float) -> int:
    """The first token whose cumulative weight exceeds the target."""
    target = min(int(uniform * float(sum(weights))), sum(weights) - 1)
    held = 0
    for token, weight in enumerate(weights):
        held += weight
        if held > target:
            return token
    raise AssertionError("the target lies below the sum")


def single(value: float) -> float:
    """The nearest float32: parameters are kept as such."""
    return float(np.float32(value))
