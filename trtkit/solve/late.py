"""A run whose time limit is over before the engine is open: opening it would only make the run later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtkit.solve.answers import Answer
from trtkit.solve.clock import TimeBudget
from trtkit.solve.contest import Contest
from trtkit.solve.journal import Journal
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import TIME_LIMIT, Solution

__all__ = ["answer_late", "out_of_time"]


def out_of_time(options: SolveOptions, spent_seconds: float) -> bool:
    """Nothing but the reserve is left of the time limit."""
    if options.time_limit is None:
        return False
    budget = TimeBudget.of(options.time_limit, 1, options.reserve)
    return spent_seconds >= budget.limit_seconds - budget.reserve_seconds


def answer_late(
    problems: Sequence[Problem],
    settled: Mapping[str, Solution],
    journal: Journal,
    options: SolveOptions,
    *,
    loading_seconds: float = 0.0,
) -> dict[str, Solution]:
    """Answers for the problems that are not ``settled``, from what earlier sessions journaled; written down as well.

    Answers that are spelled differently count as different: to ask about each pair could take minutes.
    ``loading_seconds`` is what this session spent without solving anything.
    """
    late = {}
    for problem in problems:
        if problem.id not in settled:
            contest = Contest.begin(problem, options, journal, now=0.0, lanes=None)
            for attempt in contest.turn():
                contest.count(attempt, options.mode, _unasked)
            contest.cancelled = len(contest.missing(options.samples))
            late[problem.id] = contest.solution(options, 0.0, TIME_LIMIT if contest.cancelled else None, None)
    journal.begin(loading_seconds)
    journal.record([], list(late.values()))
    return late


def _unasked(one: Answer, other: Answer) -> bool:
    return False
