"""Runs that were edited by hand, or half copied: every reader says what is wrong, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.examples import paired
from tests.report.run_dirs import attempt, solution, write_run
from tests.solve.scripted import places_in
from tests.solve.scripted import run as solve
from trtkit.cli.app import run
from trtkit.errors import TrtkitError

STATS = {
    "kind": "stats", "steps": 5, "prompt_tokens": 1, "prefill_tokens": 1, "new_tokens": 20, "row_steps": 9,
    "preemptions": 0, "peak_rows": 2, "kv_blocks": 4, "kv_blocks_free": 4, "accepted_by_depth": [2, 1],
    "seconds": {"verify": 1.0}, "clock": 1.0,
}  # fmt: skip
ROWS = [attempt("a", 0, "7", text="x"), attempt("a", 1, "7"), solution("a", "7", counted=[0, 1]), STATS]
ATTEMPT, SOLUTION, ENGINE = 3, 4, 5
"""Lines of the journal; the first is that of the session."""


def directory_of(tmp_path: Path) -> Path:
    problems = [{"id": "a", "problem": "x", "answer": "7"}]
    directory = write_run(tmp_path / "run", problems, ROWS, full_vote=True, time_limit=None, weighting="majority")
    (directory / "summary.json").write_text('{"problems": 1, "answered": 1, "accuracy": 1.0}')
    (directory / "solutions.jsonl").write_text('{"id": "a", "answer": "7", "gold": "7"}\n')
    return directory


def verbs(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of each reader."""
    found = {}
    for verb, *options in (("report",), ("revote", "--rules", "full", "--draws", "1"), ("inspect",)):
        code = run([verb, str(directory), *options])
        found[verb] = code, capsys.readouterr().err
        assert "--debug" not in found[verb][1], (verb, found[verb])  # the way to a traceback
    return found


def rewritten(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        document = json.loads(path.read_text())
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        path.write_text(json.dumps(document))

    return damage


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("problems",), "x", "problems: expected a table, found 'x'"),
        (("problems", "path"), 3, "problems.path: expected text, found 3"),
        (("engine",), [1], "engine: expected a table, found [1]"),
        (("arguments",), "x", "arguments: expected a table, found 'x'"),
        (("arguments", "mode"), "x", "arguments.mode: expected a table"),
        (("arguments", "mode"), {"kind": "other"}, "arguments.mode: answer mode 'other'"),
        (("arguments", "mode"), {"kind": "integer", "modulus": "x"}, "arguments.mode: "),
        (("arguments", "weighting"), "x", "arguments.weighting: "),
        (("arguments", "samples"), "many", "arguments.samples: expected a whole number, found 'many'"),
        (("versions",), 1, "versions: expected a table, found 1"),
    ],
)
def test_a_run_file_of_wrong_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], value: Any, said: str
) -> None:
    directory = directory_of(tmp_path)
    rewritten("run.json", *keys, value=value)(directory)
    for verb, (code, error) in verbs(directory, capsys).items():
        assert code == 1, verb
        assert f"{directory}/run.json" in error
        assert said in error
        assert "hint:" in error


def test_what_older_runs_and_open_sessions_do_not_say_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = directory_of(tmp_path)
    (directory / "run.json").write_text("{}")
    assert {code for code, _ in verbs(directory, capsys).values()} == {0}


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        (ATTEMPT, {"tokens": "many"}, "tokens: expected a whole number from 0 up, found 'many'"),
        (ATTEMPT, {"tokens": -1}, "tokens: expected a whole number from 0 up, found -1"),
        (ATTEMPT, {"seconds": None}, "seconds: expected a number, found None"),
        (ATTEMPT, {"index": 1.5}, "index: expected a whole number from 0 up, found 1.5"),
        (ATTEMPT, {"clock": "x"}, "clock: expected a number, found 'x'"),
        (ENGINE, {"seconds": 5}, "seconds: expected a table, found 5"),
        (ENGINE, {"seconds": {"verify": "x"}}, "verify: expected a number, found 'x'"),
        (ENGINE, {"accepted_by_depth": ["x"]}, "accepted_by_depth: expected a whole number"),
        (ENGINE, {"new_tokens": float("inf")}, "new_tokens: expected a whole number"),
        (SOLUTION, {"counted": ["x"]}, "counted: expected a whole number from 0 up, found 'x'"),
    ],
)
def test_a_journal_line_of_wrong_types_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: int, changes: dict[str, Any], said: str,
) -> None:  # fmt: skip
    directory = directory_of(tmp_path)
    path = directory / "journal.jsonl"
    rows = path.read_text().splitlines()
    rows[line - 1] = json.dumps({**json.loads(rows[line - 1]), **changes})
    path.write_text("\n".join(["", *rows]) + "\n")  # a blank line counts
    found = verbs(directory, capsys)
    assert found["report"][0] == found["inspect"][0] == 0
    assert f"line {line + 1}." in (directory / "report.html").read_text()
    warning = found["revote"][1]
    assert f"{path}:{line + 1}: not a whole record" in warning
    assert said in warning


@pytest.mark.parametrize(
    ("name", "damage"),
    paired(
        ["run.json", "summary.json", "journal.jsonl", "solutions.jsonl"],
        ["empty", "cut", "a directory", "bytes", "a list"],
    ),
)
def test_files_that_are_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    directory = directory_of(tmp_path)
    (tmp_path / "problems.jsonl").unlink()  # so that solutions.jsonl is read too
    path = directory / name
    raw = path.read_bytes()
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    else:
        path.write_bytes(
            {"empty": b"", "cut": raw[: len(raw) * 2 // 3], "bytes": b"\xff\xfe\0" + raw}.get(damage, b"[1]")
        )
    for code, error in verbs(directory, capsys).values():
        assert code in (0, 1)
        if code:
            assert str(path) in error or name in error


def test_a_summary_or_solutions_of_wrong_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = directory_of(tmp_path)
    rewritten("summary.json", "accuracy", value="x")(directory)
    found = verbs(directory, capsys)
    for verb in ("report", "inspect"):
        assert found[verb][0] == 1
        assert "summary.json: " in found[verb][1]
        assert "accuracy: expected a number, found 'x'" in found[verb][1]
    (directory / "summary.json").unlink()
    (tmp_path / "problems.jsonl").unlink()
    (directory / "solutions.jsonl").write_text('{"id": "a"}\n{"gold": "7"}\n')
    found = verbs(directory, capsys)
    for verb in ("report", "revote"):
        assert found[verb][0] == 1
        assert "solutions.jsonl:2: has no 'id'" in found[verb][1]


@pytest.mark.parametrize("changes", [{"lanes": "x"}, {"lanes": [3]}, {"loading": "x"}])
def test_going_on_with_a_session_line_of_wrong_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    places = places_in(tmp_path, 2)
    solve(places)
    path = places.out / "journal.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{**rows[0], **changes}, *(row for row in rows[1:] if row.get("problem") == "p0")]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert solve(places).summary.problems == 2


@pytest.mark.parametrize("damage", [{"arguments": "x"}, {"versions": 3}, {"problems": [1]}])
def test_going_on_with_a_damaged_run_file(tmp_path: Path, damage: dict[str, Any]) -> None:
    places = places_in(tmp_path, 2)
    solve(places)
    path = places.out / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(TrtkitError, match=f"{next(iter(damage))}: expected a table"):
        solve(places)
