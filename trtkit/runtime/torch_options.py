"""What a torch engine is made with: how much it may hold, and where its drafts come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drafter.config import TreeShape
from drafter.model import Drafter
from trtkit.runtime.lookup import LOOKED_UP
from trtkit.runtime.tree_choice import DEFAULT_TREES
from trtkit.scheme import KvDtype

__all__ = ["TREES_OF_BOTH", "Drafting", "TorchLimits"]

LONGEST_HEAD_CHAIN = 4
"""Where drafts are looked up, too: chains beyond it are."""
TREES_OF_BOTH = (*DEFAULT_TREES, TreeShape(beams=1, length=8))
"""What an engine chooses from that has a head and looks up."""


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
    prefix_cache: bool = False
    """Keep what was computed while its blocks are free, for prompts that begin with the same tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """Where drafts come from, and the trees that they may make.

    With one option that tree is drawn in every step; with several (None is plain decoding) the engine takes the one
    that it measures to be fastest at the current batch.
    """

    head: Drafter | None = None
    """A draft head on the model's device."""
    lookup: bool = False
    """Look drafts up in the text so far, see ``lookup.py``."""
    trees: tuple[TreeShape | None, ...] = DEFAULT_TREES
    memory: Path | None = None
    """File that keeps the measured step times from run to run."""
    expected: Mapping[TreeShape, Sequence[float]] = field(default_factory=dict)
    """Shares of steps that accepted at least 1, 2, ... tokens when the head was measured."""

    def __post_init__(self) -> None:
        assert self.head is not None or self.lookup

    def looked_up(self, tree: TreeShape) -> int:
        """How many beams of ``tree`` are looked up: all without a head, else half of them, and all of a long chain, for
        which a head would be run token by token."""
        if self.head is None or not self.lookup:
            return tree.beams if self.lookup else 0
        return tree.beams // 2 if tree.beams > 1 else int(tree.length > LONGEST_HEAD_CHAIN)

    def first_shares(self) -> dict[str, Sequence[float]]:
        """Where the choice begins: by kind of tree, the shares of steps that accept at least 1, 2, ... tokens."""
        by_head = {self.kind(tree): shares for tree, shares in self.expected.items() if not self.looked_up(tree)}
        by_text = {self.kind(tree): shares for tree, shares in LOOKED_UP.items() if self.looked_up(tree) == tree.beams}
        return by_head | by_text

    def kind(self, tree: TreeShape) -> str:
        """What trees have in common that are right equally often, at equal depths."""
        return f"{tree.beams - self.looked_up(tree)}+{self.looked_up(tree)}" if self.lookup else str(tree.beams)
