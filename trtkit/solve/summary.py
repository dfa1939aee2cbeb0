"""From solutions to figures: ``Verdict`` per problem, ``Summary`` per run, and their machine forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trtkit.solve.answers import AnswerMode, read_answer
from trtkit.solve.ends import Ending
from trtkit.solve.engine_figures import EngineFigures
from trtkit.solve.grading import Grader
from trtkit.solve.problems import Problem
from trtkit.solve.records import DEADLINE, TIME_LIMIT, Solution
from trtkit.solve.vote import Tally, Vote, Weighting

__all__ = ["Summary", "Verdict", "judge", "solution_row", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A solution held against the gold answer; both figures are None where the problem has none."""

    problem: Problem
    solution: Solution
    correct: bool | None
    attempts_correct: int | None
    majority_correct: bool | None = None
    """Whether the vote without weights is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run in figures. The rates are over problems with a gold answer; None when there are none."""

    problems: int
    answered: int
    accuracy: float | None
    """Share of problems whose voted answer is right; no answer is wrong."""
    pass_at_1: float | None
    """Mean over problems of the share of finished samples that are right.

    Samples that a stop rule cancelled are not in it. They are the slow ones, so with early stopping this
    tends to be higher than the pass@1 of a full run.
    """
    maj_at_k: float | None
    """Accuracy of the plain majority of k = ``samples``; equals ``accuracy`` when votes are not weighted."""
    samples: int
    """Asked for per problem."""
    tokens: int
    """Generated, those of cancelled samples included."""
    tokens_per_second: float
    seconds: float
    """Wall time of all sessions of the run, without loading the engine."""
    stopped_early: int
    """Problems that a stop rule ended while samples were outstanding."""
    run_dir: str
    defaulted: int = 0
    """Problems answered with the default answer, not among ``answered``."""
    answers_per_problem: float = 0.0
    """Samples with an answer that were in when the vote was taken, the mean over problems."""
    forced: int = 0
    """Finished samples that were made to answer: out of budget or time, or without an answer in their thought."""
    looped: int = 0
    """Finished samples that were ended because they went in circles."""
    settled: int = 0
    """Finished samples that, asked on their way, gave the same answer several times."""
    cancelled: int = 0
    """Samples that were not run to their end."""
    out_of_time: int = 0
    """Problems that the clock ended."""
    loading_seconds: float = 0.0
    """Spent on opening the engine, in all sessions; not in ``seconds``, but it counts against a time limit."""
    share_seconds: float | None = None
    """Mean time that a problem was given; None without a time limit."""
    time_limit: float | None = None
    engine: EngineFigures | None = None
    """What the engine counted; None when it recorded nothing."""

    def document(self) -> dict[str, Any]:
        """The stable JSON document of ``trtkit solve --json``."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        data["engine"] = self.engine.document() if self.engine else None
        return {name: round(v, _ROUNDED[name]) if name in _ROUNDED and v is not None else v for name, v in data.items()}


_ROUNDED = {
    "accuracy": 6, "pass_at_1": 6, "maj_at_k": 6, "tokens_per_second": 2, "seconds": 3, "answers_per_problem": 3,
    "share_seconds": 3, "loading_seconds": 3,
}  # fmt: skip


def judge(
    problems: Sequence[Problem], solutions: Sequence[Solution], mode: AnswerMode, grader: Grader
) -> list[Verdict]:
    """Hold each solution against its problem's gold answer."""
    verdicts = []
    for problem, solution in zip(problems, solutions, strict=True):
        gold = read_answer(problem.answer, mode)
        correct = attempts_correct = majority_correct = None
        if gold is not None:
            answers = [attempt.answer(mode) for attempt in solution.attempts]
            attempts_correct = sum(answer is not None and grader.equal(gold, answer) for answer in answers)
            correct = solution.answer is not None and grader.equal(gold, solution.answer)
            plain = replace(solution, tally=replace(solution.tally, weighting=Weighting())).answer
            majority_correct = plain is not None and grader.equal(gold, plain)
        verdicts.append(
            Verdict(
                problem=problem,
                solution=solution,
                correct=correct,
                attempts_correct=attempts_correct,
                majority_correct=majority_correct,
            )
        )
    return verdicts


def summarise(
    verdicts: Sequence[Verdict],
    *,
    samples: int,
    seconds: float,
    run_dir: Path,
    loading_seconds: float = 0.0,
    time_limit: float | None = None,
    engine: EngineFigures | None = None,
) -> Summary:
    """The figures of a run."""
    solutions = [verdict.solution for verdict in verdicts]
    attempts = [attempt for solution in solutions for attempt in solution.attempts]
    graded = [verdict for verdict in verdicts if verdict.correct is not None]
    tokens = sum(verdict.solution.tokens for verdict in verdicts)
    right = [bool(verdict.correct) for verdict in graded]
    shares = [(verdict.attempts_correct or 0) / max(len(verdict.solution.attempts), 1) for verdict in graded]
    return Summary(
        problems=len(verdicts),
        answered=sum(solution.tally.leader is not None for solution in solutions),
        accuracy=_mean(right),
        pass_at_1=_mean(shares),
        maj_at_k=_mean([bool(verdict.majority_correct) for verdict in graded]),
        samples=samples,
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        seconds=seconds,
        stopped_early=sum(verdict.solution.stopped_early is not None for verdict in verdicts),
        run_dir=str(run_dir),
        defaulted=sum(solution.defaulted for solution in solutions),
        answers_per_problem=_mean([len(solution.tally.ballots) for solution in solutions]) or 0.0,
        forced=sum(attempt.forced for attempt in attempts),
        looped=sum(attempt.ending is Ending.LOOP for attempt in attempts),
        settled=sum(attempt.ending is Ending.SETTLED for attempt in attempts),
        cancelled=sum(solution.cancelled for solution in solutions),
        out_of_time=sum(solution.stopped_early in (DEADLINE, TIME_LIMIT) for solution in solutions),
        share_seconds=_mean([solution.share_seconds for solution in solutions if solution.share_seconds is not None]),
        loading_seconds=loading_seconds,
        time_limit=time_limit,
        engine=engine,
    )


def solution_row(verdict: Verdict) -> dict[str, Any]:
    """One line of ``solutions.jsonl``."""
    solution = verdict.solution
    return {
        "id": solution.problem_id,
        "answer": solution.answer.key if solution.answer else None,
        "as_written": solution.answer.raw if solution.answer else None,
        "gold": verdict.problem.answer,
        "correct": verdict.correct,
        "votes": [
            {"answer": vote.answer.key, "as_written": vote.answer.raw, "count": vote.count, **weight}
            for vote, weight in _weighed(solution.tally)
        ],
        "tied": solution.tally.tied,
        "defaulted": solution.defaulted,
        "finished": solution.tally.finished,
        "without_answer": solution.tally.blank,
        "tokens": solution.tokens,
        "forced": sum(attempt.forced for attempt in solution.attempts),
        "looped": sum(attempt.ending is Ending.LOOP for attempt in solution.attempts),
        "settled": sum(attempt.ending is Ending.SETTLED for attempt in solution.attempts),
        "cancelled": solution.cancelled,
        "seconds": round(solution.seconds, 3),
        "share_seconds": None if solution.share_seconds is None else round(solution.share_seconds, 3),
        "used_seconds": None if solution.used_seconds is None else round(solution.used_seconds, 3),
        "stopped_early": solution.stopped_early,
        "error": solution.error,
    }


def _weighed(tally: Tally) -> list[tuple[Vote, dict[str, float]]]:
    """The votes from first to last, with their weights where votes are weighted."""
    if tally.weighting == Weighting():
        return [(vote, {}) for vote in tally.ranked]
    weights = dict(zip((vote.answer.key for vote in tally.votes), tally.weights, strict=True))
    return [(vote, {"weight": round(weights[vote.answer.key], 4)}) for vote in tally.ranked]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
