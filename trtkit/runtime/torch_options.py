"""What a torch engine is made with: how much it may hold, and where its drafts come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drafter.config import TreeShape
from drafter.model import Drafter
from trtkit.runtime.tree_choice import DEFAULT_TREES
from trtkit.scheme import KvDtype

__all__ = ["Drafting", "TorchLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchLimits:
    """How much the engine may hold at once."""

    rows: int
    total_tokens: int
    """Longest prompt + output."""
    kv_blocks: int
    block_size: int = 16
    kv_dtype: KvDtype = "model"
    fixed_shapes: bool | None = None
    """Pad decode steps to a few sizes, so that a CUDA graph can replay them; None means on CUDA."""
    overlap: bool | None = None
    """Launch a decode step before the one in flight is read; None means on CUDA. With fixed shapes only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """Where drafts come from, and the trees that they may make.

    With one option that tree is drawn in every step; with several (None is plain decoding) the engine takes the one
    that it measures to be fastest at the current batch.
    """

    head: Drafter | None = None
    """A draft head on the model's device."""
    lookup: bool = False
    """Look drafts up in the text so far, see ``lookup.py``: all of them, or beside a head half of a tree's beams.
    Rounded down, so that a chain is the head's."""
    trees: tuple[TreeShape | None, ...] = DEFAULT_TREES
    memory: Path | None = None
    """File that keeps the measured step times from run to run."""
    expected: Mapping[TreeShape, Sequence[float]] = field(default_factory=dict)
    """Shares of steps that accepted at least 1, 2, ... tokens elsewhere: where the choice begins."""

    def __post_init__(self) -> None:
        assert self.head is not None or self.lookup
