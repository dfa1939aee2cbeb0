"""Where training text comes from: rows of OpenMathReasoning's schema, streamed from the hub or read from a file.

Only ``problem`` is needed when the target writes its own solutions; ``generated_solution`` otherwise. Rows are filtered
as the published recipe does it, with two differences: one row per problem, and CoT rows instead of TIR ones (Fast-Math
models never emit the tool tags).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import HubError, InputError, MissingDependency
from trtkit.files import check_lasting, each_jsonl, refuse_malformed
from trtkit.log import Progress
from trtkit.tables import is_table, read_records

__all__ = ["OPENMATHREASONING", "Row", "read_rows"]

OPENMATHREASONING = "openmathreasoning"
_PROBLEM = ("problem", "question")
_SOLUTION = ("generated_solution", "solution")
_HUB_ID = "nvidia/OpenMathReasoning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A problem, and a worked solution where the source has one."""

    problem: str
    solution: str | None


def read_rows(source: str, *, count: int, split: str = "cot", solutions: bool = True) -> list[Row]:
    """At most ``count`` rows, streamed from ``openmathreasoning`` (nothing stays on disk) or from a file.

    Files are JSONL, CSV or Parquet. Of JSONL and Parquet no more is read than is needed.

    With ``solutions`` rows without one are skipped. Raises :class:`InputError` when nothing usable is left,
    :class:`HubError` when the hub cannot be reached, :class:`MissingDependency` without the ``train`` extra.
    """
    offenders: list[str] = []
    records = _stream(split) if source == OPENMATHREASONING else _from_file(Path(source), offenders)
    seen: set[str] = set()
    rows: list[Row] = []
    with Progress("read rows", total=count, unit="problems", after_seconds=2) as progress:
        for record in records:
            row = _usable(record, solutions)
            if row is None or row.problem in seen:
                continue
            seen.add(row.problem)
            rows.append(row)
            progress.advance()
            if len(rows) == count:
                break
    refuse_malformed(Path(source), offenders)
    if not rows:
        wanted = '"problem" and "generated_solution"' if solutions else '"problem"'
        raise InputError(
            "no usable rows",
            where=source,
            hint=f"rows need {wanted}; problem_type, where given, must be has_answer_extracted",
        )
    return rows


def _usable(record: dict[str, Any], solutions: bool) -> Row | None:
    problem = next((record[name] for name in _PROBLEM if record.get(name)), None)
    solution = next((record[name] for name in _SOLUTION if record.get(name)), None)
    if not isinstance(problem, str) or not problem.strip():
        return None
    # A null is how Parquet says that nothing was given.
    if record.get("problem_type") not in (None, "has_answer_extracted"):
        return None
    if solutions and (not isinstance(solution, str) or not solution.strip()):
        return None
    return Row(problem=problem, solution=solution if isinstance(solution, str) else None)


def _from_file(path: Path, offenders: list[str]) -> Iterable[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        datasets = _datasets()
        if not path.is_file():
            raise InputError("no such file", where=str(path))
        records: Iterable[dict[str, Any]] = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        )
        return records
    check_lasting(path)  # an interrupted training reads it again
    known = (*_PROBLEM, *_SOLUTION, "problem_type")
    read = read_records(path, known=known, needed=_PROBLEM) if is_table(path) else each_jsonl(path, offenders)
    return (record for _, record in read)


def _stream(split: str) -> Iterator[dict[str, Any]]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(_HUB_ID, split=split, streaming=True)
        yield from rows.shuffle(seed=0, buffer_size=10_000)
    except (OSError, ValueError) as problem:  # the hub's errors are subclasses of these
        raise HubError(
            f"{_HUB_ID} cannot be streamed: {problem}",
            hint="pass a downloaded file with --data FILE.jsonl (or .parquet)",
        ) from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependency(
            "the datasets package is not installed",
            hint="pip install 'trtkit[train]', or pass a JSONL file with --data",
        ) from None
    return datasets
