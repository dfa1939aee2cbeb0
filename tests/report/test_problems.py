from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from trtkit.report.problems import Line, ProblemRow, problem_rows
from trtkit.report.read import read_runs


def rows_of(tmp_path: Path, problems: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[ProblemRow]:
    return problem_rows(read_runs([write_run(tmp_path / "run", problems, rows, samples=8)]))


def line_of(tmp_path: Path, gold: str | None, rows: list[dict[str, Any]]) -> Line:
    known = {} if gold is None else {"answer": gold}
    [row] = rows_of(tmp_path, [{"id": "a", "problem": "x", **known}], rows)
    return row.lines[0]


ENDS = [
    attempt("a", 0, "8", 10, ending="think"),
    attempt("a", 1, "7", 20, ending="length", finish="length"),
    attempt("a", 2, "8", 40, ending="deadline", forced=True),
    attempt("a", 3, "9", 50, ending="deadline"),
    attempt("a", 4, None, 80, ending="loop"),
    attempt("a", 5, None, 100, ending="deadline"),
    solution("a", "8", 300, cancelled=2),
]


@pytest.mark.parametrize(
    ("gold", "state", "bars", "dots"),
    [
        ("8", "right", ("right", "other", "other"), ("right", "wrong", "right", "wrong")),
        ("7", "wrong", ("wrong", "right", "other"), ("wrong", "right", "wrong", "wrong")),
        (None, "unknown", ("first", "other", "other"), ("first",) * 4),
    ],
)
def test_colours_say_what_is_right_and_marks_how_it_ended(
    tmp_path: Path, gold: str | None, state: str, bars: tuple[str, ...], dots: tuple[str, ...]
) -> None:
    line = line_of(tmp_path, gold, ENDS)
    assert line.state == state
    assert tuple(bar.kind for bar in line.bars) == (*bars, "blank", "cancelled")
    assert [bar.said.split(": ")[1] for bar in line.bars] == ["2 votes", "1 vote", "1 vote", "2 samples", "2 samples"]
    assert tuple(dot.kind for dot in line.dots) == (*dots, "blank", "blank")
    assert [dot.mark for dot in line.dots] == ["stop", "cut", "forced", "cut", "looped", "cut"]
    assert line.votes == "8 ×2, 7 ×1, 9 ×1, no answer ×2"
    assert line.tokens == "10 – 100, median 45"
    assert line.flags == ("1 truncated", "1 forced", "1 looped", "2 cancelled", "2 cut by the deadline")


def test_answers_beyond_the_first_four_are_counted(tmp_path: Path) -> None:
    boxes = ["1", "1", "2", "3", "4", "5", "6"]
    rows = [attempt("a", index, box, 10 + index) for index, box in enumerate(boxes)]
    line = line_of(tmp_path, "1", [*rows, solution("a", "1")])
    assert line.votes == "1 ×2, 2 ×1, 3 ×1, 4 ×1, 2 more"
    assert line.tokens == "10 – 16, median 13"


def test_what_problems_are_sorted_by(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x", "answer": "7"} for name in "abcd"]
    rows = [
        *(attempt("a", index, box) for index, box in enumerate(["7", "7", "7", "8"])),
        solution("a", "7", 40, seconds=9.0, used=2.0),
        attempt("b", 0, "8"),
        solution("b", "8", 10, seconds=4.0),
        attempt("c", 0, None),
        solution("c", None, 10),
        attempt("d", 0, "8", 30),
    ]
    found = rows_of(tmp_path, problems, rows)
    assert [row.id for row in found] == ["a", "b", "c", "d"]
    assert [row.margin for row in found] == [2, 1, 0, 1]
    assert [row.wrong for row in found] == [0, 1, 1, 0], "no answer is wrong, and what is not settled is neither"
    assert [row.tokens for row in found] == [40, 10, 10, 30]
    assert [row.seconds for row in found] == [2.0, 4.0, 1.0, 0.0]
    assert [row.lines[0].time_width for row in found] == [50.0, 100.0, 25.0, 0.0]
    assert [row.lines[0].state for row in found] == ["right", "wrong", "none", "open"]
