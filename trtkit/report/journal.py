"""The journal as a report reads it: with the time of every record, and tolerant of what it does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.runtime.api import EngineStats
from trtkit.solve.journal_rows import DAMAGE, amount, count, counted, number, optional_amount, parse_line, read_engine

__all__ = ["AttemptRow", "JournalRows", "SolutionRow", "read_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """A finished sample, as recorded."""

    index: int
    variant: str
    tokens: int
    ending: str
    box: str | None
    seconds: float
    ended: float
    confidence: float | None
    forced: bool
    tool_calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SolutionRow:
    """A settled problem, as recorded."""

    answer: str | None
    tokens: int
    seconds: float
    ended: float
    stopped_early: str | None
    error: str | None
    share_seconds: float | None
    used_seconds: float | None
    bank_seconds: float | None
    cancelled: int | None
    counted: tuple[int, ...] | None
    """Indices of the samples that were counted, in that order; None in older journals: all of them."""


@dataclass(slots=True, kw_only=True)
class JournalRows:
    """Everything in a journal. ``ended`` counts seconds of work on the run, earlier sessions included."""

    attempts: dict[str, dict[int, AttemptRow]] = field(default_factory=dict)
    """By problem and index, in order of arrival; of two attempts at the same sample the first counts."""
    solutions: dict[str, SolutionRow] = field(default_factory=dict)
    engines: list[EngineStats] = field(default_factory=list)
    """Counters of the engine, one per session that recorded them."""
    loading: float | None = None
    """Seconds spent on loading the engine, where they were recorded."""
    sessions: int = 0
    seconds: float = 0.0
    damaged: list[int] = field(default_factory=list)
    """Numbers of the lines that are no whole records."""


def read_rows(path: Path) -> JournalRows:
    """Read a journal; a missing one is empty. Raises :class:`InputError` when the file cannot be read."""
    rows = JournalRows()
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return rows
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror or problem}", where=str(path)) from None
    before = session = 0.0
    for place, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_line(line)
            kind = row["kind"]
            if kind == "session":
                before, session = before + session, 0.0
                rows.sessions += 1
                if (loading := optional_amount(row, "loading")) is not None:
                    rows.loading = (rows.loading or 0.0) + loading
                continue
            clock = amount(row, "clock")
            _take(rows, kind, row, before + clock)
            session = max(session, clock)
        except DAMAGE:
            rows.damaged.append(place)
    rows.seconds = before + session
    return rows


def _take(rows: JournalRows, kind: str, row: dict[str, Any], ended: float) -> None:
    if kind == "attempt":
        attempt = _attempt(row, ended)
        rows.attempts.setdefault(str(row["problem"]), {}).setdefault(attempt.index, attempt)
    elif kind == "solution":
        rows.solutions[str(row["problem"])] = _solution(row, ended)
    elif kind == "stats":
        rows.engines.append(read_engine(row, lenient=True))


def _attempt(row: Mapping[str, Any], ended: float) -> AttemptRow:
    ending = str(row.get("ending") or row["finish"])
    return AttemptRow(
        index=count(row, "index"),
        variant=str(row["variant"]),
        tokens=count(row, "tokens"),
        ending=ending,
        box=None if row["box"] is None else str(row["box"]),
        seconds=amount(row, "seconds"),
        ended=ended,
        confidence=None if row.get("confidence") is None else number(row["confidence"], "confidence"),
        forced=bool(row.get("forced")),
        tool_calls=count(row, "tool_calls", 0),
    )


def _solution(row: Mapping[str, Any], ended: float) -> SolutionRow:
    return SolutionRow(
        answer=None if row["answer"] is None else str(row["answer"]),
        tokens=count(row, "tokens"),
        seconds=amount(row, "seconds"),
        ended=ended,
        stopped_early=None if row["stopped_early"] is None else str(row["stopped_early"]),
        error=None if row["error"] is None else str(row["error"]),
        share_seconds=optional_amount(row, "share"),
        used_seconds=optional_amount(row, "used"),
        bank_seconds=optional_amount(row, "bank"),
        cancelled=None if row.get("cancelled") is None else count(row, "cancelled"),
        counted=counted(row),
    )
