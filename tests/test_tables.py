"""CSV where JSON lines do: the same rows, and what is wrong with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.chat_files import save_chat_files, save_problems
from trtkit.build.calibration import read_calibration
from trtkit.chat import load_chat
from trtkit.errors import InputError
from trtkit.tables import read_records
from trtkit.training.rows import Row, read_rows


def as_table(lines: Path) -> Path:
    """The rows of a JSON-lines file in a CSV file beside it, as a spreadsheet would write them."""
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    path = lines.with_suffix(".CSV")
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_calibrates_as_json_lines_do(tmp_path: Path) -> None:
    save_chat_files(tmp_path)
    chat, lines = load_chat(tmp_path), save_problems(tmp_path / "rows.jsonl", 60)
    one, two = (read_calibration(path, chat, rows=32, tokens=99, vocab=320) for path in (lines, as_table(lines)))
    assert one == two
    bad = tmp_path / "bad.csv"
    bad.write_text('problem,solution\n"1 +\n1",2\nonly asked,\n')
    with pytest.raises(InputError) as refused:
        read_calibration(bad, chat, rows=32, tokens=99, vocab=320)
    assert refused.value.offenders == (f"{bad}:4: no usable generated_solution",)


def test_a_table_trains_as_json_lines_do(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    rows = [
        {"problem": "a, b", "solution": 'says "x"\nand more', "problem_type": "has_answer_extracted"},
        {"problem": "proof", "solution": "z", "problem_type": "converted_proof"},
        {"problem": "not solved"},
        {"problem": "long", "solution": "x" * 200_000},  # more than the csv module reads by itself
    ]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved = [Row(problem="a, b", solution='says "x"\nand more'), Row(problem="long", solution="x" * 200_000)]
    for path in (lines, as_table(lines)):
        assert read_rows(str(path), count=9) == solved
        assert [row.problem for row in read_rows(str(path), count=9, solutions=False)] == ["a, b", "not solved", "long"]


def test_a_table_without_the_column_is_refused_with_its_names(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,text,text\n1,x,y\n")
    with pytest.raises(InputError, match="no column is named problem or question: 'id', 'text', 'text'"):
        read_rows(str(path), count=9, solutions=False)
    with pytest.raises(InputError, match="several columns are named text") as refused:
        read_records(path, known=("text",), needed=("text",))
    assert refused.value.hint is not None
    path.write_text('problem,solution\na,x,y\nb,"never ends\n')
    with pytest.raises(InputError) as refused:
        read_rows(str(path), count=9)
    assert [offender.split(": ")[0] for offender in refused.value.offenders] == [f"{path}:2", f"{path}:3"]
