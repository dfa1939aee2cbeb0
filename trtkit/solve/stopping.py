"""When a problem needs no more samples: pure functions of the tally so far and the samples still outstanding.

A rule is written as text, ``unassailable`` or ``agree(4)``, so that runs can record which rules they used; several are
joined by ``+`` and the first that holds ends the problem. To add one, write a function that takes its numbers and
returns a :class:`Holds`, and list it in ``_RULES``.

The rules see answers in the order of :mod:`trtkit.solve.counting`. Short samples come first in it, so the samples
behind a decision are no random draw of all: what ``beta`` and ``certificate`` say of their error is exact for samples
in random order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.solve.vote import Tally

__all__ = [
    "UNASSAILABLE",
    "Holds",
    "StopRule",
    "certificate_wealth",
    "first_to_hold",
    "leader_probability",
    "parse_rule",
    "parse_rules",
]

Holds = Callable[[Tally, int], bool]
"""(tally, samples outstanding) -> may the problem stop?"""

_LADDER = ((4, 4), (5, 7), (6, 9))
"""(equal answers, among at most this many answers so far)."""
_LADDER_RECENT = (4, 5)
"""(equal answers, among this many latest ones)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """A named rule. ``text`` parses back to the same rule."""

    text: str
    holds: Holds


def _unassailable() -> Holds:
    """The leader cannot be caught up even if every outstanding sample agrees on the runner-up.

    Drawing level is not ruled out but counts as catching up: the tie rule might then prefer the other one.
    So the winner is the one that the full vote would have had. Where further samples change the weights of those that
    are in (weights by finish order or length), it never holds.
    """

    def holds(tally: Tally, outstanding: int) -> bool:
        largest = tally.weighting.largest
        return largest is not None and tally.lead > outstanding * largest

    return holds


def _agree(count: int) -> Holds:
    """The first ``count`` answers to arrive are all equal. Samples without an answer do not count."""

    def holds(tally: Tally, outstanding: int) -> bool:
        first = tally.order[:count]
        return len(first) == count and len(set(first)) == 1

    return holds


def _answers(count: int) -> Holds:
    """``count`` answers are in."""
    return lambda tally, outstanding: len(tally.ballots) >= count


def _beta(probability: float) -> Holds:
    """Adaptive consistency (arXiv 2305.11860): the leader is probably ahead of the runner-up."""

    def holds(tally: Tally, outstanding: int) -> bool:
        first, second = tally.counts
        return first > 0 and leader_probability(first, second) >= probability

    return holds


def _ladder() -> Holds:
    """The second-placed team of AIMO-2 (imagination-research/aimo2): 4 equal answers of the first 4 or of the latest 5,
    5 of at most 7, 6 of at most 9.

    Unlike theirs, "latest" is by arrival, and the repeated answer must be the most frequent one, so that no problem
    stops for one answer and is answered with another.
    """

    def holds(tally: Tally, outstanding: int) -> bool:
        most, second = tally.counts
        if any(most >= equal and len(tally.ballots) <= among for equal, among in _LADDER):
            return True
        equal, among = _LADDER_RECENT
        recent = tally.order[-among:]
        leading = next((place for place, vote in enumerate(tally.votes) if vote.count == most), None)
        return leading is not None and most > second and recent.count(leading) >= equal

    return holds


def _certificate(error: float) -> Holds:
    """An anytime-valid certificate that the leader is the answer the model gives most often.

    For every other answer B, seen or not, a gambler bets each new answer against B on whoever led before it. While B is
    at least as likely as any answer, the expected wealth never grows (:func:`certificate_wealth`), so by Ville's
    inequality it ever reaches 1/error with probability at most ``error``, however often one looks. The rule holds when
    the wealth against every B has reached it: certifying an answer that is not (one of) the most likely needs a most
    likely one to have been rejected, so that happens with probability at most ``error``, and no correction for the
    number of answers is due. An e-process like the martingale majority certificates of arXiv 2510.17472; the mixture
    over the size of the bet is uniform.
    """

    def holds(tally: Tally, outstanding: int) -> bool:
        if not tally.votes:
            return False
        counts = [0] * len(tally.votes)
        for_leader, against = [0] * (len(counts) + 1), [0] * (len(counts) + 1)
        leading: int | None = None
        for place in tally.order:
            if leading is not None:
                for rival in range(len(counts) + 1):  # the last stands for every answer not seen
                    if rival != leading:
                        for_leader[rival] += place == leading
                        against[rival] += place == rival
            counts[place] += 1
            if leading is None or counts[place] > counts[leading]:
                leading = place
        return all(
            certificate_wealth(won, lost) >= 1 / error
            for rival, (won, lost) in enumerate(zip(for_leader, against, strict=True))
            if rival != leading
        )

    return holds


def _stragglers(count: int) -> Holds:
    """Only ``count`` samples are still outstanding and there is an answer: do not wait for them."""
    return lambda tally, outstanding: outstanding <= count and bool(tally.votes)


def leader_probability(first: int, second: int) -> float:
    """P(theta > 1/2) for theta ~ Beta(first + 1, second + 1): the posterior probability, from a flat prior, that the
    answer with ``first`` votes is more likely than the one with ``second``.

    Exact, as a binomial tail: P = sum over j <= first of C(n, j) / 2^n with n = first + second + 1.
    """
    return _tail(first, second) / (1 << (first + second + 1))


def certificate_wealth(won: int, lost: int) -> float:
    """What 1 has become after ``won`` bets won and ``lost`` lost, averaged over all fractions of the wealth that may be
    staked: the integral over s from 0 to 1 of (1+s)^won (1-s)^lost.

    Its expectation never grows while losing is at least as likely as winning. Exact: with n = won + lost it is
    sum over j <= won of C(n+1, j) / ((n+1) C(n, won)).
    """
    total = won + lost
    return _tail(won, lost) / ((total + 1) * math.comb(total, won))


def _tail(first: int, second: int) -> int:
    total = first + second + 1
    return sum(math.comb(total, below) for below in range(first + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A number in the brackets of a rule."""

    sign: str
    """How messages show it."""
    whole: bool
    low: float
    high: float = math.inf
    """Whole numbers may equal the bounds, others lie between them."""

    def read(self, text: str) -> int | float | None:
        if not re.fullmatch(r"[0-9]{1,9}" if self.whole else r"[0-9]{0,9}\.?[0-9]{1,9}(e-?[0-9]{1,2})?", text):
            return None
        value = int(text) if self.whole else float(text)
        inside = value >= self.low if self.whole else self.low < value < self.high
        return value if inside else None


_COUNT = _Number(sign="N", whole=True, low=1)
_RULES: dict[str, tuple[Callable[..., Holds], tuple[_Number, ...]]] = {
    "unassailable": (_unassailable, ()),
    "agree": (_agree, (_COUNT,)),
    "answers": (_answers, (_COUNT,)),
    "beta": (_beta, (_Number(sign="P", whole=False, low=0.5, high=1),)),
    "ladder": (_ladder, ()),
    "certificate": (_certificate, (_Number(sign="ERROR", whole=False, low=0, high=1),)),
    "stragglers": (_stragglers, (_COUNT,)),
}
_RULE = re.compile(r"([A-Za-z][A-Za-z_-]*)\s*(?:\(([^()]*)\))?")


def parse_rule(text: str) -> StopRule:
    """``agree(4)`` -> the rule. Raises :class:`UsageError` naming the rules and their numbers."""
    match = _RULE.fullmatch(text.strip())
    name = match.group(1) if match else text.strip()
    if match is None or name not in _RULES:
        raise UsageError(
            f"unknown stop rule {text.strip()!r}{nearest(name, _RULES)}",
            hint=f"one of: {', '.join(_usages())}",
        )
    make, wanted = _RULES[name]
    given = [part for part in map(str.strip, (match.group(2) or "").split(",")) if part]
    numbers = [number.read(part) for number, part in zip(wanted, given, strict=False)]
    if len(given) != len(wanted) or None in numbers:
        raise UsageError(f"stop rule {text.strip()!r}: not in its form", hint=f"one of: {', '.join(_usages())}")
    canonical = name + (f"({','.join(map(str, numbers))})" if numbers else "")
    return StopRule(text=canonical, holds=make(*numbers))


def parse_rules(texts: Sequence[str]) -> tuple[StopRule, ...]:
    """Several rules; each text may itself hold several, separated by ``+``. Repetitions are dropped."""
    rules = [parse_rule(part) for text in texts for part in text.split("+")]
    return tuple({rule.text: rule for rule in rules}.values())


UNASSAILABLE = parse_rule("unassailable")
"""Always on: it never changes the outcome."""


def first_to_hold(rules: Sequence[StopRule], tally: Tally, outstanding: int) -> StopRule | None:
    """The first of ``rules`` that lets the problem stop with samples still ``outstanding``."""
    return next((rule for rule in rules if rule.holds(tally, outstanding)), None)


def _usages() -> list[str]:
    return [
        name + (f"({','.join(number.sign for number in numbers)})" if numbers else "")
        for name, (_, numbers) in _RULES.items()
    ]
