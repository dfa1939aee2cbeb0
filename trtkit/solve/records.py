"""What a run produces: ``Attempt`` and ``Solution``, and counting the one into the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.vote import Same, Tally

__all__ = ["Attempt", "Solution", "count_attempts"]


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

    def answer(self, mode: AnswerMode) -> Answer | None:
        """What it votes for."""
        return read_answer(self.box, mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The outcome for one problem."""

    problem_id: str
    tally: Tally
    attempts: tuple[Attempt, ...]
    """Finished samples in order of arrival; cancelled ones are not among them."""
    tokens: int
    """All tokens generated for it, those of cancelled samples included."""
    seconds: float
    stopped_early: str | None = None
    """The stop rule that ended it while samples were outstanding."""
    error: str | None = None
    """Why the engine refused it."""

    @property
    def answer(self) -> Answer | None:
        """The majority answer."""
        return self.tally.leader.answer if self.tally.leader else None


def count_attempts(attempts: Iterable[Attempt], mode: AnswerMode, same: Same, tally: Tally | None = None) -> Tally:
    """``tally`` (empty by default) with ``attempts`` added in the order given."""
    tally = tally or Tally()
    for attempt in attempts:
        answer = attempt.answer(mode)
        tally = tally.add(answer, tokens=attempt.tokens, index=attempt.index, same=same)
    return tally
