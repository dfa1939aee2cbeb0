"""From tokenized solutions to training batches: split by problem, windows from the whole solution, packed.

The hidden states at a window depend on everything before it, so a window keeps its prefix: the frozen target runs over
``tokens[:end]``, the loss looks at ``[start, end)`` only. The published recipe trains on the first 2048 tokens of each
solution and so never sees how long thoughts end.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Sample", "Window", "is_held_out", "pack", "split_by_problem", "windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One solution in the deployed chat format."""

    problem: str
    """The problem's text: what train and held-out are split by."""
    tokens: tuple[int, ...]
    prompt: int
    """How many of them are the prompt: never scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens [start, end) of a sample."""

    sample: Sample
    start: int
    end: int

    @property
    def cost(self) -> int:
        """Tokens that the target has to run over."""
        return self.end


def is_held_out(problem: str, share: float) -> bool:
    """Whether a problem is kept from training, by a hash of its text alone.

    The other problems do not matter, and what a smaller share holds out a larger one holds out, too.
    """
    digest = hashlib.sha256(problem.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def split_by_problem(samples: Sequence[Sample], held_out: float) -> tuple[list[Sample], list[Sample]]:
    """(train, held-out): every solution of a problem on the same side."""
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        sides[is_held_out(sample.problem, held_out)].append(sample)
    return sides


def windows(samples: Sequence[Sample], length: int, *, seed: int, epoch: int) -> list[Window]:
    """One window per sample in a random order: at most ``length`` tokens, from anywhere in the completion."""
    source = random.Random(f"{seed}/{epoch}")
    made = []
    for sample in samples:
        total = len(sample.tokens)
        # A window starts one token early: the prompt's last hidden state draws the first token of the completion.
        earliest = max(sample.prompt - 1, 0)
        # Drawn from beyond both ends and moved inside: the first and the last tokens are seen as often as the others.
        start = source.randint(earliest - length + 1, max(earliest, total - 1))
        start = max(earliest, min(start, total - length))
        made.append(Window(sample=sample, start=start, end=min(start + length, total)))
    source.shuffle(made)
    return made


def pack(items: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Group windows so that each group costs at most ``tokens`` (a longer window stands alone). No padding."""
    group: list[Window] = []
    room = tokens
    for item in items:
        if group and item.cost > room:
            yield group
            group, room = [], tokens
        group.append(item)
        room -= item.cost
    if group:
        yield group
