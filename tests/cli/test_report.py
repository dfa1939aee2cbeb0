from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from trtkit.cli.app import run

PROBLEMS = [{"id": "a", "problem": "x", "answer": "7"}]
ROWS = [attempt("a", 0, "7"), solution("a", "7")]


def test_report_writes_a_page_into_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run", PROBLEMS, ROWS)
    assert run(["report", str(directory), "--markdown", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["page"] == str(directory / "report.html")
    assert found["markdown"] == str(directory / "report.md")
    assert [(one["run"], one["accuracy"], one["tokens"]) for one in found["runs"]] == [("run", 1.0, 10)]
    assert lines[-1].startswith("next: open ")
    assert (directory / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert "1 of 1 problems right" in (directory / "report.md").read_text("utf-8")


def test_a_report_that_takes_long_shows_its_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [{**PROBLEMS[0], "id": name} for name in "abc"]
    rows = [row for name in "abc" for row in (attempt(name, 0, "7"), solution(name, "7"))]
    directory = write_run(tmp_path / "run", problems, rows)
    assert run(["report", str(directory)]) == 0
    assert "problems" not in capsys.readouterr().err, "not for a moment's work"
    now = itertools.count(step=3.0)
    monkeypatch.setattr("trtkit.log.time.monotonic", lambda: next(now))
    assert run(["report", str(directory)]) == 0
    error = capsys.readouterr().err
    for stage in ("read", "figures"):
        assert re.search(rf"^{stage}: [12]/3 problems, [\d.]+s left$", error, re.MULTILINE), error
        assert re.search(rf"^{stage}: 3 problems in [\d.]+s$", error, re.MULTILINE), error
    assert run(["--quiet", "report", str(directory)]) == 0
    assert "problems" not in capsys.readouterr().err


def test_several_runs_go_where_out_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, PROBLEMS, ROWS, samples=n) for name, n in (("one", 4), ("two", 8))]
    page = tmp_path / "deep" / "both.html"
    assert run(["report", *map(str, runs), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "must not be compared: they differ in samples per problem" in out
    assert page.is_file()
    assert not page.with_suffix(".md").exists()


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path), str(tmp_path / "missing")]) == 1
    error = capsys.readouterr().err
    assert "no run.json in it" in error
    assert "no such directory" in error


def test_the_markdown_does_not_replace_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, page = write_run(tmp_path / "run", PROBLEMS, ROWS), tmp_path / "page.md"
    assert run(["report", str(directory), "--out", str(page), "--markdown"]) == 2
    assert "would both be" in capsys.readouterr().err
    assert not page.exists()
