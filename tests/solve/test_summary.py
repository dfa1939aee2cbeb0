from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import AnswerMode, read_answer
from trtkit.solve.display import LiveDisplay, PlainLines, observer_for, result_table
from trtkit.solve.ends import Ending
from trtkit.solve.grading import Grader
from trtkit.solve.observer import Observer
from trtkit.solve.problems import Problem
from trtkit.solve.records import DEADLINE, TIME_LIMIT, Attempt, Solution, count_attempts
from trtkit.solve.summary import Verdict, judge, solution_row, summarise
from trtkit.solve.vote import Tally, Weighting

MODE = AnswerMode()


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


def solved(problem: str, boxes: list[str | None], *, rule: str | None = None, error: str | None = None) -> Solution:
    attempts = tuple(
        Attempt(
            problem_id=problem,
            index=index,
            variant="solve",
            tokens=10,
            finish=FinishReason.STOP,
            box=box,
            seconds=1.0,
        )
        for index, box in enumerate(boxes)
    )
    return Solution(
        problem_id=problem,
        tally=count_attempts(attempts, MODE, lambda one, other: False),
        attempts=attempts,
        tokens=10 * len(boxes) + (5 if rule else 0),
        seconds=2.0,
        stopped_early=rule,
        error=error,
    )


@pytest.fixture
def verdicts(grader: Grader) -> list[Verdict]:
    problems = [
        Problem(id="right", text="x", answer="1/2"),
        Problem(id="wrong", text="x", answer="073"),
        Problem(id="[bold]no gold[/bold]", text="x"),
        Problem(id="nothing", text="x", answer="0"),
        Problem(id="refused", text="x", answer="1"),
    ]
    solutions = [
        solved("right", ["0.5", "\\frac12", "3", None], rule="unassailable"),
        solved("wrong", ["5", "5", "73"]),
        solved("[bold]no gold[/bold]", ["7"]),
        solved("nothing", [None, None]),
        solved("refused", [], error="prompt too long"),
    ]
    return judge(problems, solutions, MODE, grader)


def test_figures(verdicts: list[Verdict]) -> None:
    assert [verdict.correct for verdict in verdicts] == [True, False, None, False, False]
    assert [verdict.attempts_correct for verdict in verdicts] == [2, 1, None, 0, 0]
    summary = summarise(verdicts, samples=4, seconds=10.0, run_dir=Path("runs/x"))
    assert summary.document() == {
        "problems": 5,
        "answered": 3,
        "accuracy": 0.25,
        "pass_at_1": round((2 / 4 + 1 / 3) / 4, 6),
        "maj_at_k": 0.25,
        "samples": 4,
        "tokens": 105,
        "tokens_per_second": 10.5,
        "seconds": 10.0,
        "stopped_early": 1,
        "run_dir": "runs/x",
        "defaulted": 0,
        "answers_per_problem": 1.4,
        "forced": 0,
        "looped": 0,
        "settled": 0,
        "cancelled": 0,
        "out_of_time": 0,
        "loading_seconds": 0.0,
        "share_seconds": None,
        "time_limit": None,
        "engine": None,
    }


def test_weighted_votes_and_default_answers(grader: Grader) -> None:
    weighed = solved("weighed", ["8", "8", "7"])
    sure = [replace(one, confidence=value) for one, value in zip(weighed.attempts, (-3.0, -3.0, -0.1), strict=True)]
    empty = Tally(weighting=Weighting(by="confidence"))
    tally = count_attempts(sure, MODE, lambda one, other: False, empty)
    blank = replace(solved("blank", [None]), fallback=read_answer("0", MODE))
    looped = tuple(replace(one, ending=Ending.LOOP, forced=True) for one in blank.attempts)
    settled = replace(weighed.attempts[0], ending=Ending.SETTLED)
    solutions = [
        replace(weighed, tally=tally, attempts=(settled, *sure[1:]), share_seconds=4.0, stopped_early=TIME_LIMIT),
        replace(blank, attempts=looped, share_seconds=2.0, used_seconds=1.25, cancelled=3, stopped_early=DEADLINE),
        replace(solved("tied", ["1", "2"]), cancelled=2, stopped_early="agree(1)"),
    ]
    problems = [Problem(id=one.problem_id, text="x", answer=gold) for one, gold in zip(solutions, "701", strict=True)]
    verdicts = judge(problems, solutions, MODE, grader)
    summary = summarise(verdicts, samples=3, seconds=1.0, run_dir=Path("x"), loading_seconds=2.5, time_limit=9.0)
    assert (summary.accuracy, summary.maj_at_k) == (1.0, 2 / 3)
    assert (summary.answered, summary.defaulted, summary.answers_per_problem) == (2, 1, 5 / 3)
    assert (summary.stopped_early, summary.out_of_time, summary.cancelled) == (3, 2, 5)
    assert (summary.looped, summary.forced, summary.settled) == (1, 1, 1)
    assert (summary.share_seconds, summary.loading_seconds, summary.time_limit) == (3.0, 2.5, 9.0)
    rows = [solution_row(verdict) for verdict in verdicts]
    assert [(vote["answer"], vote["count"], vote["weight"]) for vote in rows[0]["votes"]] == [
        ("7", 1, round(math.exp(-0.1), 4)),
        ("8", 2, round(2 * math.exp(-3), 4)),
    ]
    assert [row["tied"] for row in rows] == [False, False, True]
    assert (rows[1]["answer"], rows[1]["defaulted"], rows[1]["correct"], rows[1]["votes"]) == ("0", True, True, [])
    assert (rows[1]["share_seconds"], rows[1]["used_seconds"], rows[1]["looped"]) == (2.0, 1.25, 1)


def test_nothing_at_all() -> None:
    summary = summarise([], samples=4, seconds=0.0, run_dir=Path("x"))
    assert (summary.accuracy, summary.tokens_per_second, summary.answers_per_problem) == (None, 0.0, 0.0)


def test_one_sample_each_has_the_accuracy_as_its_share(grader: Grader) -> None:
    problems = [Problem(id=name, text="x", answer="7") for name in "abc"]
    verdicts = judge(problems, [solved(name, [box]) for name, box in zip("abc", "778", strict=True)], MODE, grader)
    summary = summarise(
        verdicts, samples=1, seconds=0.7654321, run_dir=Path("x"), loading_seconds=2.34567, time_limit=18000.0
    )
    assert summary.pass_at_1 == summary.accuracy == summary.maj_at_k == 2 / 3
    assert summary.tokens_per_second == pytest.approx(30 / 0.7654321)
    told = summary.document()
    assert (told["accuracy"], told["pass_at_1"], told["maj_at_k"]) == (0.666667, 0.666667, 0.666667)
    assert (told["tokens_per_second"], told["seconds"], told["loading_seconds"]) == (39.19, 0.765, 2.346)


def test_a_row_of_the_solutions_file(verdicts: list[Verdict]) -> None:
    row = json.loads(json.dumps(solution_row(verdicts[0])))
    assert row == {
        "id": "right",
        "answer": "1/2",
        "as_written": "0.5",
        "gold": "1/2",
        "correct": True,
        "votes": [
            {"answer": "1/2", "as_written": "0.5", "count": 2},
            {"answer": "3", "as_written": "3", "count": 1},
        ],
        "tied": False,
        "defaulted": False,
        "finished": 4,
        "without_answer": 1,
        "tokens": 45,
        "forced": 0,
        "looped": 0,
        "settled": 0,
        "cancelled": 0,
        "seconds": 2.0,
        "share_seconds": None,
        "used_seconds": None,
        "stopped_early": "unassailable",
        "error": None,
    }
    assert solution_row(verdicts[4])["error"] == "prompt too long"


def test_the_result_table_shows_ids_and_answers_as_they_are(verdicts: list[Verdict]) -> None:
    stream = io.StringIO()
    Console(file=stream, width=120).print(result_table(verdicts, most=4))
    text = stream.getvalue()
    for word in ("[bold]no gold[/bold]", "2 of 4", "stopped by unassailable", "yes", "and 1 more"):
        assert word in text


def drive(display: Observer, verdicts: list[Verdict]) -> None:
    problems = [verdict.problem for verdict in verdicts]
    display.began(problems, [verdicts[0].solution], 4)
    for verdict in verdicts[1:]:
        display.opened(verdict.problem, count_attempts([], MODE, lambda one, other: False))
        display.stepped(100, 4)
        tally = verdict.solution.tally
        for attempt in verdict.solution.attempts:
            display.attempted(verdict.problem, attempt, tally)
        display.stepped(100, 3)
        display.solved(verdict.problem, verdict.solution)
    display.ended()


def test_plain_lines(verdicts: list[Verdict], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trtkit"):
        drive(PlainLines(), verdicts)
    assert caplog.messages[0] == "resuming: 1 of 5 problems are already solved"
    assert caplog.messages[1] == "[2/5] wrong: 5 (2 of 3 votes), 30 tokens, 2.0s"
    assert caplog.messages[-1] == "[5/5] refused: failed: prompt too long"


def test_a_default_answer_and_a_tie_are_told_whatever_ended_the_problem(caplog: pytest.LogCaptureFixture) -> None:
    zero = read_answer("0", MODE)
    solutions = [
        replace(solved("none", [None, None], rule=DEADLINE), fallback=zero),
        replace(solved("refused", [], error="prompt too long"), fallback=zero),
        solved("tied", ["5", "6"], rule=DEADLINE),
    ]
    stream = io.StringIO()
    verdicts = [
        Verdict(problem=Problem(id=one.problem_id, text="x"), solution=one, correct=None, attempts_correct=None)
        for one in solutions
    ]
    Console(file=stream, width=120).print(result_table(verdicts))
    for note in ("stopped by deadline, default answer", "prompt too long, default answer", "stopped by deadline, tie"):
        assert note in stream.getvalue()
    with caplog.at_level(logging.INFO, logger="trtkit"):
        for one in verdicts[:2]:
            PlainLines().solved(one.problem, one.solution)
    assert caplog.messages[0].endswith("none: 0 (default answer, none in 2 samples, deadline), 25 tokens, 2.0s")
    assert caplog.messages[1].endswith("refused: failed: prompt too long; answered 0")


def test_a_terminal_obeys_no_id_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    one = solved("a\x1b[2J\nb", ["\x1b[31m5"])
    verdict = Verdict(problem=Problem(id=one.problem_id, text="x"), solution=one, correct=None, attempts_correct=None)
    stream = io.StringIO()
    Console(file=stream, width=120).print(result_table([verdict]))
    with caplog.at_level(logging.INFO, logger="trtkit"):
        PlainLines().solved(verdict.problem, one)
    assert "\x1b" not in stream.getvalue() + caplog.text
    assert "a?[2J b: ?[31m5 (1 of 1 votes)" in caplog.text


def test_live_display(verdicts: list[Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.solve.display._REDRAW_SECONDS", -1.0)
    stream = io.StringIO()
    drive(LiveDisplay(Console(file=stream, force_terminal=True, width=100)), verdicts)
    text = stream.getvalue()
    assert "samples unfinished" in text
    assert "5 x2, 73 x1" in text
    assert " left" in text
    assert "[bold]no gold[/bold]: 7 (1 of 1 votes)" in text


def test_the_display_fits_stderr() -> None:
    assert isinstance(observer_for(), PlainLines)
    assert type(observer_for(quiet=True)) is Observer
