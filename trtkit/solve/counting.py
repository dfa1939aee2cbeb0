"""In which order a problem's samples are counted: one that follows from the samples alone, not from the clock.

Stop rules look at the first samples to arrive, and on a real machine that depends on the batch, on its speed and on
interruptions. So arrivals are told by a clock of the problem's own: ``lanes`` rows of an imaginary batch emit one token
per tick, and each sample in its turn takes the lane that is free first. Samples that have ended are counted as soon as
no other one can come before them on that clock. The same samples are then counted in the same order, and a rule stops
at the same vote, however often the run was interrupted; ``trtkit revote --batch LANES`` replays just this.

Real decoding is close to lockstep, so a sample that has ended waits for others only as long as they lag behind.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

__all__ = ["CountingOrder"]


class CountingOrder:
    """Hands out the ``samples`` of one problem, once each."""

    def __init__(self, samples: int, lanes: int | None) -> None:
        """``lanes`` None: as they arrive, for runs under a clock, where time counts for more than repetition."""
        self._samples = samples
        self._lanes = lanes
        self._next = min(samples, lanes or 0)
        self._began = dict.fromkeys(range(self._next), 0)
        """The tick at which each sample in a lane began."""

    def next(self, ended: Mapping[int, int], least: Callable[[int], int], counted: Container[int]) -> list[int]:
        """The samples to count next, which end at one tick; none while they cannot be known.

        ``ended``: the tokens of the samples that have ended, in order of arrival, ``counted`` or not. ``least``: the
        fewest tokens with which a sample can end that has not.
        """
        if self._lanes is None:
            return [index for index in ended if index not in counted]
        ends = {i: began + (ended[i] if i in ended else least(i)) for i, began in self._began.items()}
        tick = min(ends.values(), default=0)
        group = sorted(index for index, end in ends.items() if end == tick)
        if not all(index in ended for index in group):
            return []
        for index in group:
            del self._began[index]
            if self._next < self._samples:
                self._began[self._next] = tick
                self._next += 1
        return group
