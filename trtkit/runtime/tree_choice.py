"""Which draft tree pays at the current batch: measured, not assumed. Pure Python.

Verification is nearly free while few rows run and a plain loss when many do; where that turns depends on the machine,
the model, the precision and how good the head is. So each option (trees, and no tree) is tried a few times at each
batch size, and then the one that gave the most tokens per second runs, with a rare look at the others. The tokens do
not depend on the choice, only their speed does.

A step's time is measured for each option and batch size. Tokens per step follow from the acceptance by depth, which is
kept per kind of tree, the number of beams if nobody says otherwise: at one row a single step says little, and 1x2 and
1x4 can learn from each other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from drafter.config import TreeShape

__all__ = ["DEFAULT_TREES", "TreeChooser"]

DEFAULT_TREES: tuple[TreeShape | None, ...] = (
    None,
    TreeShape(beams=1, length=2),
    TreeShape(beams=1, length=3),
    TreeShape(beams=1, length=4),
    TreeShape(beams=2, length=4),
    TreeShape(beams=4, length=4),
)

_TRIALS = 3
"""Looks at each option before any is preferred; the first one at a batch size also pays for warming up."""
_HOPE = 1.15
"""How much better than expected an option may turn out of which little was seen."""
_STEADY = 0.5
"""An untried option's nodes cost at least this share of what those of smaller ones do, each."""
_LOOK_EVERY = 8
"""Steps between two looks at options that are not the best one."""
_EARLY_LOOKS = 12
"""An option whose fastest look would make it the best is looked at whenever one is due until it has so many times: a
median of three is mostly noise."""
_LOOKS_SHARE = 0.002
"""Of the time, lost on later looks at any one option: nearly as good ones are looked at often, bad ones rarely."""
_REMEMBERED = 15
"""Step times kept for each option and batch size. Their median is the estimate: a busy neighbour is not a slow tree."""
_MEMORY_ROWS = 400
"""Row-steps after which an observed acceptance weighs e times less: samples differ, and so do their ends."""
_TRUSTED = 60
"""Row-steps that an acceptance from elsewhere counts for: other problems may be drafted better or worse."""
_FALLING = 0.8
"""Assumed share of the drafts of one depth that are also right at the next, where nothing was seen yet."""


class _Acceptance:
    """How often at least 1, 2, ... drafted tokens are accepted, for one kind of tree.

    Trees of a kind share it: a chain of four says how good a chain of two would have been.
    """

    def __init__(self) -> None:
        self.accepted: list[float] = []
        self.rows: list[float] = []
        self._expected: dict[int, float] = {}

    def add(self, rows: float, accepted: Sequence[float], keep: float) -> None:
        """``accepted[d]`` of ``rows`` rows reached depth d + 1; what was seen before is multiplied by ``keep``."""
        self._expected.clear()
        for depth, count in enumerate(accepted):
            if depth == len(self.rows):
                self.accepted.append(0.0)
                self.rows.append(0.0)
            self.accepted[depth] = keep * self.accepted[depth] + count
            self.rows[depth] = keep * self.rows[depth] + rows

    @property
    def known(self) -> bool:
        """Whether enough was seen to speak of shares."""
        return bool(self.rows) and self.rows[0] >= _TRUSTED

    def tokens(self, length: int) -> float:
        """Expected tokens of a step that drafts ``length`` of them."""
        if length not in self._expected:
            self._expected[length] = 1.0 + sum(self.shares(length))
        return self._expected[length]

    def shares(self, length: int) -> list[float]:
        """Expected shares for depths 1 .. length, falling."""
        shares: list[float] = []
        above = 1.0
        for depth in range(length):
            seen = depth < len(self.rows) and self.rows[depth] > 0
            share = self.accepted[depth] / self.rows[depth] if seen else above * _FALLING
            above = min(above, share)
            shares.append(above)
        return shares


class TreeChooser:
    """Chooses for each step, and learns from what the step took."""

    def __init__(
        self, options: Sequence[TreeShape | None] = DEFAULT_TREES,
        kind: Callable[[TreeShape], str] = lambda tree: str(tree.beams),
    ) -> None:  # fmt: skip
        """Trees of one ``kind`` differ in their length alone."""
        self.options = tuple(options)
        self._kind = kind
        self._seconds: dict[tuple[int, TreeShape | None], deque[float]] = {}
        self._medians: dict[tuple[int, TreeShape | None], float] = {}
        self._acceptance = {kind(option): _Acceptance() for option in self.options if option is not None}
        self._steps: dict[int, int] = {}
        self._tried: set[int] = set()
        """Batch sizes at which every option has had its trials, or is hopeless."""
        self._spent: dict[int, float] = {}
        """Seconds at each batch size, and in ``_looked`` when an option ran last."""
        self._looked: dict[tuple[int, TreeShape | None], float] = {}
        self._warm: set[tuple[int, TreeShape | None]] = set()

    def expect(self, kind: str, shares: Sequence[float]) -> None:
        """Begin with these shares of accepted depths for trees of this kind, as the head's training measured."""
        if kind in self._acceptance:
            self._acceptance[kind].add(_TRUSTED, [_TRUSTED * share for share in shares], keep=0.0)

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest option."""
        return max(1 if option is None else option.max_nodes for option in self.options)

    @property
    def max_length(self) -> int:
        """Drafted tokens per beam of the longest option."""
        return max(0 if option is None else option.length for option in self.options)

    def choose(self, rows: int) -> TreeShape | None:
        """The option for a step of ``rows`` rows."""
        size = _bucket(rows)
        step = self._steps[size] = self._steps.get(size, -1) + 1
        rates = {option: self.rate(rows, option) for option in self.options}
        best = max(self.options, key=lambda option: rates[option])
        look = step % _LOOK_EVERY == 0
        if look or size not in self._tried:
            for option in self.options:
                if len(self._times(size, option)) < _TRIALS and not self._hopeless(rows, option, rates[best]):
                    self._tried.discard(size)
                    return option
            self._tried.add(size)
        if not look:
            return best
        others = [option for option in self.options if option != best and self._times(size, option)]
        few = [option for option in others if len(self._times(size, option)) < _EARLY_LOOKS]
        close = [option for option in few if self._at_its_best(rows, option) >= rates[best]]
        if close:
            return min(close, key=lambda option: len(self._times(size, option)))
        waits = {option: self._wait(rows, option, rates[option] / rates[best]) for option in others}
        due = min(others, key=lambda option: waits[option], default=best)
        return due if waits.get(due, 0.0) <= 0 else best

    def _wait(self, rows: int, option: TreeShape | None, share: float) -> float:
        """Seconds before another look at an option that has this share of the best one's rate."""
        key = (_bucket(rows), option)
        lost = max(0.0, 1.0 - share) * rows * self._median(*key)
        return self._looked.get(key, 0.0) + lost / _LOOKS_SHARE - self._spent.get(key[0], 0.0)

    def _hopeless(self, rows: int, option: TreeShape | None, best: float) -> bool:
        """Whether an option need not be tried: it costs at least what smaller ones do, and that is too much already.

        At a large batch one step of the widest tree can take as long as fifty plain ones.
        """
        if option is None or self._times(_bucket(rows), option):
            return False
        nodes = _nodes(option)
        found = ((_nodes(o), self._median(_bucket(rows), o)) for o in self.options if _nodes(o) < nodes)
        smaller = sorted((count, seconds) for count, seconds in found if seconds)
        if not smaller or smaller[0][0] == smaller[-1][0]:
            return False
        (few, least), (many, most) = smaller[0], smaller[-1]
        more = _STEADY * max(0.0, most - least) / (many - few) * (nodes - many)
        return _HOPE * self.tokens(option) / (most + more) < best

    def _at_its_best(self, rows: int, option: TreeShape | None) -> float:
        """The rate of an option if its fastest look was the true one, and its drafts are better than they seemed while
        few of them were seen."""
        known = option is None or self._acceptance[self._kind(option)].known
        return (1.0 if known else _HOPE) * self.tokens(option) / min(self._times(_bucket(rows), option))

    def observe(self, rows: int, option: TreeShape | None, *, seconds: float, accepted: Sequence[int]) -> None:
        """A step of ``rows`` rows took ``seconds``; ``accepted[d]`` of them accepted more than d drafted tokens.

        The first step of a shape does not count: libraries choose and build their kernels in it.
        """
        size = _bucket(rows)
        self._spent[size] = self._looked[size, option] = self._spent.get(size, 0.0) + seconds
        if (rows, option) in self._warm:
            self._times(size, option).append(seconds / rows)
            self._medians.pop((size, option), None)
        self._warm.add((rows, option))
        if option is not None:
            self._acceptance[self._kind(option)].add(rows, accepted, keep=math.exp(-rows / _MEMORY_ROWS))

    def learn(self, kind: str, right: Sequence[int], length: int) -> None:
        """Drafts of this kind, ``length`` long, would have been right ``right`` times in a row at places of the text.

        Where they are right, steps are longer and thus fewer: a place counts for the share of a step that it has.
        """
        if right and kind in self._acceptance:
            weights = [1 / (1 + count) for count in right]
            pairs = list(zip(weights, right, strict=True))
            accepted = [sum(weight for weight, count in pairs if count > depth) for depth in range(length)]
            self._acceptance[kind].add(sum(weights), accepted, keep=math.exp(-sum(weights) / _MEMORY_ROWS))

    def tokens(self, option: TreeShape | None) -> float:
        """Expected tokens per row and step."""
        return 1.0 if option is None else self._acceptance[self._kind(option)].tokens(option.length)

    def rate(self, rows: int, option: TreeShape | None) -> float:
        """Estimated tokens per second, of all rows; 0 before the first measurement."""
        seconds = self._median(_bucket(rows), option)
        return self.tokens(option) / seconds if seconds else 0.0

    def learned(self) -> dict[str, Any]:
        """Everything measured so far, as plain data for :meth:`recall`."""
        return {
            "seconds": [[size, str(option), list(times)] for (size, option), times in self._seconds.items() if times],
            "acceptance": [[kind, kept.shares(len(kept.rows))] for kind, kept in self._acceptance.items()],
        }

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Begin with what an earlier run on this machine measured; options that are not offered now are skipped.

        New measurements replace it step by step, so a machine that has become slower is noticed.
        """
        named = {str(option): option for option in self.options}
        for size, name, times in learned["seconds"]:
            if name in named:
                self._times(int(size), named[name]).extend(s for s in map(float, times) if s > 0)
                self._medians.pop((int(size), named[name]), None)
        for kind, shares in learned["acceptance"]:
            if shares:
                self.expect(str(kind), [float(share) for share in shares])

    def _median(self, size: int, option: TreeShape | None) -> float:
        """Seconds of a step and row; 0 before the first measurement."""
        if (size, option) not in self._medians:
            self._medians[size, option] = median(times) if (times := self._times(size, option)) else 0.0
        return self._medians[size, option]

    def _times(self, size: int, option: TreeShape | None) -> deque[float]:
        return self._seconds.setdefault((size, option), deque(maxlen=_REMEMBERED))


def _nodes(option: TreeShape | None) -> int:
    return 1 if option is None else option.max_nodes


def _bucket(rows: int) -> int:
    """Batch sizes that share measurements: 1, 2, 3-4, 5-8, ..."""
    return (rows - 1).bit_length()
