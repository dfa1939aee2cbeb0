"""Which draft tree pays at the current batch: measured, not assumed. Pure Python.

Verification is nearly free while few rows run and a plain loss when many do; where that turns depends on the machine,
the model, the precision and how good the head is. So each option (trees, and no tree) is tried a few times at each
batch size, and then the one that gave the most tokens per second runs, with a rare look at the others. The tokens do
not depend on the choice, only their speed does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from drafter.config import TreeShape

__all__ = ["DEFAULT_TREES", "TreeChooser"]

DEFAULT_TREES: tuple[TreeShape | None, ...] = (
    None,
    TreeShape(beams=1, length=2),
    TreeShape(beams=1, length=4),
    TreeShape(beams=2, length=4),
    TreeShape(beams=4, length=4),
)

_TRIALS = 3
"""Looks at each option before any is preferred; the first one at a batch size also pays for warming up."""
_LOOK_EVERY = 128
"""Steps between looks at an option that is not the best one."""
_WORTH_A_LOOK = 0.75
"""Options below this share of the best rate are looked at only an eighth as often."""
_REMEMBERED = 15
"""Step times kept for each option and batch size. Their median is the estimate: a busy neighbour is not a slow tree."""
_BLEND = 0.05
"""Weight of the newest acceptance."""
_TRUSTED = 20
"""Steps that a recalled acceptance counts for: other problems may be drafted better or worse."""


@dataclass(slots=True)
class _Acceptance:
    """Tokens per step and row: a plain mean at first, then one that follows change."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(1 / self.count, _BLEND)


class TreeChooser:
    """Chooses for each step, and learns from what the step took."""

    def __init__(self, options: Sequence[TreeShape | None] = DEFAULT_TREES) -> None:
        self.options = tuple(options)
        self._seconds: dict[tuple[int, TreeShape | None], deque[float]] = {}
        self._tokens = {option: _Acceptance() for option in self.options}
        self._steps: dict[int, int] = {}

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
        for option in self.options:
            trials = _TRIALS if rates[option] >= _WORTH_A_LOOK * rates[best] else _TRIALS - 1
            if len(self._times(size, option)) < trials:
                return option
        if step == 0 or step % _LOOK_EVERY:
            return best
        looks = step // _LOOK_EVERY
        close = [o for o in self.options if o != best and (rates[o] >= _WORTH_A_LOOK * rates[best] or looks % 8 == 0)]
        return close[looks % len(close)] if close else best

    def observe(self, rows: int, option: TreeShape | None, *, seconds: float, tokens: int) -> None:
        """A step of ``rows`` rows took ``seconds`` and emitted ``tokens`` in all."""
        self._times(_bucket(rows), option).append(seconds / rows)
        self._tokens[option].add(tokens / rows)

    def rate(self, rows: int, option: TreeShape | None) -> float:
        """Estimated tokens per second and row; 0 before the first measurement."""
        times = self._times(_bucket(rows), option)
        return self._tokens[option].value / median(times) if times else 0.0

    def learned(self) -> dict[str, Any]:
        """Everything measured so far, as plain data for :meth:`recall`."""
        return {
            "seconds": [[size, str(option), list(times)] for (size, option), times in self._seconds.items() if times],
            "tokens": [[str(option), kept.value, kept.count] for option, kept in self._tokens.items() if kept.count],
        }

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Begin with what an earlier run on this machine measured; options that are not offered now are skipped.

        New measurements replace it step by step, so a machine that has become slower is noticed.
        """
        named = {str(option): option for option in self.options}
        for size, name, times in learned["seconds"]:
            if name in named:
                self._times(int(size), named[name]).extend(float(seconds) for seconds in times)
        for name, value, count in learned["tokens"]:
            if name in named:
                self._tokens[named[name]] = _Acceptance(float(value), min(int(count), _TRUSTED))

    def _times(self, size: int, option: TreeShape | None) -> deque[float]:
        return self._seconds.setdefault((size, option), deque(maxlen=_REMEMBERED))


def _bucket(rows: int) -> int:
    """Batch sizes that share measurements: 1, 2, 3-4, 5-8, ..."""
    return (rows - 1).bit_length()
