"""``trtkit train-difficulty`` as a user runs it: on a run of ``solve``, on its journal, on a file of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.solve.scripted import CHAT, write_engine
from tests.tiny_modernbert import practice_texts, save_tiny_modernbert, tokens_needed
from trtkit.cli.app import run
from trtkit.difficulty import Labelled
from trtkit.errors import InputError
from trtkit.log import logger
from trtkit.runtime.api import Request
from trtkit.solve.difficulty import labels_of_run, predict_tokens
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.run import Places, run_solve


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_modernbert(tmp_path_factory.mktemp("base"))


def _write(path: Path, count: int) -> Path:
    rows = ({"id": f"p{i}", "problem": text} for i, text in enumerate(practice_texts()[:count]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _samples(request: Request) -> Sequence[int]:
    """A sample as long as its problem asks for, a few tokens more or less by its seed."""
    _, _, text = bytes(request.prompt).decode().partition("|")
    return [*b"x" * (int(tokens_needed(text)) + request.seed % 5 - 2), *CHAT.think_end]


def _run(root: Path, count: int, *, full_vote: bool = True) -> Path:
    places = Places(
        problems=_write(root / "problems.jsonl", count), engine=write_engine(root / "engine"), out=root / "run"
    )
    options = SolveOptions(samples=2, full_vote=full_vote, outstanding=2000)
    run_solve(places, lambda: FakeEngine(_samples, rows=2000, burst=4096), CHAT, options)
    return places.out


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("solved"), 328)


def test_labels_are_the_mean_tokens_of_a_problems_samples(run_dir: Path) -> None:
    labels = labels_of_run(run_dir)
    assert len(labels) == 328
    for label in labels:
        assert label.samples == 2
        assert abs(label.tokens - tokens_needed(label.problem) - 1) <= 2
    assert labels_of_run(run_dir / "journal.jsonl") == labels


def test_samples_that_the_clock_cut_off_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    journal = _run(tmp_path, 8) / "journal.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    before = {label.problem: label for label in labels_of_run(journal)}
    assert "time limit" not in caplog.text
    attempts = [row for row in rows if row["kind"] == "attempt"]
    for row in attempts:
        if row["problem"] == "p0" or (row["problem"], row["index"]) == ("p1", 0):
            row |= {"ending": "deadline", "tokens": 1}
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {problem.id: problem.text for problem in read_problems(tmp_path / "problems.jsonl")}
    after = {label.problem: label for label in labels_of_run(journal)}
    assert "3 sample(s) that the time limit cut off are left out" in caplog.text
    assert before.keys() - after.keys() == {texts["p0"]}
    [whole] = [row["tokens"] for row in attempts if row["problem"] == "p1" and row["index"] == 1]
    assert after.pop(texts["p1"]) == Labelled(problem=texts["p1"], tokens=whole)
    assert all(label == before[text] for text, label in after.items())


def test_from_a_run_to_expected_tokens(
    base: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "difficulty"
    arguments = ["train-difficulty", "--data", str(run_dir), "--model", str(base), "--out", str(out), "--json"]
    assert run([*arguments, "--epochs", "8", "--rate", "1e-3", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "train: 72 updates in" in shown.err
    lines = shown.out.splitlines()
    assert lines[-2] == f"next: trtkit solve problems.jsonl --time-limit 5h --difficulty {out}"
    assert run(["inspect", str(out)]) == 0
    inspected = capsys.readouterr().out.splitlines()
    assert inspected[0] == f"{out}: difficulty regressor"
    assert inspected[-1] == lines[-2], "what inspect suggests"
    document = json.loads(lines[-1])
    assert list(document) == ["difficulty_dir", "usable", "problems", "samples", "updates", "held_out"]
    assert (document["usable"], document["problems"], document["samples"]) == (True, 328, 656)
    assert document["held_out"]["error"] < document["held_out"]["error_of_mean"]
    hard, easy = "Compute gcd(987654,123456).", "Find x if 2x+3=9."
    guesses = predict_tokens(out, [Problem(id="h", text=hard), Problem(id="e", text=easy)])
    assert guesses["h"] > 1.5 * guesses["e"]
    assert 0.5 < guesses["e"] / tokens_needed(easy) < 2
    told = out / "difficulty.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "usable": False}))
    assert run(["inspect", str(out)]) == 0
    assert "`trtkit solve` refuses this one" in capsys.readouterr().out.splitlines()[-1]


def test_a_useless_one_says_so(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    data = [{"problem": text, "tokens": 100 + 37 * (i % 2)} for i, text in enumerate(practice_texts()[:64])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    arguments = ["train-difficulty", "--data", str(rows), "--model", str(base), "--out", str(tmp_path / "d"), "--json"]
    assert run([*arguments, "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "no better than the mean" in lines[-3]
    assert "--difficulty" not in lines[-2]
    assert json.loads(lines[-1])["usable"] is False


def test_a_run_whose_problems_are_gone_or_changed(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    out = _run(tmp_path, 8, full_vote=False)
    problems = tmp_path / "problems.jsonl"
    assert len(labels_of_run(out)) == len(read_problems(problems))
    assert "runs with --full-vote teach better" in caplog.text
    problems.rename(out / "problems.jsonl")  # beside the run is found as well
    assert len(labels_of_run(out)) == 8
    _write(out / "problems.jsonl", 7)
    with pytest.raises(InputError, match="changed since the run"):
        labels_of_run(out)
    (out / "problems.jsonl").unlink()
    with pytest.raises(InputError, match="not found"):
        labels_of_run(out)
    assert run(["--quiet", "train-difficulty", "--data", str(tmp_path), "--model", str(base)]) == 1
    assert "not a run directory" in capsys.readouterr().err


def test_the_default_model_needs_the_hub(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(["--quiet", "train-difficulty", "--data", str(run_dir), "--out", str(tmp_path / "d")]) == 1
    said = capsys.readouterr().err
    assert "ModernBERT-base" in said
    assert "practice" not in said  # the bundled checkpoint is no ModernBERT
    assert "--model DIR" in said
