"""Accuracy, tokens and wall of stop rules on saved samples, with intervals from a bootstrap.

Of each problem's samples, random subsets in random order are replayed (:mod:`trtkit.solve.replay`). A bootstrap
replicate draws as many problems as there are, with replacement, and for each one of its replays; so the interval says
where a run with that many problems of this kind would fall. All policies replay the same subsets, so differences
between them are paired.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trtkit.errors import InputError, UsageError
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.grading import Grader
from trtkit.solve.probe_replay import asked
from trtkit.solve.replay import FULL, FinishOrder, Policy, Replayed, arrivals, one_spelling, parse_policy, replay
from trtkit.solve.traces import Trace, TracedProblem, Traces
from trtkit.solve.vote import Weighting

__all__ = ["Interval", "ReplayOptions", "Saved", "Tradeoff", "sample_counts", "saved_order", "trade_offs"]

_REPLICATES = 2000
_CONFIDENCE = 0.95
_ACCURACY, _TOKENS, _WALL = 0, 1, 2

Figures = NDArray[np.float64]
"""(3, problems, draws): right or not, tokens, wall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How traces are replayed. Raises :class:`UsageError`."""

    samples: tuple[int, ...]
    """Samples per problem, one or several numbers of them."""
    order: FinishOrder = "length"
    batch: int | None = None
    """By length: rows in flight; None for all samples of a problem at once."""
    mode: AnswerMode = field(default_factory=AnswerMode)
    weighting: Weighting = field(default_factory=Weighting)
    draws: int = 20
    """Random subsets per problem; the first is the saved order."""
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f"samples {count}: must be at least 1" for count in self.samples if count < 1]
        if self.order not in ("length", "recorded"):
            wrong.append(f"finish order {self.order!r}: must be length or recorded")
        if self.batch is not None and self.order == "recorded":
            wrong.append("batch: the recorded times already know how full the batch was")
        if self.batch is not None and self.batch < 1:
            wrong.append(f"batch {self.batch}: must be at least 1")
        if self.draws < 1:
            wrong.append(f"draws {self.draws}: must be at least 1")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """One policy at one number of samples. Tokens and wall are totals over the problems, one after the other."""

    rule: str
    samples: int
    problems: int
    """Those that have enough samples."""
    accuracy: Interval | None
    """None without gold answers."""
    tokens: Interval
    wall: Interval
    accuracy_change: Interval | None
    """Against the full vote of as many samples."""
    tokens_saved: Interval
    """Share of the full vote's tokens."""
    wall_saved: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One problem under one policy, in the saved order."""

    problem: str
    gold: str | None
    rule: str
    samples: int
    correct: bool | None
    outcome: Replayed


def sample_counts(traces: Traces) -> tuple[int, ...]:
    """The numbers of samples to try when none is given: powers of two from 4 up that most problems can fill, or what
    they have."""
    counts = sorted(len(problem.traces) for problem in traces.problems)
    most = counts[(len(counts) - 1) // 2]  # more than half have as many
    powers = tuple(2**power for power in range(2, most.bit_length()) if 2**power <= most)
    return powers or (most,)


def trade_offs(
    traces: Traces,
    policies: Sequence[Policy],
    options: ReplayOptions,
    grader: Grader,
    advance: Callable[[], None] = lambda: None,
) -> list[Tradeoff]:
    """Every policy at every number of samples; ``advance`` is called once per problem and number.

    Raises :class:`InputError` when no problem has enough samples, or recorded times or confidences are missing.
    """
    if options.weighting.by == "confidence":
        _refuse_unweighed(traces)
    together = _with_full(policies)
    rows = []
    # A number that no problem can fill must not surface after the replay of the others.
    for count, enough in [(count, _filled(traces, count, options)) for count in options.samples]:
        figures = np.zeros((len(together), 3, len(enough), options.draws))
        graded = np.zeros(len(enough), dtype=bool)
        for place, problem in enumerate(enough):
            cases = _cases(problem, together, options, grader)
            graded[place] = cases[0].right is not None
            for draw in range(options.draws):
                for case in cases:
                    for number, outcome in case.replayed(options, count, draw):
                        won = _voted_right(outcome, case.right)
                        figures[number, :, place, draw] = (won, outcome.tokens, outcome.wall)
            advance()
        rows += _estimates(policies, together, figures, graded, count, options.seed)
    return rows


def saved_order(traces: Traces, policies: Sequence[Policy], options: ReplayOptions, grader: Grader) -> list[Saved]:
    """What each policy would have answered with the samples as they were saved: the first of each problem."""
    rows = []
    for count in options.samples:
        for problem in _filled(traces, count, options):
            cases = _cases(problem, policies, options, grader)
            found = [
                (number, case.right, outcome)
                for case in cases
                for number, outcome in case.replayed(options, count, draw=0)
            ]
            for number, right, outcome in sorted(found, key=lambda each: each[0]):
                correct = None if right is None else bool(_voted_right(outcome, right))
                rows.append(
                    Saved(
                        problem=problem.id,
                        gold=problem.gold,
                        rule=policies[number].text,
                        samples=count,
                        correct=correct,
                        outcome=outcome,
                    )
                )
    return rows


def _with_full(policies: Sequence[Policy]) -> list[Policy]:
    """The policies and, last, the full vote that they are held against."""
    return [*policies, parse_policy(FULL)]


def _filled(traces: Traces, count: int, options: ReplayOptions) -> list[TracedProblem]:
    enough = [problem for problem in traces.problems if len(problem.traces) >= count]
    if not enough:
        most = max((len(problem.traces) for problem in traces.problems), default=0)
        raise InputError(f"no problem has {count} samples", hint=f"the most that any has is {most}; choose --samples")
    if options.order == "recorded":
        missing = [p.id[:60] for p in enough if any(trace.seconds is None for trace in p.traces)]
        if missing:
            raise InputError(
                f"{len(missing)} problem(s) with samples whose seconds were not recorded",
                offenders=missing[:5],
                hint="use --finish-order length, or name the column: --fields seconds=...",
            )
    return enough


def _refuse_unweighed(traces: Traces) -> None:
    """An answer without its confidence would weigh 1, more than all others."""
    boxed = [trace for problem in traces.problems for trace in problem.traces if trace.box is not None]
    missing = sum(trace.confidence is None for trace in boxed)
    if missing:
        raise InputError(
            f"{missing} of {len(boxed)} answers were saved without their log-probability, by which votes would weigh",
            hint="make the run with --save-confidence, or leave out --weights confidence",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A problem's samples as they end under some of the policies: all of those that ask them alike on their way."""

    problem: str
    traces: tuple[Trace, ...]
    answers: dict[int, Answer | None]
    right: dict[str, bool] | None
    policies: tuple[tuple[int, Policy], ...]
    """With their numbers."""

    def replayed(self, options: ReplayOptions, count: int, draw: int) -> list[tuple[int, Replayed]]:
        """Draw 0 is the saved order; the others are random subsets, the same for every policy."""
        chosen = list(self.traces)
        if draw:
            random.Random(f"{options.seed}/{draw}/{count}/{self.problem}").shuffle(chosen)
        samples = arrivals(chosen[:count], self.answers, options.order, options.batch)
        outcomes = replay(samples, [policy for _, policy in self.policies], options.weighting)
        return [(number, outcome) for (number, _), outcome in zip(self.policies, outcomes, strict=True)]


def _cases(problem: TracedProblem, policies: Sequence[Policy], options: ReplayOptions, grader: Grader) -> list[_Case]:
    cases = []
    for probe in dict.fromkeys(policy.probe for policy in policies):
        mode, same = options.mode, grader.same
        traces = problem.traces if probe is None else tuple(asked(each, probe, mode, same) for each in problem.traces)
        answers = one_spelling(traces, mode, same)
        right = _right(problem, answers, mode, grader)
        sharing = tuple((number, policy) for number, policy in enumerate(policies) if policy.probe == probe)
        cases.append(_Case(problem=problem.id, traces=traces, answers=answers, right=right, policies=sharing))
    return cases


def _right(
    problem: TracedProblem, answers: dict[int, Answer | None], mode: AnswerMode, grader: Grader
) -> dict[str, bool] | None:
    """For the key of each answer: is it right? None without a usable gold answer."""
    gold = read_answer(problem.gold, mode)
    if gold is None:
        return None
    return {answer.key: grader.equal(gold, answer) for answer in answers.values() if answer is not None}


def _voted_right(outcome: Replayed, right: dict[str, bool] | None) -> float:
    leader = outcome.tally.leader
    return float(leader is not None and right is not None and right[leader.answer.key])


def _estimates(
    policies: Sequence[Policy],
    together: Sequence[Policy],
    figures: NDArray[np.float64],
    graded: NDArray[np.bool_],
    count: int,
    seed: int,
) -> list[Tradeoff]:
    _, _, problems, draws = figures.shape
    rng = np.random.default_rng(seed)
    place = rng.integers(problems, size=(_REPLICATES, problems))
    draw = rng.integers(draws, size=(_REPLICATES, problems))
    known = np.flatnonzero(graded)
    place_known = known[rng.integers(len(known), size=(_REPLICATES, len(known)))] if len(known) else None

    def spread(kind: int, number: int) -> tuple[float, NDArray[np.float64]]:
        """The total (for accuracy: the mean) and its replicates."""
        table = figures[number, kind]
        if kind == _ACCURACY and place_known is not None:
            return float(table[known].mean()), table[place_known, draw[:, : len(known)]].mean(axis=1)
        return float(table.mean(axis=1).sum()), table[place, draw].sum(axis=1)

    full = len(together) - 1
    full_tokens, full_wall = spread(_TOKENS, full), spread(_WALL, full)
    full_accuracy = spread(_ACCURACY, full)
    rows = []
    for number, policy in enumerate(policies):
        accuracy, tokens, wall = spread(_ACCURACY, number), spread(_TOKENS, number), spread(_WALL, number)
        change = (accuracy[0] - full_accuracy[0], accuracy[1] - full_accuracy[1])
        rows.append(
            Tradeoff(
                rule=policy.text,
                samples=count,
                problems=problems,
                accuracy=_interval(*accuracy) if len(known) else None,
                tokens=_interval(*tokens),
                wall=_interval(*wall),
                accuracy_change=_interval(*change) if len(known) else None,
                tokens_saved=_interval(1 - tokens[0] / full_tokens[0], 1 - tokens[1] / full_tokens[1]),
                wall_saved=_interval(1 - wall[0] / full_wall[0], 1 - wall[1] / full_wall[1]),
            )
        )
    return rows


def _interval(value: float, replicates: NDArray[np.float64]) -> Interval:
    edge = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(replicates, [edge, 1 - edge])
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))
