"""``Run`` -> ``Figures``: what the run says, with the uncertainty of each figure where it has one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtkit.report.records import Result, Run
from trtkit.solve.engine_figures import EngineFigures

__all__ = ["Estimate", "Figures", "figures_of", "majority_curve", "speed_over_time", "standard_error"]

_ENUMERATED = 12
"""Up to this many samples every subset is counted; above, subsets are drawn."""
_DRAWS = 2000
_BINS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems."""

    value: float
    error: float | None
    """Standard error over problems; None for fewer than two."""
    count: int
    """Problems behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A run in figures. Rates of samples are over finished samples of settled problems, 0..1; None without any."""

    problems: int
    settled: int
    answered: int
    """By a vote."""
    defaulted: int
    """With the configured default answer."""
    graded: int
    """Settled problems with a known answer."""
    correct: int
    accuracy: Estimate | None
    pass_at_1: Estimate | None
    majority: tuple[Estimate, ...]
    """maj@k for k = 1, 2, ...; empty without known answers."""
    samples: int
    """Finished."""
    blank_rate: float | None
    truncated_rate: float | None
    forced_rate: float | None
    looped_rate: float | None
    cancelled: int
    stopped_early: int
    tokens: int
    cancelled_tokens: int
    tokens_median: float | None
    tokens_p90: float | None
    seconds: float
    tokens_per_second: float | None
    tokens_per_step: float | None
    accepted_by_depth: tuple[float, ...]
    """Share of the row-steps that drafted in which at least 1, 2, ... drafted tokens were accepted."""
    phase_seconds: tuple[tuple[str, float], ...]
    speed: tuple[tuple[float, float], ...]
    """(second of the run, tokens per second)."""
    bank: tuple[tuple[float, float], ...]
    """(second of the run, seconds in the time bank)."""


def figures_of(run: Run, advance: Callable[[], None] = lambda: None) -> Figures:
    """All figures of a run. ``advance`` is called for each problem with a known answer: its majority curve is what
    takes time."""
    settled = run.settled
    graded = [result for result in settled if result.correct is not None]
    samples = [sample for result in settled for sample in result.samples]
    lengths = [sample.tokens for sample in samples]
    tokens = sum(result.tokens for result in run.results)
    engine = run.engine or EngineFigures(tokens_per_step=None)
    return Figures(
        problems=len(run.results),
        settled=len(settled),
        answered=sum(result.answer is not None and not result.defaulted for result in settled),
        defaulted=sum(result.defaulted for result in settled),
        graded=len(graded),
        correct=sum(bool(result.correct) for result in graded),
        accuracy=_estimate([float(bool(result.correct)) for result in graded]),
        pass_at_1=_estimate([_share_right(result) for result in graded]),
        majority=majority_curve(graded, advance),
        samples=len(samples),
        blank_rate=_rate([sample.vote is None for sample in samples]),
        truncated_rate=_rate([sample.truncated for sample in samples]),
        forced_rate=_rate([sample.forced for sample in samples]),
        looped_rate=_rate([sample.looped for sample in samples]),
        cancelled=sum(result.cancelled for result in settled),
        stopped_early=sum(result.stopped_early is not None for result in settled),
        tokens=tokens,
        cancelled_tokens=tokens - sum(sample.tokens for result in run.results for sample in result.samples),
        tokens_median=float(np.median(lengths)) if lengths else None,
        tokens_p90=float(np.quantile(lengths, 0.9)) if lengths else None,
        seconds=run.seconds,
        tokens_per_second=tokens / run.seconds if run.seconds > 0 else None,
        tokens_per_step=engine.tokens_per_step,
        accepted_by_depth=engine.accepted_by_depth,
        phase_seconds=tuple(engine.phase_seconds.items()),
        speed=speed_over_time(run),
        bank=run.bank,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1) over the square root of n; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values), ddof=1)) / math.sqrt(len(values))


def majority_curve(results: Sequence[Result], advance: Callable[[], None] = lambda: None) -> tuple[Estimate, ...]:
    """maj@k for k = 1 .. N: how often the plain majority of k of the finished samples, drawn without replacement, is
    right.

    N is the most finished samples of any problem; a problem with fewer than k counts with all it has. Ties go to the
    answer whose earliest sample has the fewest tokens, as in the vote itself; samples without an answer take a place
    and give no vote. Every subset is counted up to 12 samples; above, 2,000 seeded draws, so each point's own error
    is below 0.012 per problem and averages out over problems.
    """
    curves = []
    for result in results:
        curves.append(_problem_curve(result))
        advance()
    width = max((len(curve) for curve in curves), default=0)
    estimates = []
    for k in range(width):
        estimate = _estimate([float(curve[min(k, len(curve) - 1)]) for curve in curves])
        assert estimate is not None
        estimates.append(estimate)
    return tuple(estimates)


def _problem_curve(result: Result) -> NDArray[np.float64]:
    """P(the majority of k samples is right) for k = 1 .. n; a problem without a sample is wrong."""
    ordered = sorted(result.samples, key=lambda sample: (sample.tokens, sample.index))
    count, answers = len(ordered), len(result.votes)
    if not count:
        return np.zeros(1)
    # Samples and subsets without any answer vote for one more "answer", which is wrong and never outweighs another.
    votes = np.array([answers if sample.vote is None else sample.vote for sample in ordered])
    right = np.array([*(bool(vote.correct) for vote in result.votes), False])
    if count <= _ENUMERATED:
        chosen = (np.arange(1, 1 << count)[:, None] >> np.arange(count) & 1).astype(bool)  # subsets, samples
        correct = right[_winners(chosen, votes, answers)]
        sizes = chosen.sum(axis=1)
        return np.array([correct[sizes == k].mean() for k in range(1, count + 1)])
    curve = _drawn_curve(votes, right)
    curve[0] = right[votes].mean()
    return curve


def _winners(chosen: NDArray[np.bool_], votes: NDArray[np.intp], answers: int) -> NDArray[np.intp]:
    """The winning answer of each row of ``chosen`` (subsets, samples from short to long)."""
    subsets, count = chosen.shape
    heads = np.zeros((subsets, answers + 1), dtype=np.intp)
    earliest = np.full((subsets, answers + 1), count, dtype=np.intp)
    for answer in range(answers):
        places = np.flatnonzero(votes == answer)
        mine = chosen[:, places]
        heads[:, answer] = mine.sum(axis=1)
        earliest[:, answer] = np.where(mine, places, count).min(axis=1)
    return _leaders(heads, earliest, count)


def _drawn_curve(votes: NDArray[np.intp], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The first k of a random permutation are a random subset of k: one set of draws serves every k."""
    count, answers = len(votes), len(right) - 1
    drawn = np.argsort(np.random.default_rng(0).random((_DRAWS, count)), axis=1)
    heads = np.zeros((_DRAWS, answers + 1), dtype=np.intp)
    earliest = np.full((_DRAWS, answers + 1), count, dtype=np.intp)
    rows, curve = np.arange(_DRAWS), np.zeros(count)
    for k in range(count):
        sample = drawn[:, k]
        answer = votes[sample]
        heads[rows, answer] += 1
        earliest[rows, answer] = np.minimum(earliest[rows, answer], sample)
        curve[k] = right[_leaders(heads, earliest, count)].mean()
    return curve


def _leaders(heads: NDArray[np.intp], earliest: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Most heads, then the earliest; the last column, no answer, only where there is nothing else."""
    score = np.where(heads > 0, heads * (count + 1) + count - earliest, -1)
    score[:, -1] = 0
    return np.asarray(score.argmax(axis=1), dtype=np.intp)


def speed_over_time(run: Run) -> tuple[tuple[float, float], ...]:
    """Tokens per second in equal slices of the run, at the middle of each slice.

    The journal knows when a sample ended and when its problem was submitted; its tokens are spread evenly over that
    time, and the tokens of cancelled samples over the time of their problem.
    """
    spans: list[tuple[float, float, float]] = []
    for result in run.results:
        spans += [(sample.ended - sample.seconds, sample.ended, sample.tokens) for sample in result.samples]
        rest = result.tokens - sum(sample.tokens for sample in result.samples)
        if rest > 0 and result.ended is not None:
            spans.append((result.ended - (result.seconds or 0.0), result.ended, rest))
    if not spans or run.seconds <= 0:
        return ()
    starts, ends, tokens = np.array(spans).T
    starts = np.clip(starts, 0.0, None)
    lengths = np.maximum(ends - starts, 1e-9)
    edges = np.linspace(0.0, run.seconds, max(4, min(_BINS, len(spans) // 4)) + 1)
    done = (np.clip((edges[:, None] - starts) / lengths, 0.0, 1.0) * tokens).sum(axis=1)
    middles = (edges[1:] + edges[:-1]) / 2
    speeds = np.diff(done) / np.diff(edges)
    return tuple((float(second), float(speed)) for second, speed in zip(middles, speeds, strict=True))


def _share_right(result: Result) -> float:
    return sum(bool(sample.correct) for sample in result.samples) / max(len(result.samples), 1)


def _estimate(values: Sequence[float]) -> Estimate | None:
    if not values:
        return None
    return Estimate(value=sum(values) / len(values), error=standard_error(values), count=len(values))


def _rate(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
