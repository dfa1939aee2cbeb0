"""How many CPU threads a step takes: measured, not assumed. Pure Python.

The threads of a step wait for each other some hundred times. While another process has one of the cores, each wait may
last until the system gives that core back, and a step on all cores takes longer than one on fewer. And a small model
gains nothing from many cores. So now and then a few steps run with fewer threads, or with more, in turns with steps as
before, and the faster number stays. A row's bits do not depend on it in the C++ kernels, in plain torch up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from drafter.config import TreeShape

__all__ = ["ThreadChooser"]

_ROUNDS = 3
"""Steps of either number that are compared; before them one warms up whatever is kept for each number of threads."""
_BETTER = 0.92
"""The share of a step's time that another number has to stay below."""
_HOPELESS, _CLEAR = 3.0, 1.25
"""A look ends early when a number takes so many times the other's in one step, or in two."""
_SLOW, _SLOW_STEPS = 2.5, 4
"""So many times slower than before, for so many steps: something has happened, so a look is due."""
_DRIFT = 1.02
"""Growth per step of what counts as usual: contexts grow."""
_SOON_SECONDS, _LONGEST_SECONDS, _LONGER = 0.25, 15.0, 4
"""Time of steps between looks, and by what it grows with each look that changed nothing."""
_LEAST_STEPS = 16
"""Steps between looks, at least."""
_FAR = 4
"""Numbers that are so many times larger or smaller are not looked at."""
_ALIKE = 0.15
"""By how much the rows of steps that are compared may differ."""


@dataclass(slots=True, kw_only=True)
class _Look:
    """A few steps with another number of threads, in turns with the one so far."""

    place: int
    rows: int
    shape: TreeShape | None
    other: bool = True
    """Whether the next step has the other number."""
    warm: bool = False
    unlike: int = 0
    times: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    def alike(self, rows: int, shape: TreeShape | None) -> bool:
        return shape == self.shape and abs(rows - self.rows) <= _ALIKE * self.rows

    def add(self, seconds: float) -> None:
        if self.warm:
            self.times[self.other].append(seconds)
        self.warm, self.other = True, not self.other

    @property
    def over(self) -> bool:
        before, others = self.times[False], self.times[True]
        if not before or not others:
            return False
        ratio = min(others) / min(before)
        clear = len(before) > 1 < len(others) and not 1 / _CLEAR < ratio < _CLEAR
        return ratio > _HOPELESS or clear or len(others) == _ROUNDS == len(before)

    @property
    def pays(self) -> bool:
        return median(self.times[True]) < _BETTER * median(self.times[False])


class ThreadChooser:
    """Chooses for each step, and learns from what the step took. Begins with the most."""

    def __init__(self, most: int) -> None:
        halves = {most >> times for times in range(most.bit_length())}
        self.counts = sorted({*halves, most * 3 // 4, max(1, most - 1)} - {0})
        self._place = len(self.counts) - 1
        self._turn = 0
        self._pause = self._left = _SOON_SECONDS
        self._steps = _LEAST_STEPS  # the first look is due after that time alone
        self._look: _Look | None = None
        self._usual: dict[tuple[int, TreeShape | None], float] = {}
        self._slow = 0

    @property
    def count(self) -> int:
        """The number that was the fastest."""
        return self.counts[self._place]

    @property
    def threads(self) -> int:
        """For the next step."""
        look = self._look
        return self.counts[look.place if look is not None and look.other else self._place]

    @property
    def looks(self) -> bool:
        """Whether numbers are being compared: the times of such steps say little about anything else."""
        return self._look is not None

    def observe(self, rows: int, shape: TreeShape | None, seconds: float) -> None:
        """A step of ``rows`` rows with that draft tree took ``seconds`` on ``threads``."""
        if self._look is not None:
            self._compare(self._look, rows, shape, seconds)
            return
        key = rows, shape
        usual = self._usual.get(key, seconds)
        self._usual[key] = min(seconds, _DRIFT * usual)
        self._slow = self._slow + 1 if seconds > _SLOW * usual else 0
        self._left, self._steps = self._left - seconds, self._steps + 1
        due = self._left <= 0 and self._steps >= _LEAST_STEPS
        if self._slow == _SLOW_STEPS:
            self._pause, self._turn, due = _SOON_SECONDS, 0, True
        if due and (others := self._others()):
            self._look = _Look(place=others[self._turn % len(others)], rows=rows, shape=shape)

    def _others(self) -> list[int]:
        """What is looked at in turn: near numbers first, and fewer before more."""
        near = [
            place for place, count in enumerate(self.counts)
            if place != self._place and count <= _FAR * self.count and self.count <= _FAR * count
        ]  # fmt: skip
        return sorted(near, key=lambda place: (abs(place - self._place), place))

    def _compare(self, look: _Look, rows: int, shape: TreeShape | None, seconds: float) -> None:
        if look.alike(rows, shape):
            look.add(seconds)
        else:
            look.unlike += 1
        if look.unlike > _ROUNDS:
            self._look, self._left, self._steps = None, self._pause, 0
        elif look.over:
            self._look = None
            self._settle(look)

    def _settle(self, look: _Look) -> None:
        if look.pays:  # and perhaps the next number does, too
            self._place, self._pause, self._turn = look.place, _SOON_SECONDS, 0
        else:
            self._pause, self._turn = min(_LONGER * self._pause, _LONGEST_SECONDS), self._turn + 1
        self._left, self._steps = self._pause, 0
        self._usual.clear()
        self._slow = 0
