"""Run directory -> ``Run``.

The journal is what counts: it is there while a run works, after an interruption and after its end. The problems file
gives texts, order and known answers; when it is gone or has changed, ``solutions.jsonl`` gives the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit.errors import InputError, UsageError
from trtkit.files import JsonObject
from trtkit.log import Progress
from trtkit.report.journal import AttemptRow, JournalRows, SolutionRow, read_rows
from trtkit.report.records import Result, Run, Sample, VoteCount
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.engine_figures import engine_figures
from trtkit.solve.grading import Grader
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.run_head import (
    JOURNAL_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    engine_told,
    mode_of,
    problems_file,
    read_head,
    read_solution_golds,
    read_summary,
)
from trtkit.solve.vote import Tally, Weighting, parse_weighting

__all__ = ["TOLD_SECONDS", "read_runs"]

TOLD_SECONDS = 2.0
"""Stages of a report that take longer show their progress."""

_SHOWN_LINES = 10
_SHOWN_RUNS = 5


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, each labelled by as much of its path as tells it from the others.

    Raises :class:`InputError` with everything that is no run directory, and for files that cannot be read;
    :class:`UsageError` when a run is named twice.
    """
    wrong = [f"{path}: {lack}" for path in paths if (lack := _lack(path))]
    if wrong:
        raise InputError("not a run of trtkit solve", offenders=wrong, hint=f"name directories that hold a {RUN_FILE}")
    resolved = [path.resolve() for path in paths]
    twice = sorted({str(path) for path in resolved if resolved.count(path) > 1})
    if twice:
        raise UsageError("the same run is named twice", offenders=twice)
    with Grader() as grader:
        return [_read(path, label, grader) for path, label in zip(paths, _labels(resolved), strict=True)]


def _lack(path: Path) -> str:
    if not path.is_dir():
        return "no such directory"
    if (path / RUN_FILE).is_file():
        return ""
    inside = sorted(found.parent.name for found in path.glob(f"*/{RUN_FILE}"))
    more = ", ..." if len(inside) > _SHOWN_RUNS else ""
    there = f"; runs in it: {', '.join(inside[:_SHOWN_RUNS])}{more}" if inside else ""
    return f"no {RUN_FILE} in it{there}"


def _labels(paths: Sequence[Path]) -> list[str]:
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) or depth > max(len(path.parts) for path in paths):
            return labels
        depth += 1


def _read(path: Path, label: str, grader: Grader) -> Run:
    head = read_head(path)
    arguments = _mapping(head, "arguments")
    rows = read_rows(path / JOURNAL_FILE)
    notices = _damage(rows)
    summary = read_summary(path)
    problems = _problems(path, head, notices)
    if problems is None:
        problems = _from_solutions(path, rows, notices)
    reading = _Reading(
        rows=rows,
        mode=mode_of(head) or AnswerMode(),
        asked=_whole(arguments.get("samples")),
        weighting=parse_weighting(str(arguments.get("weighting") or "majority")),
        grader=grader,
    )
    with Progress("read", total=len(problems), unit="problems", after_seconds=TOLD_SECONDS) as progress:
        results = tuple(map(reading.result, progress.track(problems)))
    problems_head = _mapping(head, "problems")
    run = Run(
        label=label,
        path=path,
        created=_text(head.get("created")),
        versions={str(name): str(version) for name, version in _mapping(head, "versions").items()},
        arguments=arguments,
        problems_path=_text(problems_head.get("path")),
        problems_digest=_text(problems_head.get("sha256")),
        engine_path=engine_told(head),
        results=results,
        seconds=rows.seconds,
        sessions=rows.sessions,
        limit_seconds=_number(arguments.get("time_limit")),
        loading_seconds=rows.loading,
        bank=tuple((row.ended, row.bank_seconds) for row in rows.solutions.values() if row.bank_seconds is not None),
        engine=engine_figures(rows.engines) if rows.engines else None,
        notices=tuple(notices),
    )
    return run if not _disagrees(run, summary) else _with_notice(run, summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What is needed to make results out of journal rows."""

    rows: JournalRows
    mode: AnswerMode
    asked: int
    weighting: Weighting
    grader: Grader

    def result(self, problem: Problem) -> Result:
        attempts = self.rows.attempts.get(problem.id, {})
        settled = self.rows.solutions.get(problem.id)
        if settled is not None and settled.counted is not None:
            attempts = {index: attempts[index] for index in settled.counted if index in attempts}
        gold = read_answer(problem.answer, self.mode)
        tally = Tally(weighting=self.weighting)
        answers: dict[int, Answer] = {}
        for attempt in attempts.values():
            answer = read_answer(attempt.box, self.mode)
            if answer is not None:
                answers[attempt.index] = answer
            tally = tally.add(
                answer,
                tokens=attempt.tokens,
                index=attempt.index,
                same=self.grader.same,
                confidence=attempt.confidence,
            )
        place = {ballot.index: ballot.place for ballot in tally.ballots}
        ranked = [tally.votes.index(vote) for vote in tally.ranked]
        leader = next((n for n in ranked if settled and tally.votes[n].answer.key == settled.answer), None)
        if leader is not None:  # what the run itself answered comes first
            ranked.sort(key=lambda n: n != leader)
        verdict = {key: self._right(gold, answer) for key, answer in answers.items()}
        samples = tuple(
            _sample(attempt, ranked.index(place[index]) if index in place else None, gold, verdict.get(index))
            for index, attempt in sorted(attempts.items())
        )
        votes = tuple(
            VoteCount(
                answer=tally.votes[n].answer.raw,
                count=tally.votes[n].count,
                correct=self._right(gold, tally.votes[n].answer),
            )
            for n in ranked
        )
        answer_text, correct = self._outcome(settled, votes, leader is not None, gold)
        return Result(
            id=problem.id,
            text=problem.text or None,
            gold=problem.answer,
            answer=answer_text,
            correct=correct,
            settled=settled is not None,
            votes=votes,
            samples=samples,
            asked=max(self.asked, len(samples)),
            tokens=settled.tokens if settled else sum(sample.tokens for sample in samples),
            seconds=settled.seconds if settled else None,
            ended=settled.ended if settled else None,
            tied=tally.tied,
            share_seconds=settled.share_seconds if settled else None,
            used_seconds=settled.used_seconds if settled else None,
            stopped_early=settled.stopped_early if settled else None,
            error=settled.error if settled else None,
            cancelled=_cancelled(settled, self.asked, len(samples)) if settled else 0,
        )

    def _right(self, gold: Answer | None, answer: Answer) -> bool | None:
        return None if gold is None else self.grader.equal(gold, answer)

    def _outcome(
        self, settled: SolutionRow | None, votes: Sequence[VoteCount], counted: bool, gold: Answer | None
    ) -> tuple[str | None, bool | None]:
        """The answer as written, and whether it is right."""
        if settled is None:
            return None, None
        if settled.answer is None:
            return None, None if gold is None else False
        if counted:
            return votes[0].answer, votes[0].correct
        # Not among the votes: a default answer, or the samples behind it stood in damaged lines.
        answer = read_answer(settled.answer, self.mode)
        return settled.answer, None if gold is None else answer is not None and self.grader.equal(gold, answer)


def _sample(attempt: AttemptRow, vote: int | None, gold: Answer | None, right: bool | None) -> Sample:
    return Sample(
        index=attempt.index,
        variant=attempt.variant,
        tokens=attempt.tokens,
        ending=attempt.ending,
        box=attempt.box,
        vote=vote,
        correct=None if gold is None else bool(right),
        seconds=attempt.seconds,
        ended=attempt.ended,
        forced=attempt.forced,
        tool_calls=attempt.tool_calls,
    )


def _cancelled(settled: SolutionRow, asked: int, finished: int) -> int:
    if settled.cancelled is not None:
        return settled.cancelled
    return 0 if settled.error else max(asked - finished, 0)  # older runs


def _problems(path: Path, head: Mapping[str, Any], notices: list[str]) -> list[Problem] | None:
    """The problems file, if it is still the one that was solved."""
    try:
        return read_problems(problems_file(path, head))
    except InputError as problem:
        notices.append(f"The problems file {problem.where}: {problem.message}. Problem texts are not shown.")
    return None


def _from_solutions(path: Path, rows: JournalRows, notices: list[str]) -> list[Problem]:
    """Ids and known answers without the problems file."""
    golds = read_solution_golds(path)
    found = {name: Problem(id=name, text="", answer=gold) for name, gold in golds.items()}
    for name in (*rows.solutions, *rows.attempts):
        found.setdefault(name, Problem(id=name, text=""))
    if not any(problem.answer is not None for problem in found.values()):
        notices.append("No known answers were found, so nothing is marked right or wrong.")
    return list(found.values())


def _damage(rows: JournalRows) -> list[str]:
    if not rows.damaged:
        return []
    shown = ", ".join(map(str, rows.damaged[:_SHOWN_LINES]))
    more = ", ..." if len(rows.damaged) > _SHOWN_LINES else ""
    return [f"{len(rows.damaged)} damaged line(s) of {JOURNAL_FILE} were skipped: line {shown}{more}."]


def _accuracy(run: Run) -> float | None:
    known = [bool(result.correct) for result in run.settled if result.correct is not None]
    return sum(known) / len(known) if known else None


def _disagrees(run: Run, summary: JsonObject) -> bool:
    there, here = _number(summary.get("accuracy")), _accuracy(run)
    return there is not None and here is not None and abs(there - here) > 1e-5


def _with_notice(run: Run, summary: JsonObject) -> Run:
    said = (
        f"{SUMMARY_FILE} says accuracy {summary['accuracy']:.1%}; the journal gives {_accuracy(run):.1%}, shown here."
    )
    return replace(run, notices=(*run.notices, said))


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
