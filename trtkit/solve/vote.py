"""``Tally``: the votes of one problem, immutable, so that every rule about them is a pure function.

Each answer is one vote unless a :class:`Weighting` says otherwise. Weights decide who leads; the stop rules count
heads (``unassailable``, which promises the same winner, is the one that looks at the weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.solve.answers import Answer

__all__ = ["Ballot", "Same", "Tally", "Vote", "WeighBy", "Weighting", "parse_weighting"]

Same = Callable[[Answer, Answer], bool]
"""Whether two answers with different keys are equal after all."""

WeighBy: TypeAlias = Literal["majority", "finish", "length", "confidence"]

_DAMPED = "damped"
_GUESS_WEIGHT = 0.6
"""What a guess-like answer weighs, from the second-placed team of AIMO-2 (imagination-research/aimo2)."""
_GUESS_LARGEST, _GUESS_MULTIPLE = 20, 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """One sample's vote."""

    place: int
    """Which of the tally's votes it belongs to."""
    tokens: int
    index: int
    """Which sample of the problem it is."""
    confidence: float | None = None
    """Mean log-probability of the sample's tail, at most 0; None where the engine does not give it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One answer and who gave it."""

    answer: Answer
    """As the earliest of its samples wrote it."""
    count: int
    earliest: tuple[int, int]
    """(tokens, index) of the sample that needed the fewest tokens: the earliest to finish in one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """How much each answer weighs.

    ``majority``: 1 each. ``finish``: 1/sqrt(r) for the r-th to finish, counted in the samples' own tokens.
    ``length``: in inverse proportion to the tokens, 1 for the shortest. ``confidence``: the geometric mean probability
    of the sample's last tokens; 1 where it is unknown.
    """

    by: WeighBy = "majority"
    damp_guesses: bool = False
    """Answers that look guessed (integers up to 20 and multiples of 100) weigh 0.6 of that."""

    @property
    def text(self) -> str:
        """What :func:`parse_weighting` reads back."""
        return self.by + (f"+{_DAMPED}" if self.damp_guesses else "")

    @property
    def largest(self) -> float | None:
        """No further sample can weigh more; None where it would change the weights of the others."""
        return 1.0 if self.by in ("majority", "confidence") else None

    def weights(self, ballots: Sequence[Ballot], votes: Sequence[Vote]) -> tuple[float, ...]:
        """The weight of each of ``votes``, the same in whatever order the ballots arrived."""
        ordered = sorted(ballots, key=lambda ballot: (ballot.tokens, ballot.index))
        cast: list[list[float]] = [[] for _ in votes]
        for rank, ballot in enumerate(ordered, start=1):
            weight = 1.0
            if self.by == "finish":
                weight = 1 / math.sqrt(rank)
            elif self.by == "length":
                weight = max(ordered[0].tokens, 1) / max(ballot.tokens, 1)
            elif self.by == "confidence" and ballot.confidence is not None:
                weight = math.exp(min(ballot.confidence, 0.0))
            cast[ballot.place].append(weight)
        damped = [_GUESS_WEIGHT if self.damp_guesses and _guess_like(vote.answer) else 1.0 for vote in votes]
        return tuple(math.fsum(weights) * factor for weights, factor in zip(cast, damped, strict=True))


def parse_weighting(text: str) -> Weighting:
    """``length`` or ``length+damped`` -> the weighting. Raises :class:`UsageError`."""
    parts = [part.strip() for part in text.split("+")]
    names = [part for part in parts if part != _DAMPED] or ["majority"]
    if len(names) > 1 or names[0] not in get_args(WeighBy):
        known = get_args(WeighBy)
        raise UsageError(
            f"unknown weighting {text.strip()!r}{nearest(names[0], known)}",
            hint=f"one of: {', '.join(known)}; each also with +{_DAMPED}",
        )
    return Weighting(by=names[0], damp_guesses=_DAMPED in parts)  # type: ignore[arg-type]  # checked above


def _guess_like(answer: Answer) -> bool:
    value = answer.value
    if value is None or value.denominator != 1:
        return False
    return abs(value) <= _GUESS_LARGEST or value % _GUESS_MULTIPLE == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What the finished samples of one problem said so far."""

    votes: tuple[Vote, ...] = ()
    """One per distinct answer, in order of first appearance."""
    ballots: tuple[Ballot, ...] = ()
    """One per answer, in order of counting."""
    blank: int = 0
    """Samples that finished without an answer."""
    weighting: Weighting = field(default_factory=Weighting)

    def add(
        self, answer: Answer | None, *, tokens: int, index: int, same: Same, confidence: float | None = None
    ) -> Tally:
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
        ballot = Ballot(place=place, tokens=tokens, index=index, confidence=confidence)
        return replace(self, votes=tuple(votes), ballots=(*self.ballots, ballot))

    def _place(self, answer: Answer, same: Same) -> int:
        for place, vote in enumerate(self.votes):
            if vote.answer.key == answer.key:
                return place
        for place, vote in enumerate(self.votes):
            if same(vote.answer, answer):
                return place
        return len(self.votes)

    @property
    def order(self) -> tuple[int, ...]:
        """For each answer in order of counting: its place in ``votes``."""
        return tuple(ballot.place for ballot in self.ballots)

    @property
    def finished(self) -> int:
        """Samples counted, with or without an answer."""
        return len(self.ballots) + self.blank

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each of ``votes``; its count, unless the weighting says otherwise."""
        if self.weighting == _MAJORITY:
            return tuple(float(vote.count) for vote in self.votes)
        return self.weighting.weights(self.ballots, self.votes)

    @property
    def ranked(self) -> tuple[Vote, ...]:
        """Votes from first to last: by weight, then earliest finished.

        Earliest is measured in the sample's own tokens, not by the clock: then the outcome depends neither
        on the machine nor on an interruption.
        """
        pairs = zip(self.weights, self.votes, strict=True)
        return tuple(vote for _, vote in sorted(pairs, key=lambda pair: (-pair[0], pair[1].earliest)))

    @property
    def leader(self) -> Vote | None:
        """The winning answer; None without any answer."""
        ranked = self.ranked
        return ranked[0] if ranked else None

    @property
    def lead(self) -> float:
        """Weight (number of votes, without weights) that the leader has more than the runner-up."""
        weights = sorted(self.weights, reverse=True)
        return weights[0] - (weights[1] if len(weights) > 1 else 0) if weights else 0

    @property
    def tied(self) -> bool:
        """True when the leader won only by having finished earlier."""
        return bool(self.votes) and self.lead == 0

    @property
    def counts(self) -> tuple[int, int]:
        """Heads behind the two most frequent answers; 0 where there is none."""
        counts = sorted((vote.count for vote in self.votes), reverse=True)
        return (*counts, 0, 0)[0], (*counts, 0, 0)[1]


_MAJORITY = Weighting()
