"""What a run produces: ``Attempt`` and ``Solution``, and counting the one into the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.ends import Ending, Probe
from trtkit.solve.vote import Same, Tally

__all__ = ["DEADLINE", "TIME_LIMIT", "Attempt", "Solution", "count_attempts"]

DEADLINE, TIME_LIMIT = "deadline", "time limit"
"""``Solution.stopped_early`` where the clock ended a problem: its share of the time was spent, or nothing was left to
begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One finished sample."""

    problem_id: str
    index: int
    variant: str
    tokens: int
    """Generated tokens, the one that ended it included."""
    finish: FinishReason
    box: str | None
    """Content of its last box as written, None without one."""
    seconds: float
    """From submitting the problem to the end of this sample."""
    text: str | None = None
    """Only with ``save_text``."""
    ending: Ending | None = None
    """Why it ended; None in journals of older versions."""
    forced: bool = False
    """Its thought was ended for it and the box opened, because its budget or its time was spent."""
    confidence: float | None = None
    """Mean log-probability of its last tokens, where it was asked for (``ends.CONFIDENCE_TOKENS``)."""
    tool_calls: int = 0
    """Code blocks that were run for it."""
    probes: tuple[Probe, ...] = ()
    """What it said when it was asked on its way."""
    used_seconds: float | None = None
    """What its problem had used of a time limit by then: less than ``seconds`` where problems share the batch."""

    @property
    def charged_seconds(self) -> float:
        """``used_seconds``; journals of older versions do not have it."""
        return self.seconds if self.used_seconds is None else self.used_seconds

    def answer(self, mode: AnswerMode) -> Answer | None:
        """What it votes for."""
        return read_answer(self.box, mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The outcome for one problem."""

    problem_id: str
    tally: Tally
    attempts: tuple[Attempt, ...]
    """The samples that were counted, in that order."""
    tokens: int
    """All tokens generated for it, those of samples that were not counted included."""
    seconds: float
    stopped_early: str | None = None
    """What ended it while samples were outstanding: a stop rule, ``DEADLINE`` or ``TIME_LIMIT``."""
    error: str | None = None
    """Why the engine refused it."""
    share_seconds: float | None = None
    """The time that it was given; None without a time limit."""
    used_seconds: float | None = None
    """What it used of that: all of ``seconds``, unless it shared the batch with other problems."""
    bank_seconds: float | None = None
    """What was in the time bank when it was settled; None without a time limit."""
    cancelled: int = 0
    """Samples that were not counted: never begun, not run to their end, or ended when all was decided."""
    fallback: Answer | None = None
    """What is answered when no sample gave an answer."""

    @property
    def answer(self) -> Answer | None:
        """The winning answer, else the fallback."""
        return self.tally.leader.answer if self.tally.leader else self.fallback

    @property
    def defaulted(self) -> bool:
        """The answer is the fallback."""
        return self.tally.leader is None and self.fallback is not None


def count_attempts(attempts: Iterable[Attempt], mode: AnswerMode, same: Same, tally: Tally | None = None) -> Tally:
    """``tally`` (empty by default) with ``attempts`` added in the order given."""
    tally = tally or Tally()
    for attempt in attempts:
        tally = tally.add(
            attempt.answer(mode),
            tokens=attempt.tokens,
            index=attempt.index,
            same=same,
            confidence=attempt.confidence,
        )
    return tally
