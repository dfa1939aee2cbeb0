"""Rows of text from CSV files, where a verb also takes JSON lines of the same names."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from trtkit.errors import InputError
from trtkit.files import JsonObject, read_jsonl, read_text

__all__ = ["HEADER_HINT", "is_table", "read_records", "read_table", "short"]

HEADER_HINT = "text with commas, quotes or line ends is quoted"
_SHOWN = 20


def is_table(path: Path) -> bool:
    """Whether the name says CSV."""
    return path.suffix.lower() == ".csv"


def read_records(path: Path, *, known: Sequence[str], needed: Sequence[str]) -> list[tuple[int, JsonObject]]:
    """(line, row) of a CSV file as :func:`read_table` reads it, or of a JSON-lines file. Raises :class:`InputError`."""
    if not is_table(path):
        return read_jsonl(path)
    offenders: list[str] = []
    rows = read_table(path, offenders, known=known, needed=needed)
    if offenders:
        raise InputError(
            f"{len(offenders)} thing(s) wrong with the table",
            where=str(path),
            offenders=offenders[:_SHOWN],
            hint=f"the first line names the columns, e.g. problem,solution; {HEADER_HINT}",
        )
    return rows


def read_table(
    path: Path, offenders: list[str], *, known: Sequence[str], needed: Sequence[str]
) -> list[tuple[int, JsonObject]]:
    """The rows of a CSV file with the lines they begin in; values are text, and empty ones are none.

    One of the columns ``needed`` must be there, none of the ``known`` ones twice. What is wrong goes to ``offenders``.
    """
    text = read_text(path, InputError)
    before = csv.field_size_limit(len(text) + 1)  # a long solution is no damage
    try:
        return _rows(path, text, offenders, known, needed)
    finally:
        csv.field_size_limit(before)


def _rows(
    path: Path, text: str, offenders: list[str], known: Sequence[str], needed: Sequence[str]
) -> list[tuple[int, JsonObject]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, JsonObject]] = []
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        twice = sorted({name for name in names if names.count(name) > 1 and name in known})
        if twice:
            offenders.append(f"{path}:1: several columns are named {' and '.join(twice)}")
        if names and not {*names} & {*needed}:
            offenders.append(f"{path}:1: no column is named {' or '.join(needed)}: {', '.join(map(short, names))}")
        if offenders:
            return []
        while (row := next(reader, None)) is not None:
            # The reader leaves out blank lines: the row's own lines are as many as its values have line ends.
            ends = sum(value.count("\n") for value in row.values() if isinstance(value, str))
            line = reader.line_num - ends
            if None in row:
                offenders.append(f"{path}:{line}: more values than columns (a comma outside quotes?)")
                continue
            rows.append((line, {name.strip(): value for name, value in row.items() if value and value.strip()}))
    except csv.Error as problem:
        offenders.append(f"{path}:{reader.line_num + 1}: not valid CSV from here on: {problem}")
    return rows


def short(value: object) -> str:
    """A value as a complaint shows it."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
