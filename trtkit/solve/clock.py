"""The time bank: how long each problem may take so that all of them fit into one limit. Pure: it is told the time.

Every problem has a base, a fair part of the limit. What a problem leaves of its base flows into a bank, and a problem
that needs more may draw from the bank, up to a cap. The published setting (NemoSkills, arXiv 2504.16891) is 350 s and
up to 210 s more, for 50 problems in 5 hours; other limits and numbers of problems scale it.

What a problem may take depends on the time and the number of problems that are left. The bases of all later problems
are set aside before anybody draws, so nobody gets less than a fair part for coming late, and nobody takes more than a
third of the bank, so that the first problems cannot empty it. Where the bank holds more than the cap for each problem
that is left, an even part of it takes the cap's place: time that nobody can take is lost when the limit is over. No
problem gets less for that, since what it leaves is the same for each of the others. Later problems count as unknown:
only their number is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trtkit.errors import UsageError

__all__ = ["Clock", "Pace", "TimeBudget", "parse_duration"]

_PUBLISHED_FAIR = 360.0
_PUBLISHED_BASE = 350.0
_PUBLISHED_DRAW = 210.0
_PUBLISHED_RESERVE = 180 / 18_000
"""The published solvers stop at 4 h 57 min of 5 h."""
_DRAWERS = 3
"""A problem draws at most this part of the bank."""
_WEIGHT_LOW, _WEIGHT_HIGH = 0.5, 1.5
_LONG_SILENCE = 5
"""A silence counts for at most so many steps."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str, where: str | None = None) -> float:
    """``90s``, ``10m``, ``5h``, ``1h30m``, or seconds as a plain number; ``where`` is what asked for it.

    Raises :class:`UsageError`.
    """
    plain = re.fullmatch(r"[0-9]+(\.[0-9]+)?", text.strip())
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([hms])", text)
    if plain:
        seconds = float(plain.group())
    elif parts and "".join(number + unit for number, unit in parts) == re.sub(r"\s", "", text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        seconds = 0.0
    if seconds <= 0:
        raise UsageError(f"{text!r} is no duration", where=where, hint="a positive time such as 90s, 10m, 5h or 1h30m")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBudget:
    """The limit and how it is dealt out. Use :func:`TimeBudget.of` unless you want other proportions."""

    limit_seconds: float
    """For everything, from the start of the program: loading the engine, solving, earlier sessions of the run."""
    reserve_seconds: float
    """Kept back at the end of the limit: for writing results, and for a restart."""
    base_seconds: float
    """A problem's own time."""
    draw_seconds: float
    """The most that one problem may take from the bank on top of that, unless the bank is full."""

    @classmethod
    def of(cls, limit_seconds: float, problems: int, reserve_seconds: float | None = None) -> TimeBudget:
        """The published proportions for ``problems`` problems. The reserve is 1 % of the limit unless given.

        Raises :class:`UsageError` when nothing would be left beside the reserve.
        """
        reserve = _PUBLISHED_RESERVE * limit_seconds if reserve_seconds is None else reserve_seconds
        if reserve < 0 or reserve >= limit_seconds:
            raise UsageError(
                f"a reserve of {reserve:g} s does not fit into a limit of {limit_seconds:g} s",
                hint="make the limit longer or the reserve shorter",
            )
        fair = limit_seconds / max(problems, 1) / _PUBLISHED_FAIR
        return cls(
            limit_seconds=limit_seconds,
            reserve_seconds=reserve,
            base_seconds=fair * _PUBLISHED_BASE,
            draw_seconds=fair * _PUBLISHED_DRAW,
        )


@dataclass(slots=True, kw_only=True)
class _Account:
    base: float
    used: float


class Clock:
    """The running account of a run. Times are seconds of any monotonic clock, given by the caller.

    Problems that share the batch are charged for their part of each step, so their shares add up to the limit too.
    ``difficulty`` maps problem ids to expected tokens: bases scale with it, relative to its mean and clipped to 0.5 and
    1.5; problems that it does not name count as average.
    """

    def __init__(
        self,
        budget: TimeBudget,
        *,
        now: float,
        spent: float = 0.0,
        problems: int,
        difficulty: Mapping[str, float] | None = None,
    ) -> None:
        """``spent`` is what was used before ``now``; ``problems`` how many are to be opened from now on."""
        self.budget = budget
        self._end = now - spent + budget.limit_seconds - budget.reserve_seconds
        self._unopened = problems
        self._difficulty = dict(difficulty or {})
        self._mean = sum(self._difficulty.values()) / len(self._difficulty) if self._difficulty else 0.0
        self._accounts: dict[str, _Account] = {}
        self._unit = budget.base_seconds

    def left(self, now: float) -> float:
        """Seconds until everything must be answered; negative when that is over."""
        return self._end - now

    def weight(self, problem_id: str) -> float:
        """How many average problems this one counts for."""
        expected = self._difficulty.get(problem_id)
        if expected is None or self._mean <= 0 or not math.isfinite(expected):
            return 1.0
        return min(max(expected / self._mean, _WEIGHT_LOW), _WEIGHT_HIGH)

    def open(self, problem_id: str, now: float, *, used: float = 0.0) -> float:
        """Begin a problem, which had ``used`` seconds in an earlier session. Returns its share: the seconds that it may
        take in all as things stand. More may come back to the bank while it runs."""
        self._unopened = max(self._unopened - 1, 0)
        weight = self.weight(problem_id)
        free = max(self.left(now) - self._committed(), 0.0)
        self._unit = min(self.budget.base_seconds, free / (weight + self._unopened))
        self._accounts[problem_id] = _Account(base=weight * self._unit, used=used)
        return used + max(self.left_for(problem_id, now), 0.0)

    def charge(self, seconds: float, parts: Mapping[str, int]) -> None:
        """Divide a step of ``seconds`` over the open problems in proportion to ``parts``, their rows in it."""
        rows = sum(count for problem_id, count in parts.items() if problem_id in self._accounts)
        for problem_id, count in parts.items():
            if problem_id in self._accounts:
                self._accounts[problem_id].used += seconds * count / rows

    def left_for(self, problem_id: str, now: float) -> float:
        """Seconds that an open problem may still take, 0 or less when its time is up."""
        account = self._accounts[problem_id]
        drawn = max(account.used - account.base, 0.0)
        bank, problems = self.bank(now) + drawn, len(self._accounts) + self._unopened
        draw = min(max(self.budget.draw_seconds, bank / problems), bank / min(_DRAWERS, problems))
        return min(account.base + draw - account.used, self.left(now))

    def used(self, problem_id: str) -> float:
        """What an open problem has used, earlier sessions included."""
        return self._accounts[problem_id].used

    def close(self, problem_id: str) -> float:
        """End a problem; what it has not used is in the bank. Returns what it used, earlier sessions included."""
        return self._accounts.pop(problem_id).used

    def put_back(self, problem_id: str) -> None:
        """End a problem that is to be opened again: if it was open, it is one of those to come."""
        if self._accounts.pop(problem_id, None) is not None:
            self._unopened += 1

    def bank(self, now: float) -> float:
        """Seconds that no base lays claim to."""
        return max(self.left(now) - self._committed() - self._unopened * self._unit, 0.0)

    def _committed(self) -> float:
        """What the open problems have not used of their bases."""
        return sum(max(account.base - account.used, 0.0) for account in self._accounts.values())


class Pace:
    """How long an engine takes for its next tokens."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Smoothed over a few steps; 0 before the first."""
        self._silent = 0.0

    def stepped(self, seconds: float, *, spoke: bool) -> None:
        """After a step. One that brought nothing, as from a server that is slow, is a part of the next that does."""
        if not spoke:
            self._silent += seconds
            return
        # One long silence, of a server that was started anew say, is not the pace; several are.
        silent = min(self._silent, _LONG_SILENCE * self.seconds) if self.seconds else self._silent
        self.seconds += (silent + seconds - self.seconds) * (0.2 if self.seconds else 1.0)
        self._silent = 0.0
