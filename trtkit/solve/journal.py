"""The append-only journal of a run: what is in it survives ``kill -9``, and the next run goes on from there.

One JSON object per line: ``session`` when a process starts, ``attempt`` when a sample ends, ``solution``
when a problem is settled, ``stats`` with the engine's counters when a process ends. ``clock`` is seconds since that
session began. Fields that were added later are optional, so older journals can be read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trtkit.closing import Closing
from trtkit.errors import InputError, OutputError
from trtkit.files import JsonObject, append_jsonl
from trtkit.locks import exclusive
from trtkit.log import logger
from trtkit.runtime.api import EngineStats
from trtkit.solve.journal_rows import (
    DAMAGE,
    Settled,
    amount,
    attempt_row,
    count,
    engine_row,
    parse_line,
    read_attempt,
    read_engine,
    read_settled,
    solution_row,
    what_is_wrong,
)
from trtkit.solve.records import Attempt, Solution

__all__ = ["History", "Journal", "Settled", "read_history"]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What earlier sessions of this run did."""

    attempts: dict[str, tuple[Attempt, ...]]
    """By problem id, in order of arrival."""
    settled: dict[str, Settled]
    seconds: float
    """Time spent by all sessions, up to the last thing that each wrote."""
    loading_seconds: float = 0.0
    """Time that they spent on opening the engine."""
    lanes: int | None = None
    """Of the counting order (:mod:`trtkit.solve.counting`), as the first session that had one fixed it."""
    engines: tuple[EngineStats, ...] = ()
    """Counters of the engine, one entry per session that came to an end."""

    @property
    def spent_seconds(self) -> float:
        """What counts against a time limit."""
        return self.seconds + self.loading_seconds


class Journal(Closing):
    """Appends to ``path``; holds a lock, so that two processes never write the same run.

    Raises :class:`OutputError` when another process has it open or it cannot be written.
    """

    def __init__(
        self, path: Path, *, fresh: bool = False, patient: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``fresh`` throws away what is there. A ``patient`` journal that cannot be written keeps its rows, with a
        warning, and writes them with the next ones."""
        self._path = path
        self._clock = clock
        self._patient = patient
        self._unwritten: list[JsonObject] = []
        self._began: float | None = None
        self._loading = 0.0
        self._lock = exclusive(path.with_suffix(".lock"), "this run")
        try:
            if fresh:
                _remove(path)
            self.history = read_history(path)
            self.engine: EngineStats | None = None
        except BaseException:
            self.close()
            raise

    def begin(self, loading_seconds: float = 0.0, lanes: int | None = None) -> None:
        """Start this session's clock, after ``loading_seconds`` of opening the engine; ``lanes`` as in ``History``.

        Nothing is written before, so that a refused run leaves no trace.
        """
        _mend(self._path)
        self._began, self._loading = self._clock(), loading_seconds
        started = datetime.now(UTC).isoformat(timespec="seconds")
        row: JsonObject = {"kind": "session", "started": started, "loading": round(loading_seconds, 3)}
        self._append([row if lanes is None else {**row, "lanes": lanes}])

    @property
    def seconds(self) -> float:
        """Time spent on this run by all sessions so far."""
        return self.history.seconds + self._elapsed()

    @property
    def loading_seconds(self) -> float:
        """Time that all sessions so far spent on opening the engine."""
        return self.history.loading_seconds + self._loading

    def record(self, attempts: Sequence[Attempt], solutions: Sequence[Solution]) -> None:
        """Append what just finished, on the disk when this returns. Raises :class:`OutputError`, unless patient."""
        clock = round(self._elapsed(), 3)
        rows = [{**attempt_row(attempt), "clock": clock} for attempt in attempts]
        rows += [{**solution_row(solution), "clock": clock} for solution in solutions]
        if rows:
            self._append(rows)

    def record_engine(self, stats: EngineStats) -> None:
        """Append the engine's counters, when nothing more is to come from it. Raises as :meth:`record`."""
        self.engine = stats
        self._append([{**engine_row(stats), "clock": round(self._elapsed(), 3)}])

    def _append(self, rows: Sequence[JsonObject]) -> None:
        unwritten = [*self._unwritten, *rows]
        try:
            append_jsonl(self._path, unwritten)
        except OutputError as problem:
            if not self._patient:
                raise
            if not self._unwritten:
                logger.warning("%s: %s; goes on without, and tries again", self._path, problem.message)
            self._unwritten = unwritten
        else:
            self._unwritten = []

    def _elapsed(self) -> float:
        return 0.0 if self._began is None else self._clock() - self._began

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()


def read_history(path: Path) -> History:
    """Read a journal; a missing one is an empty history.

    Lines that are no whole records (torn by a crash) are skipped with a warning that says which and why: what they
    said is done again. Of two attempts at the same sample the first counts. Raises :class:`InputError` when the
    file cannot be read.
    """
    attempts: dict[str, dict[int, Attempt]] = {}
    settled: dict[str, Settled] = {}
    engines: list[EngineStats] = []
    lanes: int | None = None
    seconds = session = loading = 0.0
    for number, line in _lines(path):
        try:
            row = parse_line(line)
            kind = row["kind"]
            if kind == "session":
                loaded = amount(row, "loading") if row.get("loading") is not None else 0.0
                lanes = lanes or count(row, "lanes", 0) or None
                seconds, session, loading = seconds + session, 0.0, loading + loaded
                continue
            clock = amount(row, "clock")
            if kind == "attempt":
                attempt = read_attempt(row)
                attempts.setdefault(attempt.problem_id, {}).setdefault(attempt.index, attempt)
            elif kind == "solution":
                settled[str(row["problem"])] = read_settled(row)
            elif kind == "stats":
                engines.append(read_engine(row))
            session = max(session, clock)
        except DAMAGE as problem:
            said = what_is_wrong(problem)
            logger.warning("%s:%d: not a whole record, skipped as if it were not there (%s)", path, number, said)
    whole = {problem: tuple(by_index.values()) for problem, by_index in attempts.items()}
    return History(
        attempts=whole,
        settled=settled,
        seconds=seconds + session,
        loading_seconds=loading,
        lanes=lanes,
        engines=tuple(engines),
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as problem:
        raise OutputError(f"cannot be removed: {problem.strerror or problem}", where=str(path)) from None


def _lines(path: Path) -> Iterable[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror or problem}", where=str(path)) from None
    return [(number, line) for number, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]


def _mend(path: Path) -> None:
    """End a torn last line, so that the next record begins on a line of its own."""
    try:
        with path.open("r+b") as stream:
            if stream.seek(0, os.SEEK_END) and stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) != b"\n":
                stream.write(b"\n")
    except FileNotFoundError:
        return
    except OSError as problem:
        raise OutputError(f"cannot be written: {problem.strerror or problem}", where=str(path)) from None
