from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from tests.solve.scripted import run, write_engine, write_problems
from trtkit.errors import InputError, UsageError
from trtkit.report.figures import figures_of
from trtkit.report.read import read_runs
from trtkit.solve.run import Places


@pytest.fixture
def solved(tmp_path: Path) -> Path:
    """A run of the real solver on a scripted engine."""
    problems, engine = write_problems(tmp_path / "problems.jsonl", 12), write_engine(tmp_path / "engine")
    run(Places(problems=problems, engine=engine, out=tmp_path / "run"))
    return tmp_path / "run"


def test_a_run_says_what_its_summary_says(solved: Path) -> None:
    (read,) = read_runs([solved])
    figures, summary = figures_of(read), json.loads((solved / "summary.json").read_text())
    assert figures.accuracy is not None
    assert figures.pass_at_1 is not None
    assert figures.accuracy.value == pytest.approx(summary["accuracy"], abs=1e-6)
    assert figures.pass_at_1.value == pytest.approx(summary["pass_at_1"], abs=1e-6)
    assert (figures.problems, figures.answered) == (summary["problems"], summary["answered"])
    assert (figures.tokens, figures.stopped_early) == (summary["tokens"], summary["stopped_early"])
    assert figures.cancelled == summary["cancelled"]
    assert figures.forced_rate == pytest.approx(summary["forced"] / figures.samples)
    assert read.finished
    assert read.notices == ()
    answers = {row["id"]: row for row in map(json.loads, (solved / "solutions.jsonl").read_text().splitlines())}
    for result in read.results:
        assert result.answer == answers[result.id]["as_written"]
        assert [vote.count for vote in result.votes] == [vote["count"] for vote in answers[result.id]["votes"]]


def test_a_run_in_the_middle_of_its_work(solved: Path) -> None:
    lines = (solved / "journal.jsonl").read_text().splitlines(keepends=True)
    half = [line for line in lines if json.loads(line)["kind"] != "stats"][: len(lines) // 2]
    (solved / "journal.jsonl").write_text("".join(half))
    (solved / "solutions.jsonl").unlink()
    (solved / "summary.json").unlink()
    (read,) = read_runs([solved])
    assert 0 < len(read.settled) < len(read.results) == 12
    assert not read.finished
    assert figures_of(read).graded == len(read.settled)


def test_a_run_that_has_done_nothing_yet(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [{"id": "a", "problem": "x", "answer": "1"}], [])
    (directory / "journal.jsonl").unlink()
    (read,) = read_runs([directory])
    assert figures_of(read).accuracy is None
    assert figures_of(read).speed == ()


def test_damaged_lines_are_skipped_and_told(tmp_path: Path) -> None:
    rows = [attempt("a", 0, "7"), attempt("a", 1, "7", tokens=-5), solution("a", "7", seconds=float("nan"))]
    rows.append(attempt("a", 2, "7", seconds=10**400))
    directory = write_run(tmp_path / "run", [{"id": "a", "problem": "x", "answer": "7"}], rows)
    with (directory / "journal.jsonl").open("ab") as stream:
        stream.write(b'[1]\n"x"\n{"kind": "attempt", "problem": "a"}\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"kind": "att')
    (read,) = read_runs([directory])
    assert len(read.results[0].samples) == 1
    assert not read.results[0].settled
    assert read.notices == ("9 damaged line(s) of journal.jsonl were skipped: line 3, 4, 5, 6, 7, 8, 9, 10, 11.",)


def test_a_problems_file_that_changed_gives_no_texts(solved: Path, tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_text('{"id": "p0", "problem": "another one", "answer": "1"}\n')
    (read,) = read_runs([solved])
    assert {result.text for result in read.results} == {None}
    assert "changed since the run" in read.notices[0]
    accuracy = figures_of(read).accuracy  # known answers come from solutions.jsonl
    assert accuracy is not None
    assert accuracy.count == 12


def test_votes_are_ranked_as_the_run_weighs_them_and_its_own_answer_comes_first(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x", "answer": "7"} for name in "ab"]
    rows = [
        attempt(name, index, box, confidence=confidence)
        for name in "ab"
        for index, (box, confidence) in enumerate([("8", -3.0), ("8", -3.0), ("7", -0.1)])
    ]
    rows.append(solution("b", "8"))  # whatever it was that made it say so
    (read,) = read_runs([write_run(tmp_path / "run", problems, rows, weighting="confidence")])
    going_on, settled = read.results
    assert [(vote.answer, vote.count) for vote in going_on.votes] == [("7", 1), ("8", 2)]
    assert [(vote.answer, vote.count) for vote in settled.votes] == [("8", 2), ("7", 1)]
    assert (settled.answer, settled.correct) == ("8", False)
    assert [sample.vote for sample in settled.samples] == [0, 0, 1]


def test_older_journals_do_not_say_how_many_samples_were_cancelled(tmp_path: Path) -> None:
    problems = [{"id": name, "problem": "x"} for name in "abc"]
    rows = [attempt("a", 0, "7"), solution("a", "7"), solution("b", None, error="too long"), attempt("c", 0, "7")]
    (read,) = read_runs([write_run(tmp_path / "run", problems, rows, samples=4)])
    assert [result.cancelled for result in read.results] == [3, 0, 0]


def test_answers_that_are_equal_are_one_vote_and_a_default_answer_is_no_vote(tmp_path: Path) -> None:
    problems = [{"id": "a", "problem": "x", "answer": "1/2"}, {"id": "b", "problem": "x", "answer": "0"}]
    problems.append({"id": "c", "problem": "x", "answer": "1"})
    rows = [
        attempt("a", 0, "0.5", 10),
        attempt("a", 1, "\\frac{1}{2}", 20),
        attempt("a", 2, "3", 5),
        solution("a", "1/2"),
        attempt("b", 0, None),
        solution("b", "0"),
        attempt("c", 0, None),
        solution("c", "0"),
    ]
    (read,) = read_runs([write_run(tmp_path / "run", problems, rows, default_answer="0")])
    first, second, third = read.results
    assert [(vote.answer, vote.count, vote.correct) for vote in first.votes] == [("0.5", 2, True), ("3", 1, False)]
    assert [sample.correct for sample in first.samples] == [True, True, False]
    assert (second.answer, second.correct, second.defaulted) == ("0", True, True)
    assert (third.answer, third.correct, third.defaulted) == ("0", False, True)
    assert (figures_of(read).answered, figures_of(read).defaulted) == (1, 2)


def test_a_summary_that_says_something_else_is_told(solved: Path) -> None:
    (solved / "summary.json").write_text('{"accuracy": 0.123}')
    (read,) = read_runs([solved])
    assert "summary.json says accuracy 12.3%" in read.notices[0]


def test_what_is_no_run_is_refused_all_at_once(solved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_runs([solved, tmp_path / "missing", tmp_path / "engine"])
    assert len(caught.value.offenders) == 2
    with pytest.raises(InputError) as caught:
        read_runs([solved.parent])
    assert caught.value.offenders == (f"{solved.parent}: no run.json in it; runs in it: run",)
    with pytest.raises(UsageError, match="twice"):
        read_runs([solved, solved.parent / "run" / ".." / "run"])


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", [{"id": "a", "problem": "x"}], []) for name in ("one", "two")]
    assert [read.label for read in read_runs(runs)] == ["one/run", "two/run"]
