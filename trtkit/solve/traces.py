"""Saved samples to replay: journals of our own runs and public trace files, reduced to what a vote needs.

Texts are read once and dropped; of each sample remain its box, its length and how it ended.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trtkit.chat import THINK_END
from trtkit.errors import InputError
from trtkit.files import check_lasting
from trtkit.log import logger
from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import AnswerMode, extract_box
from trtkit.solve.ends import Ending, Probe, is_looping
from trtkit.solve.journal import read_history
from trtkit.solve.problems import read_problems
from trtkit.solve.records import Attempt
from trtkit.solve.run_head import JOURNAL_FILE, RUN_FILE, mode_of, problems_file, read_head, read_solution_golds

__all__ = ["StopAt", "Trace", "TracedProblem", "Traces", "looks_like_journal", "merge", "read_run", "trace_of_text"]

StopAt: TypeAlias = Literal["think", "eos"]

CHARACTERS_PER_TOKEN = 3.0
"""A rough figure for mathematical reasoning, used where a file gives no token counts. Shares saved do not depend on
it."""

_LOOP_EVERY = 800
_RECORDS = ("session", "attempt", "solution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One saved sample."""

    index: int
    """Its place among the samples of its problem: the order in which they were submitted."""
    box: str | None
    """What it answered, as written."""
    tokens: int
    """At least 1."""
    closed: bool
    """It ended its thought."""
    looped: bool
    """It repeated itself until the loop rule would have ended it."""
    seconds: float | None = None
    """From submitting the problem to its end, where that was recorded."""
    confidence: float | None = None
    """Mean log-probability of its tail, where that was recorded."""
    probes: tuple[Probe, ...] = ()
    """What it said when it was asked on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedProblem:
    """A problem and its saved samples, in the order of their indices."""

    id: str
    gold: str | None
    traces: tuple[Trace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Everything that was read."""

    problems: tuple[TracedProblem, ...]
    estimated: bool = False
    """Some token counts are estimates from the length of the text."""
    mode: AnswerMode | None = None
    """How the run read its answers, where that is known."""

    @property
    def count(self) -> int:
        """How many samples there are."""
        return sum(len(problem.traces) for problem in self.problems)

    def number(self, what: Literal["closed", "boxed", "looped"]) -> int:
        """How many samples ended their thought, have a box, or were caught by the loop rule."""
        samples = [trace for problem in self.problems for trace in problem.traces]
        if what == "boxed":
            return sum(trace.box is not None for trace in samples)
        return sum(trace.closed if what == "closed" else trace.looped for trace in samples)


def trace_of_text(
    text: str, index: int, *, tokens: int | None = None, seconds: float | None = None, stop_at: StopAt = "eos"
) -> Trace:
    """A sample from its text. ``stop_at="think"`` cuts it behind the first ``</think>``, its tokens and its seconds in
    proportion."""
    thought, closed, _ = text.partition(THINK_END)
    count = len(text) / CHARACTERS_PER_TOKEN if tokens is None else tokens
    if closed and stop_at == "think":
        kept = thought + closed
        share = len(kept) / len(text)
        count, text = count * share, kept
        seconds = None if seconds is None else seconds * share
    return Trace(
        index=index,
        box=extract_box(text),
        tokens=max(1, round(count)),
        closed=bool(closed),
        looped=loops(text),
        seconds=seconds,
    )


def loops(text: str) -> bool:
    """Whether the loop rule of the solver would have caught this text, asked after every 800 characters."""
    return any(is_looping(text[:end]) for end in range(_LOOP_EVERY, len(text) + 1, _LOOP_EVERY))


def looks_like_journal(path: Path) -> bool:
    """Whether the file holds the records of a run rather than rows of a trace file.

    Raises :class:`InputError` for a pipe, which could not be read after this look.
    """
    check_lasting(path)
    if path.name == JOURNAL_FILE:
        return True  # whatever its first line has come to
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            first = next((line for line in stream if line.strip()), "")
        row = json.loads(first)
    except (OSError, ValueError, RecursionError):
        return False  # the reader of trace files says what is wrong
    return isinstance(row, dict) and row.get("kind") in _RECORDS


def read_run(path: Path, *, stop_at: StopAt = "eos", problems: Path | None = None) -> Traces:
    """The samples of a run directory or of a bare ``journal.jsonl``.

    Gold answers come from ``problems``, else from the problems file that ``run.json`` names while it is unchanged, else
    from the ``solutions.jsonl`` of the run. Problems that were not finished are left out. Raises :class:`InputError`
    when none was.
    """
    directory, journal = (path, path / JOURNAL_FILE) if path.is_dir() else (path.parent, path)
    if not journal.is_file():
        raise InputError(f"no {JOURNAL_FILE} here", where=str(path), hint="give a run directory of `trtkit solve`")
    history = read_history(journal)
    attempts = {name: those for name, those in history.attempts.items() if name in history.settled}
    if not attempts:
        raise InputError("holds no finished problem", where=str(journal), hint="was the run interrupted at once?")
    if len(attempts) < len(history.attempts):
        unfinished = len(history.attempts) - len(attempts)
        logger.warning("%s: %d unfinished problem(s) left out: their short samples came first", path, unfinished)
    run = read_head(directory) if (directory / RUN_FILE).exists() else {}
    golds = _golds(directory, run, problems)
    if run and not (run.get("arguments") or {}).get("full_vote", False):
        logger.warning(
            "%s: this run used stop rules, so the samples it has are those that finished early, no fair draw; "
            "replay a run made with --full-vote",
            path,
        )
    found = tuple(
        TracedProblem(
            id=problem_id,
            gold=golds.get(problem_id),
            traces=tuple(_of_attempt(attempt, stop_at) for attempt in sorted(those, key=lambda each: each.index)),
        )
        for problem_id, those in attempts.items()
    )
    return Traces(problems=found, mode=mode_of(run))


def merge(parts: Sequence[Traces]) -> Traces:
    """Several files as one: samples of the same problem are put together in the order given.

    Raises :class:`InputError` naming every problem that has two different gold answers.
    """
    merged: dict[str, TracedProblem] = {}
    offenders = []
    for problem in (problem for part in parts for problem in part.problems):
        before = merged.get(problem.id)
        if before is None:
            merged[problem.id] = problem
            continue
        if None not in (before.gold, problem.gold) and before.gold != problem.gold:
            offenders.append(f"{problem.id[:60]!r}: {before.gold!r} and {problem.gold!r}")
        joined = (*before.traces, *problem.traces)
        renumbered = tuple(replace(trace, index=index) for index, trace in enumerate(joined))
        merged[problem.id] = TracedProblem(id=before.id, gold=before.gold or problem.gold, traces=renumbered)
    if offenders:
        raise InputError("different gold answers for the same problem", offenders=offenders[:20])
    return Traces(
        problems=tuple(merged.values()),
        estimated=any(part.estimated for part in parts),
        mode=next((part.mode for part in parts if part.mode), None),
    )


def _of_attempt(attempt: Attempt, stop_at: StopAt) -> Trace:
    stopped = attempt.finish is FinishReason.STOP
    if attempt.text is None:
        return Trace(
            index=attempt.index,
            box=attempt.box,
            tokens=max(1, attempt.tokens),
            closed=stopped,
            looped=attempt.ending is Ending.LOOP,
            seconds=attempt.seconds,
            confidence=attempt.confidence,
            probes=attempt.probes,
        )
    trace = trace_of_text(attempt.text, attempt.index, tokens=attempt.tokens, seconds=attempt.seconds, stop_at=stop_at)
    return replace(
        trace,
        closed=trace.closed or stopped,
        looped=trace.looped or attempt.ending is Ending.LOOP,
        confidence=attempt.confidence,
        probes=attempt.probes,
    )


def _golds(directory: Path, run: Mapping[str, Any], problems: Path | None) -> dict[str, str]:
    if problems is None and run:
        with contextlib.suppress(InputError):
            problems = problems_file(directory, run)
    if problems is not None:
        return {problem.id: problem.answer for problem in read_problems(problems) if problem.answer is not None}
    return {name: gold for name, gold in read_solution_golds(directory).items() if gold is not None}
