from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from trtkit.report.compare import compare
from trtkit.report.figures import figures_of
from trtkit.report.read import read_runs
from trtkit.report.totals import duration, settings, totals


def test_every_figure_of_a_run_worked_out_by_hand(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x", "answer": "7"} for name in "ab"]
    rows = [
        {"kind": "session", "loading": 2.5},
        attempt("a", 0, "7", 10),
        attempt("a", 1, "7", 20),
        attempt("a", 2, "8", 30),
        attempt("a", 3, None, 100, finish="length", ending="length"),
        solution("a", "7", 200, clock=30.0, cancelled=1, stopped_early="agree(2)"),
        {"kind": "session", "loading": 1.5},
        attempt("a", 0, "9", 900),  # the first of two counts
        *(attempt("b", n, None, 40, finish="length", ending="length", forced=True) for n in (0, 1)),
        *(attempt("b", n, None, 40, ending="loop") for n in (2, 3, 4)),
        solution("b", "0", 200, clock=95.0, cancelled=0),
    ]
    runs = read_runs([write_run(tmp_path / "run", problems, rows, samples=5, time_limit=3720.0, default_answer="0")])
    groups = totals(runs, [figures_of(run) for run in runs], compare(runs))
    assert {metric.name: metric.values[0] for group in groups for metric in group.metrics} == {
        "Accuracy": "50.0% ± 50.0 (1 of 2)",
        "pass@1": "25.0% ± 25.0",
        "maj@k, all samples": "50.0% ± 50.0 (k = 5)",
        "Problems without an answer": "1 of 2",
        "Default answers": "1",
        "Finished samples": "9",
        "Without an answer": "66.7%",
        "Truncated": "11.1%",
        "Forced": "22.2%",
        "Looped": "33.3%",
        "Cancelled": "1",
        "Problems stopped early": "1 of 2",
        "Tokens per sample": "40; 52",
        "Time": "2 min 5 s (limit 1 h 2 min)",
        "Tokens": "400 (10.0% cancelled)",
        "Speed": "3 tok/s",
        "Tokens per step": "not recorded",
        "Loading": "4.0 s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.14, "3.1 s"), (60, "1 min"), (125.4, "2 min 5 s"), (3599.6, "1 h"), (7380, "2 h 3 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_known_answers_no_row_is_about_being_right(tmp_path: Path) -> None:
    unknown = [{"id": "a", "problem": "x"}]
    runs = read_runs([write_run(tmp_path / "run", unknown, [attempt("a", 0, "7"), solution("a", "7")])])
    answers = totals(runs, [figures_of(run) for run in runs], compare(runs))[0]
    assert {metric.name: metric.values for metric in answers.metrics} == {"Problems without an answer": ("0 of 1",)}


def test_settings_are_told_in_the_words_of_the_options(tmp_path: Path) -> None:
    problems = [{"id": "a", "problem": "x"}]
    arguments = {
        "mode": {"kind": "integer", "modulus": 1000},
        "variants": ["solve", "reason"],
        "weighting": "finish",
        "time_limit": 18000.0,
        "tools": {"calls": 6, "memory_bytes": 536870912, "unsafe": False, "path": None},
        "output_layer": None,
        "policy": None,
        "full_vote": True,
    }
    runs = read_runs([write_run(tmp_path / "run", problems, [], **arguments)])
    said = {metric.name: metric.values[0] for metric in settings(runs)}
    assert {
        "answer mode": "integer 1,000",
        "prompt": "solve, reason",
        "weights": "finish",
        "time limit": "5 h",
        "tools": "calls 6, memory bytes 536,870,912, unsafe no",
        "output layer": "as built",
        "policy": "none",
        "full vote": "yes",
    }.items() <= said.items()
