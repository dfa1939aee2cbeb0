"""The input of a step with fixed shapes: which sizes there are, and where in its int64 words everything stands.

First where the rows stand (``stand_words``), then their sampling parameters: whole numbers, then float32, two to a
word.
Letters: R rows (padded), D nodes of the longest path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.config import TreeShape
from trtkit.runtime.decode import Pending, pending_from, stand_words
from trtkit.runtime.sampling import SamplingRows

__all__ = [
    "StepKey", "cuts_of", "padded_rows", "padded_width", "read_input", "sampling_words", "write_sampling",
]  # fmt: skip

_ROW_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that a graph is captured for; above, multiples of 128."""
_INTEGERS = ("seeds", "top_k", "cold")
_FLOATS = ("temperature", "top_p", "min_p")
_CUTS = ("greedy", "any_greedy", "any_top_k", "any_top_p", "any_min_p", "any_switch")
_PAD = {"temperature": 1.0, "top_p": 1.0, "cold": 1}
"""Sampling parameters of a row that pads the batch; the others are 0. Such a row is greedy: a step of greedy rows
prepares no other draw, which would take whatever lies in memory for a token, and the next step would embed it."""


def padded_rows(rows: int) -> int:
    """The number of rows of the graph that runs ``rows``."""
    return next((size for size in _ROW_SIZES if size >= rows), -(-rows // 128) * 128)


def padded_width(blocks: int, most: int) -> int:
    """The width of its block table: a power of two, ``most`` (the longest row's) at the most."""
    return min(1 << (blocks - 1).bit_length(), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKey:
    """What a graph has baked in."""

    rows: int
    width: int
    shape: TreeShape | None
    cuts: tuple[bool, ...]
    """The host's part of :class:`SamplingRows`: which cuts any row asks for."""
    scored: bool
    """A row asks for log-probabilities."""
    looked_up: int = 0
    """How many of the tree's beams the host sends."""

    @property
    def path(self) -> int:
        """Nodes of the longest path: D."""
        return 1 if self.shape is None else 1 + self.shape.length

    @property
    def beams(self) -> tuple[int, ...]:
        """Beams, and tokens of each, of the drafts in the input."""
        return (self.looked_up, self.shape.length) if self.looked_up and self.shape is not None else ()

    @property
    def stand(self) -> int:
        """int64 words of the input that say where the rows stand: as ``pending_from`` reads them."""
        return self.rows * stand_words(self.width, self.beams)

    @property
    def words(self) -> int:
        """int64 words of the input: where the rows stand, then ``_INTEGERS``, then ``_FLOATS``."""
        return self.stand + sampling_words(self.rows)


def sampling_words(rows: int) -> int:
    """int64 words of the sampling parameters of ``rows`` rows."""
    return len(_INTEGERS) * rows + -(-len(_FLOATS) * rows // 2)


def _sampling_views(words: Tensor, rows: int) -> dict[str, Tensor]:
    """Views of the sampling parameters in the int64 words that hold them: integers, then floats, two to a word."""
    integers = words[: len(_INTEGERS) * rows].view(len(_INTEGERS), rows).unbind()
    floats = words[len(_INTEGERS) * rows :].view(torch.float32)[: len(_FLOATS) * rows].view(len(_FLOATS), rows).unbind()
    return dict(zip((*_INTEGERS, *_FLOATS), (*integers, *floats), strict=True))


def write_sampling(words: Tensor, key: StepKey, sampling: SamplingRows) -> None:
    """Write the rows' parameters into a step's input, padded to the key's rows."""
    count = sampling.seeds.shape[0]
    for name, view in _sampling_views(words[key.stand : key.words], key.rows).items():
        view[:count] = getattr(sampling, name)
        view[count:] = _PAD.get(name, 0)


def read_input(words: Tensor, key: StepKey) -> tuple[Pending, SamplingRows]:
    """What a step reads, as views of its input."""
    views = _sampling_views(words[key.stand : key.words], key.rows)
    sampling = SamplingRows(
        seeds=views["seeds"], temperature=views["temperature"], top_k=views["top_k"], top_p=views["top_p"],
        min_p=views["min_p"], cold=views["cold"] != 0, **dict(zip(_CUTS, key.cuts, strict=True)),
    )  # fmt: skip
    return pending_from(words[: key.stand], key.rows, key.width, key.beams), sampling


def cuts_of(sampling: SamplingRows) -> tuple[bool, ...]:
    """``_CUTS`` of these rows. For fewer graphs a batch is all greedy, or said to be partly so."""
    return tuple(name == "any_greedy" or bool(getattr(sampling, name)) for name in _CUTS)
