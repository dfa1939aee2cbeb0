"""What another stop rule would have answered, when, and at what cost: saved samples arrive again, one rule at a time.

The model of time is simple and stated. By ``length``, all rows of the batch emit one token per step, so a sample ends
after as many steps as it has tokens, and the wall is counted in steps. A batch smaller than the number of samples lets
the next one in when a row ends. By ``recorded``, samples end at their recorded second and emit at an even pace until
then. Tokens that a cancelled sample had emitted up to the stop are spent.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from trtkit.errors import UsageError
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.probe_options import ProbeOptions, read_probe
from trtkit.solve.stopping import UNASSAILABLE, StopRule, first_to_hold, parse_rules
from trtkit.solve.traces import Trace
from trtkit.solve.vote import Same, Tally, Weighting

__all__ = ["FULL", "Arrival", "FinishOrder", "Policy", "Replayed", "arrivals", "one_spelling", "parse_policy", "replay"]

FinishOrder: TypeAlias = Literal["length", "recorded"]

_PROBE = re.compile(r"probe\(([^()]*)\)")
FULL = "full"
"""The policy without any rule: every sample runs to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Stop rules that work together, under one name."""

    text: str
    rules: tuple[StopRule, ...]
    probe: ProbeOptions | None = None
    """Samples are asked on their way, and end when they have settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A sample on the time axis: steps or seconds since the problem was submitted."""

    trace: Trace
    answer: Answer | None
    began: float
    ended: float

    def emitted(self, until: float) -> float:
        """Tokens that it has emitted at the time ``until``."""
        if until >= self.ended:
            return self.trace.tokens
        return self.trace.tokens * max(0.0, until - self.began) / (self.ended - self.began)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """How a problem would have ended."""

    tally: Tally
    tokens: float
    """Spent, those of cancelled samples included."""
    wall: float
    """Steps (by length) or seconds (by recorded time) until the stop."""
    stopped_early: str | None
    """The rule that ended it while samples were outstanding."""


def parse_policy(text: str) -> Policy:
    """``full``, or rules joined by ``+``; as in ``trtkit solve``, ``unassailable`` then goes along. To either
    ``probe(EVERY,TIMES)`` may be joined.

    Raises :class:`UsageError`.
    """
    parts = [part.strip() for part in text.split("+")]
    probes = [read_probe(found[1]) for part in parts if (found := _PROBE.fullmatch(part))]
    others = "+".join(part for part in parts if not _PROBE.fullmatch(part))
    if len(probes) > 1:
        raise UsageError(f"rule {text!r} asks its samples twice", hint="one probe(EVERY,TIMES)")
    rules: tuple[StopRule, ...] = ()
    if others == FULL:
        name = FULL
    else:
        chosen = parse_rules([others or UNASSAILABLE.text])
        name = "+".join(rule.text for rule in chosen)
        rules = tuple({rule.text: rule for rule in (*chosen, UNASSAILABLE)}.values())
    asking = "".join(f"+probe({probe})" for probe in probes)
    return Policy(text=name + asking, rules=rules, probe=probes[0] if probes else None)


def one_spelling(traces: Sequence[Trace], mode: AnswerMode, same: Same) -> dict[int, Answer | None]:
    """What each trace (by index) votes for, equal answers in one spelling: afterwards equal keys mean equal answers."""
    tally = Tally()
    answers: dict[int, Answer | None] = {}
    places: dict[int, int] = {}
    for trace in traces:
        answer = read_answer(trace.box, mode)
        tally = tally.add(answer, tokens=trace.tokens, index=trace.index, same=same)
        answers[trace.index] = answer
        if answer is not None:
            places[trace.index] = tally.order[-1]
    for index, place in places.items():
        answers[index] = tally.votes[place].answer
    return answers


def arrivals(
    traces: Sequence[Trace], answers: dict[int, Answer | None], order: FinishOrder, batch: int | None = None
) -> tuple[Arrival, ...]:
    """Put the traces on the time axis, submitted in the order given. By ``recorded``, each must have its seconds."""
    if order == "recorded":
        ends = [(0.0, trace.seconds or 0.0) for trace in traces]
    else:
        ends = []
        free = [0.0] * min(batch or len(traces), len(traces))  # when each row of the batch becomes free
        for trace in traces:
            began = heapq.heappop(free)
            ends.append((began, began + trace.tokens))
            heapq.heappush(free, began + trace.tokens)
    return tuple(
        Arrival(trace=trace, answer=answers[trace.index], began=began, ended=ended)
        for trace, (began, ended) in zip(traces, ends, strict=True)
    )


def replay(
    samples: Sequence[Arrival], policies: Sequence[Policy], weighting: Weighting | None = None
) -> tuple[Replayed, ...]:
    """The outcome under each policy. Samples that end at the same moment are counted together, as in the solver."""
    open_policies = dict(enumerate(policies))
    outcomes: dict[int, Replayed] = {}
    tally = Tally(weighting=weighting or Weighting())
    ordered = sorted(samples, key=lambda sample: (sample.ended, sample.trace.index))
    groups = [(ended, list(group)) for ended, group in itertools.groupby(ordered, key=lambda sample: sample.ended)]
    for now, arriving in [(0.0, []), *groups]:
        for sample in arriving:
            trace = sample.trace
            tally = tally.add(
                sample.answer, tokens=trace.tokens, index=trace.index, same=_never, confidence=trace.confidence
            )
        outstanding = len(samples) - tally.finished
        for number, policy in list(open_policies.items()):
            rule = first_to_hold(policy.rules, tally, outstanding) if outstanding else None
            if rule is None and outstanding:
                continue
            outcomes[number] = Replayed(
                tally=tally,
                tokens=sum(sample.emitted(now) for sample in samples),
                wall=now,
                stopped_early=rule.text if rule else None,
            )
            del open_policies[number]
        if not open_policies:
            break
    return tuple(outcomes[number] for number in range(len(policies)))


def _never(one: Answer, other: Answer) -> bool:
    """Equal answers were given one spelling beforehand."""
    return False
