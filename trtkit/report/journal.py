"""The journal as a report reads it: with the time of every record, and tolerant of what it does not know."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.runtime.api import EngineStats

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
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            kind = row["kind"]
            if kind == "session":
                before, session = before + session, 0.0
                rows.sessions += 1
                if (loading := _optional(row, "loading")) is not None:
                    rows.loading = (rows.loading or 0.0) + loading
                continue
            clock = _amount(row["clock"])
            _take(rows, kind, row, before + clock)
            session = max(session, clock)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            rows.damaged.append(number)
    rows.seconds = before + session
    return rows


def _take(rows: JournalRows, kind: str, row: Mapping[str, Any], ended: float) -> None:
    if kind == "attempt":
        attempt = _attempt(row, ended)
        rows.attempts.setdefault(str(row["problem"]), {}).setdefault(attempt.index, attempt)
    elif kind == "solution":
        rows.solutions[str(row["problem"])] = _solution(row, ended)
    elif kind == "stats":
        rows.engines.append(_engine(row))


def _attempt(row: Mapping[str, Any], ended: float) -> AttemptRow:
    ending = str(row.get("ending") or row["finish"])
    return AttemptRow(
        index=_count(row["index"]),
        variant=str(row["variant"]),
        tokens=_count(row["tokens"]),
        ending=ending,
        box=None if row["box"] is None else str(row["box"]),
        seconds=_amount(row["seconds"]),
        ended=ended,
        confidence=_optional(row, "confidence", signed=True),
        forced=bool(row.get("forced")),
        tool_calls=_count(row.get("tool_calls") or 0),
    )


def _solution(row: Mapping[str, Any], ended: float) -> SolutionRow:
    return SolutionRow(
        answer=None if row["answer"] is None else str(row["answer"]),
        tokens=_count(row["tokens"]),
        seconds=_amount(row["seconds"]),
        ended=ended,
        stopped_early=None if row["stopped_early"] is None else str(row["stopped_early"]),
        error=None if row["error"] is None else str(row["error"]),
        share_seconds=_optional(row, "share"),
        used_seconds=_optional(row, "used"),
        bank_seconds=_optional(row, "bank"),
        cancelled=None if row.get("cancelled") is None else _count(row["cancelled"]),
        counted=None if row.get("counted") is None else tuple(map(_count, row["counted"])),
    )


def _engine(row: Mapping[str, Any]) -> EngineStats:
    return EngineStats(
        new_tokens=_count(row["new_tokens"]),
        row_steps=_count(row["row_steps"]),
        drafted_row_steps=_count(row.get("drafted_row_steps", 0)),
        accepted_by_depth=tuple(_count(count) for count in row["accepted_by_depth"]),
        seconds={str(phase): _amount(seconds) for phase, seconds in row["seconds"].items()},
    )


def _optional(row: Mapping[str, Any], name: str, *, signed: bool = False) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    return float(value) if signed and math.isfinite(float(value)) else _amount(value)


def _count(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError(f"negative: {value}")
    return number


def _amount(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"not a finite amount: {value}")
    return number
