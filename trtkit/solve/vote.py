"""``Tally``: the votes of one problem, immutable, so that every rule about them is a pure function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trtkit.solve.answers import Answer

__all__ = ["Same", "Tally", "Vote"]

Same = Callable[[Answer, Answer], bool]
"""Whether two answers with different keys are equal after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One answer and who gave it."""

    answer: Answer
    """As the earliest of its samples wrote it."""
    count: int
    earliest: tuple[int, int]
    """(tokens, index) of the sample that needed the fewest tokens: the earliest to finish in one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What the finished samples of one problem said so far."""

    votes: tuple[Vote, ...] = ()
    """One per distinct answer, in order of first appearance."""
    order: tuple[int, ...] = ()
    """For each answer in order of arrival: its place in ``votes``."""
    blank: int = 0
    """Samples that finished without an answer."""

    def add(self, answer: Answer | None, *, tokens: int, index: int, same: Same) -> Tally:
        """The tally with one more finished sample: ``index`` of the problem, after ``tokens`` tokens.

        ``same`` is asked only about answers that are spelled differently. An answer that equals several
        votes joins the first of them.
        """
        if answer is None:
            return replace(self, blank=self.blank + 1)
        place = self._place(answer, same)
        earliest = (tokens, index)
        votes = list(self.votes)
        if place == len(votes):
            votes.append(Vote(answer=answer, count=1, earliest=earliest))
        else:
            vote = votes[place]
            if earliest < vote.earliest:  # so that the spelling shown does not depend on the arrival
                vote = replace(vote, answer=answer, earliest=earliest)
            votes[place] = replace(vote, count=vote.count + 1)
        return replace(self, votes=tuple(votes), order=(*self.order, place))

    def _place(self, answer: Answer, same: Same) -> int:
        for place, vote in enumerate(self.votes):
            if vote.answer.key == answer.key:
                return place
        for place, vote in enumerate(self.votes):
            if same(vote.answer, answer):
                return place
        return len(self.votes)

    @property
    def finished(self) -> int:
        """Samples counted, with or without an answer."""
        return len(self.order) + self.blank

    @property
    def ranked(self) -> tuple[Vote, ...]:
        """Votes from first to last: by count, then earliest finished.

        Earliest is measured in the sample's own tokens, not by the clock: then the outcome depends neither
        on the machine nor on an interruption.
        """
        return tuple(sorted(self.votes, key=lambda vote: (-vote.count, vote.earliest)))

    @property
    def leader(self) -> Vote | None:
        """The majority answer; None without any answer."""
        ranked = self.ranked
        return ranked[0] if ranked else None

    @property
    def lead(self) -> int:
        """Votes that the leader has more than the runner-up."""
        counts = sorted((vote.count for vote in self.votes), reverse=True)
        return counts[0] - (counts[1] if len(counts) > 1 else 0) if counts else 0

    @property
    def tied(self) -> bool:
        """True when the leader won only by having finished earlier."""
        return bool(self.votes) and self.lead == 0
