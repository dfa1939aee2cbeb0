"""Public trace files: JSON lines with the model's text, the gold answer and the problem under any names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import InputError, UsageError
from trtkit.files import nearest, read_jsonl
from trtkit.solve.traces import StopAt, Trace, TracedProblem, Traces, trace_of_text

__all__ = ["FIELDS", "parse_fields", "read_trace_file"]

FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text", "generation", "generations", "samples", "outputs", "output", "completion", "completions",
             "responses", "response", "generated_solution"),
    "gold": ("gold", "answer", "expected_answer", "ground_truth", "target"),
    "problem": ("problem", "question", "problem_id", "id", "prompt"),
    "tokens": ("tokens", "num_generated_tokens", "num_tokens", "completion_tokens"),
    "seconds": ("seconds", "generation_time"),
}  # fmt: skip
"""What a row may tell, and the column names that are tried in this order when none is given."""
_NEEDED = ("text", "problem")
_SHOWN = 20


@dataclass(slots=True)
class _Group:
    """The samples of one problem while the file is read."""

    gold: str | None
    traces: list[Trace]


def parse_fields(texts: Sequence[str]) -> dict[str, str]:
    """``["text=a,gold=b", "problem=c"]`` -> ``{"text": "a", ...}``. Raises :class:`UsageError` with all that is wrong.

    A column may be a path into nested objects (``samples.text``); lists on the way are spread over the samples.
    """
    named: dict[str, str] = {}
    wrong = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            wrong.append(f"{part!r}: write NAME=COLUMN")
        elif name not in FIELDS:
            wrong.append(f"{name!r}: no such field{nearest(name, FIELDS)}")
        else:
            named[name] = column
    if wrong:
        raise UsageError("--fields", offenders=wrong, hint=f"fields: {', '.join(FIELDS)}; e.g. text=output,gold=answer")
    return named


def read_trace_file(path: Path, fields: Mapping[str, str] | None = None, *, stop_at: StopAt = "eos") -> Traces:
    """Read a trace file: one sample per row, or a list of samples in each row.

    Rows with the same value in the problem column are samples of one problem. ``fields`` names columns
    (:func:`parse_fields`); the others are found by their usual names. Raises :class:`InputError` listing every row that
    is wrong.
    """
    rows = read_jsonl(path)
    columns = _columns(path, rows, fields or {})
    groups: dict[str, _Group] = {}
    offenders: list[str] = []
    estimated = False
    for line, row in rows:
        complaints: list[str] = []
        values = {name: _lookup(row, column) for name, column in columns.items()}
        texts = _texts(values, columns, complaints)
        tokens = _numbers(values, "tokens", len(texts), complaints)
        seconds = _numbers(values, "seconds", len(texts), complaints)
        key, gold = _one(values, "problem", complaints), _one(values, "gold", complaints)
        if key is None and not complaints:
            complaints.append(f"no {columns['problem']!r}")
        if not complaints and key is not None:
            group = groups.setdefault(key, _Group(gold=gold, traces=[]))
            group.gold = group.gold or gold
            if gold not in (None, group.gold):
                complaints.append(f"gold answer {gold!r}, but {group.gold!r} in an earlier row of the same problem")
            for text, count, second in zip(texts, tokens, seconds, strict=True):
                whole = None if count is None else int(count)
                trace = trace_of_text(text, len(group.traces), tokens=whole, seconds=second, stop_at=stop_at)
                group.traces.append(trace)
            estimated = estimated or None in tokens
        offenders += [f"{path}:{line}: {complaint}" for complaint in complaints]
    if offenders:
        shown = offenders[:_SHOWN] + ([f"... and {len(offenders) - _SHOWN} more"] if len(offenders) > _SHOWN else [])
        raise InputError(f"{len(offenders)} thing(s) wrong with the traces", where=str(path), offenders=shown)
    problems = tuple(TracedProblem(id=key, gold=g.gold, traces=tuple(g.traces)) for key, g in groups.items())
    return Traces(problems=problems, estimated=estimated)


def _columns(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], fields: Mapping[str, str]) -> dict[str, str]:
    """Which column holds which field. A column counts as there when any row has it."""
    if not rows:
        raise InputError("holds no trace", where=str(path))
    there = dict.fromkeys(name for _, row in rows for name in row)
    # A column that a path leads into holds objects: it is nothing else besides.
    taken = {column if column in there else column.partition(".")[0] for column in fields.values()}
    columns = {
        field: next((name for name in names if name in there and name not in taken), "")
        for field, names in FIELDS.items()
    }
    columns = {field: name for field, name in {**columns, **fields}.items() if name}
    missing = [f"no column for {field!r}" for field in _NEEDED if field not in columns]
    missing += [
        f"{field}={column}: no row has it"
        for field, column in fields.items()
        if all(_lookup(row, column) is None for _, row in rows)
    ]
    if missing:
        raise InputError(
            "which column is what?",
            where=str(path),
            offenders=missing,
            hint=f"--fields text=...,gold=...,problem=...; the columns are: {', '.join(there)}",
        )
    return columns


def _lookup(row: Any, column: str) -> Any:
    """The value at a dotted path; at a list, the values of all its members; None where there is nothing."""
    if isinstance(row, list):
        found = [_lookup(member, column) for member in row]
        return None if all(value is None for value in found) else found
    if not isinstance(row, dict):
        return None
    if column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    return _lookup(row[first], rest) if dot and first in row else None


def _texts(values: Mapping[str, Any], columns: Mapping[str, str], complaints: list[str]) -> list[str]:
    value = values["text"]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        kinds = ", ".join(sorted({type(text).__name__ for text in texts})) or "an empty list"
        hint = f"; name the text inside, e.g. {columns['text']}.text" if "dict" in kinds else ""
        complaints.append(f"{columns['text']!r} must be text or a list of texts, found {kinds}{hint}")
        return []
    return texts


def _numbers(values: Mapping[str, Any], name: str, count: int, complaints: list[str]) -> list[float | None]:
    value = values.get(name)
    if value is None:
        return [None] * count
    numbers = value if isinstance(value, list) else [value]
    fine = all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 <= n < 1e15 for n in numbers)
    if len(numbers) != count or not fine:
        complaints.append(f"{name}: expected {count} number(s) from 0 up, one for each text")
        return [None] * count
    return list(numbers)


def _one(values: Mapping[str, Any], name: str, complaints: list[str]) -> str | None:
    """A value that holds for the whole row, as text."""
    value = values.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        complaints.append(f"{name}: must be text or a number, found {type(value).__name__}")
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
