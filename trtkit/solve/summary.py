"""From solutions to figures: ``Verdict`` per problem, ``Summary`` per run, and their machine forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit.solve.answers import AnswerMode, read_answer
from trtkit.solve.grading import Grader
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution

__all__ = ["Summary", "Verdict", "judge", "solution_row", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A solution held against the gold answer; both figures are None where the problem has none."""

    problem: Problem
    solution: Solution
    correct: bool | None
    attempts_correct: int | None


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
    """Accuracy of the plain majority of k = ``samples``; equals ``accuracy`` while votes are not weighted."""
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

    def document(self) -> dict[str, Any]:
        """The stable JSON document of ``trtkit solve --json``."""
        rounded = {"accuracy": 6, "pass_at_1": 6, "maj_at_k": 6, "tokens_per_second": 2, "seconds": 3}
        data = asdict(self)
        return {name: round(v, rounded[name]) if name in rounded and v is not None else v for name, v in data.items()}


def judge(
    problems: Sequence[Problem], solutions: Sequence[Solution], mode: AnswerMode, grader: Grader
) -> list[Verdict]:
    """Hold each solution against its problem's gold answer."""
    verdicts = []
    for problem, solution in zip(problems, solutions, strict=True):
        gold = read_answer(problem.answer, mode)
        correct = attempts_correct = None
        if gold is not None:
            answers = [attempt.answer(mode) for attempt in solution.attempts]
            attempts_correct = sum(answer is not None and grader.equal(gold, answer) for answer in answers)
            correct = solution.answer is not None and grader.equal(gold, solution.answer)
        verdicts.append(Verdict(problem=problem, solution=solution, correct=correct, attempts_correct=attempts_correct))
    return verdicts


def summarise(verdicts: Sequence[Verdict], *, samples: int, seconds: float, run_dir: Path) -> Summary:
    """The figures of a run."""
    graded = [verdict for verdict in verdicts if verdict.correct is not None]
    tokens = sum(verdict.solution.tokens for verdict in verdicts)
    right = [bool(verdict.correct) for verdict in graded]
    shares = [(verdict.attempts_correct or 0) / max(len(verdict.solution.attempts), 1) for verdict in graded]
    return Summary(
        problems=len(verdicts),
        answered=sum(verdict.solution.answer is not None for verdict in verdicts),
        accuracy=_mean(right),
        pass_at_1=_mean(shares),
        maj_at_k=_mean(right),
        samples=samples,
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        seconds=seconds,
        stopped_early=sum(verdict.solution.stopped_early is not None for verdict in verdicts),
        run_dir=str(run_dir),
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
            {"answer": vote.answer.key, "as_written": vote.answer.raw, "count": vote.count}
            for vote in solution.tally.ranked
        ],
        "tied": solution.tally.tied,
        "finished": solution.tally.finished,
        "without_answer": solution.tally.blank,
        "tokens": solution.tokens,
        "seconds": round(solution.seconds, 3),
        "stopped_early": solution.stopped_early,
        "error": solution.error,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
