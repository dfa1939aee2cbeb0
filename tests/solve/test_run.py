"""A run over a file of problems, from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.solve.scripted import answers, rows, run, say, write_problems
from trtkit.errors import EngineError, InputError
from trtkit.solve.answers import AnswerMode
from trtkit.solve.options import SolveOptions
from trtkit.solve.run import Places

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_run_from_end_to_end(places: Places) -> None:
    outcome = run(places)
    document = outcome.summary.document()
    assert list(document) == [
        "problems",
        "answered",
        "accuracy",
        "pass_at_1",
        "maj_at_k",
        "samples",
        "tokens",
        "tokens_per_second",
        "seconds",
        "stopped_early",
        "run_dir",
        "defaulted",
        "answers_per_problem",
        "forced",
        "looped",
        "settled",
        "cancelled",
        "out_of_time",
        "loading_seconds",
        "share_seconds",
        "time_limit",
        "engine",
    ]
    assert (document["problems"], document["samples"], document["run_dir"]) == (6, 9, str(places.out))
    assert json.loads((places.out / "summary.json").read_text()) == document
    solved = rows(places.out / "solutions.jsonl")
    assert [row["id"] for row in solved] == [f"p{n}" for n in range(6)]
    assert document["accuracy"] == round(sum(row["correct"] for row in solved) / 6, 6)
    assert document["answered"] == sum(row["answer"] is not None for row in solved)
    assert document["tokens"] == sum(row["tokens"] for row in solved) > 0
    about = json.loads((places.out / "run.json").read_text())
    assert about["arguments"]["samples"] == 9
    assert {"trtkit", "python", "torch"} <= set(about["versions"])
    assert len(about["problems"]["sha256"]) == 64


def test_bad_input_is_found_before_anything_is_opened_or_written(places: Places, tmp_path: Path) -> None:
    places.problems.write_text('{"id": "a", "problem": "x", "answer": "1/2"}\n')
    with pytest.raises(InputError, match="no integer"):
        run(places, SolveOptions(mode=AnswerMode(kind="integer", modulus=1000)))
    places.problems.write_text("{")
    with pytest.raises(InputError):
        run(places)
    write_problems(places.problems, 1)
    with pytest.raises(EngineError, match="not an engine directory"):
        run(Places(problems=places.problems, engine=tmp_path / "absent", out=places.out))
    assert not places.out.exists()


def test_solving_needs_no_torch() -> None:
    code = "import sys, trtkit.solve.run, trtkit.solve.display; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_golds_no_rates(places: Places) -> None:
    places.problems.write_text('{"id": "a", "problem": "x"}\n')
    document = run(places).summary.document()
    assert (document["accuracy"], document["pass_at_1"], document["maj_at_k"]) == (None, None, None)


def test_text_is_kept_only_when_asked(places: Places, tmp_path: Path) -> None:
    run(places)
    assert all("text" not in row for row in rows(places.out / "journal.jsonl"))
    other = Places(problems=places.problems, engine=places.engine, out=tmp_path / "texts")
    run(other, SolveOptions(samples=9, outstanding=20, stop=(), save_text=True))
    texts = [row["text"] for row in rows(other.out / "journal.jsonl") if row["kind"] == "attempt"]
    assert texts
    assert all(text.startswith("thinking ") for text in texts)
    assert answers(other) == answers(places)


def test_a_request_that_the_engine_refuses_is_journaled(places: Places) -> None:
    row = {"id": "long", "problem": "y" * 5000, "answer": "1"}
    with places.problems.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    outcome = run(places)
    assert outcome.verdicts[-1].solution.error is not None
    assert outcome.verdicts[-1].correct is False
    assert rows(places.out / "solutions.jsonl")[-1]["error"] == outcome.verdicts[-1].solution.error
    assert outcome.summary.answered < 7
    assert say  # the scripted samples of the others are unaffected
