"""``Problem`` rows from a JSON-lines or CSV file, with every offending line reported at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from shlex import quote
from typing import Any

from trtkit.bundled import practice_dir
from trtkit.errors import ConfigError, InputError
from trtkit.files import check_lasting, read_text
from trtkit.recipe import BUNDLE_FILE, ENGINE_FILE
from trtkit.solve.run_head import RUN_FILE
from trtkit.tables import HEADER_HINT, is_table, read_table, short

__all__ = ["Problem", "read_problems", "refuse_directory"]

_TEXT_FIELDS = ("problem", "question")
_ANSWER_FIELDS = ("answer", "expected_answer")
_COLUMNS = ("id", *_TEXT_FIELDS, *_ANSWER_FIELDS)
_EXAMPLE = 'every line must be one JSON object, e.g. {"id": "1", "problem": "...", "answer": "42"}'
_HEADER = f"the first line names the columns, e.g. id,problem,answer; {HEADER_HINT}"
_ONE_ID = "give every problem an id of its own, or none of them any: then they are numbered by line"
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem to solve. ``answer`` is the gold answer as the file states it, None where it gives none."""

    id: str
    text: str
    answer: str | None = None


def read_problems(path: Path) -> list[Problem]:
    """The problems in a file, in its order: JSON lines or, where the name ends in ``.csv``, CSV with a header.

    The text is ``problem`` or ``question``, the optional gold answer ``answer`` or ``expected_answer``
    (string or number), the ``id`` a string or an integer. A file where no row has an id is numbered by
    line. Raises :class:`InputError` naming the file and line of every row that is wrong.
    """
    refuse_directory(path)
    check_lasting(path)  # a run reads them again when it goes on, and `report` does
    if not path.exists():
        raise InputError("no such file", where=str(path), hint=_example_file())
    offenders: list[str] = []
    twice = 0
    table = is_table(path)
    rows = read_table(path, offenders, known=_COLUMNS, needed=_TEXT_FIELDS) if table else _rows(path, offenders)
    example = _HEADER if table else _EXAMPLE
    numbered = not any("id" in row for _, row in rows)
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for line, row in rows:
        complaints: list[str] = []
        problem = _problem({**row, "id": line} if numbered else row, complaints)
        if problem is not None:
            if problem.id in first_line:
                complaints.append(f"id {short(problem.id)} was already used in line {first_line[problem.id]}")
                twice += 1
            first_line.setdefault(problem.id, line)
            problems.append(problem)
        offenders += [f"{path}:{line}: {complaint}" for complaint in complaints]
    if offenders:
        shown = offenders[:_SHOWN]
        if len(offenders) > _SHOWN:
            shown.append(f"... and {len(offenders) - _SHOWN} more")
        message = f"{len(offenders)} thing(s) wrong with the problems"
        raise InputError(
            message, where=str(path), offenders=shown, hint=_ONE_ID if twice == len(offenders) else example
        )
    if not problems:
        raise InputError("holds no problem", where=str(path), hint=example)
    return problems


def refuse_directory(path: Path) -> None:
    """Say what a directory in the place of the problems is, and what to name instead: :class:`InputError`."""
    if not path.is_dir():
        return
    if any((path / name).is_file() for name in (ENGINE_FILE, BUNDLE_FILE)):
        raise InputError(
            "is an engine directory, not a file of problems",
            where=str(path),
            hint=f"the problems come first: trtkit solve problems.jsonl --engine {quote(str(path))}",
        )
    if (path / RUN_FILE).is_file():
        raise InputError(
            "is the directory of a run, not a file of problems",
            where=str(path),
            hint=f"to go on with it give the command that began it; `trtkit report {quote(str(path))}` shows it",
        )
    found = sorted(file.name for file in path.iterdir() if file.suffix.lower() in (".jsonl", ".csv") and file.is_file())
    shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    raise InputError(
        "is a directory, not a file of problems",
        where=str(path),
        hint=f"name a file in it: {shown}" if found else f"there is no .jsonl or .csv file in it; {_example_file()}",
    )


def _example_file() -> str:
    try:
        return f"{_EXAMPLE}; to try things out: {practice_dir() / 'demo.jsonl'}"
    except ConfigError:
        return _EXAMPLE


def _rows(path: Path, offenders: list[str]) -> list[tuple[int, dict[str, Any]]]:
    # Not files.read_jsonl: it stops at malformed lines, and here those belong into one list with the
    # missing fields.
    rows: list[tuple[int, dict[str, Any]]] = []
    for line, text in enumerate(read_text(path, InputError).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as problem:
            offenders.append(f"{path}:{line}: not valid JSON: {problem.msg}")
        except (
            RecursionError,
            ValueError,
        ) as problem:  # nested thousands deep, or a number of thousands of digits
            offenders.append(f"{path}:{line}: not usable JSON: {problem}")
        else:
            if isinstance(value, dict):
                rows.append((line, value))
            else:
                offenders.append(f"{path}:{line}: expected a JSON object, found {type(value).__name__}")
    return rows


def _problem(row: Mapping[str, Any], complaints: list[str]) -> Problem | None:
    identity = row.get("id")
    if "id" not in row:
        complaints.append("no id")
    elif isinstance(identity, bool) or not isinstance(identity, (str, int)) or not str(identity).strip():
        complaints.append(f"id {short(identity)}: must be a non-empty string or an integer")
        identity = None
    text = _field(row, _TEXT_FIELDS)
    if text is None:
        complaints.append("no problem (or question) field")
    elif not isinstance(text, str):
        complaints.append(f"the problem must be text, found {type(text).__name__}")
        text = None
    elif not text.strip():
        complaints.append("the problem text is empty")
    answer = _field(row, _ANSWER_FIELDS)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, type(None))):
        complaints.append(f"the answer must be text or a number, found {type(answer).__name__}")
        answer = None
    elif isinstance(answer, float) and not math.isfinite(answer):
        complaints.append(f"the answer {answer} is no number")
    if identity is None or text is None:
        return None
    gold = None if answer is None or not str(answer).strip() else _plain(answer)
    for name, value in (("id", str(identity)), ("problem", text), ("answer", gold or "")):
        if not _is_unicode(value):
            complaints.append(f"the {name} holds half of a surrogate pair, which no UTF-8 text can")
            return None
    return Problem(id=str(identity), text=text, answer=gold)


def _plain(answer: str | int | float) -> str:
    # 1e+20 and 42.0 are how JSON writers spell integers.
    if isinstance(answer, float) and answer.is_integer():
        return str(Fraction(answer))
    return str(answer)


def _field(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
