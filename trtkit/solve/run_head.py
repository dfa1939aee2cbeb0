"""``run.json`` and ``solutions.jsonl`` as every reader of a run takes them: whole, or refused with what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtkit.errors import InputError, UsageError
from trtkit.files import JsonObject, digest_file, read_json, read_jsonl
from trtkit.solve.answers import AnswerMode
from trtkit.solve.vote import parse_weighting

__all__ = ["JOURNAL_FILE", "PROBLEMS_FILE", "RUN_FILE", "SOLUTIONS_FILE", "SUMMARY_FILE", "engine_told", "mode_of",
           "problems_file", "read_head", "read_solution_golds", "read_summary"]  # fmt: skip

RUN_FILE = "run.json"
JOURNAL_FILE = "journal.jsonl"
SOLUTIONS_FILE = "solutions.jsonl"
SUMMARY_FILE = "summary.json"
PROBLEMS_FILE = "problems.jsonl"
"""In the run directory of a session: what was asked, in that order."""

_TEXT, _TABLE, _COUNT, _NUMBER = "text", "a table", "a whole number", "a number"
_TYPES = {
    "created": _TEXT,
    "versions": _TABLE,
    "problems": _TABLE, "problems.path": _TEXT, "problems.sha256": _TEXT,
    "engine": _TABLE, "engine.path": _TEXT, "engine.model": _TEXT,
    "arguments": _TABLE, "arguments.samples": _COUNT, "arguments.max_tokens": _COUNT, "arguments.mode": _TABLE,
    "arguments.full_vote": "true or false", "arguments.time_limit": _NUMBER, "arguments.weighting": _TEXT,
}  # fmt: skip
"""What the readers use. All may be missing or null: runs of older versions, and sessions that were never closed."""


def read_head(directory: Path) -> JsonObject:
    """``run.json`` of a run directory. Raises :class:`InputError` that lists all that is not as ``trtkit solve`` writes
    it."""
    path = directory / RUN_FILE
    head = read_json(path, InputError)
    wrong = _wrong(head, _TYPES)
    if not wrong:
        for name, check in (("mode", mode_of), ("weighting", _weighting)):
            try:
                check(head)
            except (UsageError, TypeError) as problem:
                said = problem.message if isinstance(problem, UsageError) else str(problem)
                wrong.append(f"arguments.{name}: {said}")
    if wrong:
        raise InputError(
            "not as `trtkit solve` writes it",
            where=str(path),
            offenders=wrong,
            hint="restore the file, or take the version of trtkit that made the run; "
            "`trtkit revote` reads a journal.jsonl alone, in a directory without it",
        )
    return head


def problems_file(directory: Path, head: Mapping[str, Any]) -> Path:
    """The problems of a run: where ``run.json`` says, else in the run directory, which may have moved.

    A session writes there what it was asked, and into ``run.json`` only when it is closed. Raises :class:`InputError`
    where the file is gone, cannot be read or is not the one that was solved.
    """
    told = head.get("problems") or {}
    source = Path(told.get("path") or PROBLEMS_FILE)
    for path in (*([source] if told else []), directory / source, directory / source.name):
        if path.is_file():
            try:
                changed = bool(told) and digest_file(path) != told.get("sha256")
            except OSError as problem:
                raise InputError(f"cannot be read: {problem.strerror or problem}", where=str(path)) from None
            if changed:
                raise InputError("changed since the run", where=str(path), hint="restore the file as it was")
            return path
    raise InputError("not found from this directory", where=str(source), hint=f"put it back there, or into {directory}")


def mode_of(head: Mapping[str, Any]) -> AnswerMode | None:
    """How the run read its answers; None where it does not say."""
    mode = (head.get("arguments") or {}).get("mode")
    return AnswerMode(kind=mode.get("kind", "auto"), modulus=mode.get("modulus")) if mode else None


def engine_told(head: Mapping[str, Any]) -> str | None:
    """Where the samples came from: an engine directory, or a server and its model; None where the run does not say."""
    engine = head.get("engine") or {}
    path, model = engine.get("path"), engine.get("model")
    return f"{model} at {path}" if path and model else path


def _weighting(head: Mapping[str, Any]) -> None:
    parse_weighting((head.get("arguments") or {}).get("weighting") or "majority")


def read_summary(directory: Path) -> JsonObject:
    """``summary.json``; empty where there is none yet. Raises :class:`InputError`."""
    path = directory / SUMMARY_FILE
    if not path.is_file():
        return {}
    summary = read_json(path, InputError)
    wrong = _wrong(summary, {"accuracy": _NUMBER})
    if wrong:
        raise InputError(
            "not as `trtkit solve` writes it", where=str(path), offenders=wrong,
            hint="delete it: the same `trtkit solve` command writes it again",
        )  # fmt: skip
    return summary


def read_solution_golds(directory: Path) -> dict[str, str | None]:
    """Known answers by problem id, from ``solutions.jsonl``; empty where there is none yet. Raises
    :class:`InputError` that names every line that is wrong."""
    path = directory / SOLUTIONS_FILE
    rows = read_jsonl(path, InputError) if path.is_file() else []
    wrong = [f"{path}:{line}: has no 'id'" for line, row in rows if not isinstance(row.get("id"), str)]
    if wrong:
        raise InputError(
            "not as `trtkit solve` writes it", where=str(path), offenders=wrong[:20],
            hint="delete it: the same `trtkit solve` command writes it again",
        )  # fmt: skip
    return {row["id"]: None if row.get("gold") is None else str(row["gold"]) for _, row in rows}


def _wrong(data: Mapping[str, Any], types: Mapping[str, str]) -> list[str]:
    """A line for everything in ``data`` that is there and not of its type."""
    wrong = []
    for name, wanted in types.items():
        *outer, last = name.split(".")
        place: Any = data
        for part in outer:
            place = place.get(part) if isinstance(place, Mapping) else None
        value = place.get(last) if isinstance(place, Mapping) else None
        if value is not None and not _is(value, wanted):
            shown = repr(value)
            wrong.append(f"{name}: expected {wanted}, found {shown if len(shown) < 60 else shown[:60] + '...'}")
    return wrong


def _is(value: Any, wanted: str) -> bool:
    if isinstance(value, bool):
        return wanted == "true or false"
    kinds: dict[str, type | tuple[type, ...]] = {_TEXT: str, _TABLE: Mapping, _COUNT: int, _NUMBER: (int, float)}
    return isinstance(value, kinds.get(wanted, ()))
