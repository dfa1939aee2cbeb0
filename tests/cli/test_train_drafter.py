"""``trtkit train-drafter`` and what the other verbs say of its directory."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import tiny_engine_dir
from tests.training.small import small_training
from trtkit.cli import train_drafter
from trtkit.cli.app import run
from trtkit.files import write_json
from trtkit.training import answers
from trtkit.training import run as training
from trtkit.training.plan import TrainingPlan


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _command(tmp_path: Path, out: str = "my head") -> list[str]:
    rows, plan = small_training(tmp_path, 60)
    sizes = ["--exit-dim", "8", "--layers", "0", "--depths", "2", "--max-tokens", "140", "--batch-tokens", "1600"]
    return ["-q", "train-drafter", "--model", plan.model, "--problems", str(rows), *sizes, "--out", out]


def _inspected(out: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str], dict[str, Any]]:
    """(all that is shown, the words of the ``next:`` line, the JSON document)."""
    capsys.readouterr()
    assert run(["inspect", out, "--json"]) == 0
    *shown, line, document = capsys.readouterr().out.splitlines()
    return "\n".join(shown), shlex.split(line.removeprefix("next: trtkit ")), json.loads(document)


def test_an_unfinished_training_is_named_and_its_next_line_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_measured", lambda *_: ())
    command, add = _command(tmp_path), answers.KeptAnswers.add

    def one_only(self: answers.KeptAnswers, ended: dict[int, list[int]]) -> None:
        add(self, dict(list(ended.items())[:1]))
        if ended:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers.KeptAnswers, "add", one_only)
        assert run(command) == 130
    shown, words, document = _inspected("my head", capsys)
    assert "unfinished training of a draft head" in shown
    assert "1 of 60 of the model's own answers are there" in shown
    assert (document["training"]["stage"], document["training"]["done"]) == ("answers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", _interrupted)
        assert run(["-q", *words]) == 130, capsys.readouterr().err
    assert "no update is saved yet" in _inspected("my head", capsys)[0]
    with monkeypatch.context() as patch:
        patch.setattr(training, "hits_by_depth", _interrupted)
        assert run(["-q", *words]) == 130
    assert "what is left is to measure" in _inspected("my head", capsys)[0]
    assert run(["build", "--model", str(tmp_path / "model"), "--drafter", "my head", "--out", "engine"]) == 1
    assert "trtkit inspect" in capsys.readouterr().err
    assert run(["inspect", "my head", "--verify"]) == 2
    assert run(["-q", *words]) == 0
    assert run(["inspect", "my head"]) == 0
    assert "ReDrafter head" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data", "rows of mine.jsonl", "--no-rnn", "--loss", "kd", "--rate", "0.01", "--epochs", "2.5"],
        ["--problems", "openmathreasoning", "--split", "tir", "--rows", "9", "--seed", "3", "--parts", "2"],
        ["--model", "owner/name", "--problems", "p.csv", "--start-from", "first head", "--depths", "5"],
        ["--exit-dim", "64", "--layers", "1", "--batch-tokens", "99", "--window", "64", "--max-tokens", "77"],
    ],
)  # fmt: skip
def test_the_next_line_of_an_unfinished_training_asks_for_the_same(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plans: list[TrainingPlan] = []
    monkeypatch.setattr(training, "train_head", lambda plan, *_, **__: plans.append(plan))
    assert run(["train-drafter", *options]) == 0
    write_json(Path("out/work/plan.json"), asdict(plans[0]))
    _, words, _ = _inspected("out", capsys)
    assert run(words) == 0
    assert plans[1] == plans[0]
    assert words[-2:] == ["--out", "out"]


def test_a_training_from_python_is_not_given_the_command_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    monkeypatch.setattr(training, "train", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train_head(plan, tmp_path / "out", device=torch.device("cpu"))
    assert run(["inspect", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("no option for held_out, trees")


def test_a_head_is_named_as_engines_of_its_model_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "My Model").mkdir()
    monkeypatch.chdir(tmp_path / "My Model")
    places: list[Path] = []
    monkeypatch.setattr(training, "train_head", lambda plan, target, **_: places.append(target))
    assert run(["train-drafter", "--model", ".", "--problems", "p.jsonl"]) == 0
    assert places == [Path("engines/built/my-model-drafter")]


def test_the_next_line_builds_from_the_checkpoint_of_an_engine(tmp_path: Path) -> None:
    engine = tiny_engine_dir(tmp_path / "engine")
    told = json.loads((engine / "engine.json").read_text())["recipe"]
    words = shlex.split(train_drafter._next_build(str(engine), tmp_path / "head"))
    named = ["--precision", told["precision"], "--model", told["model"], "--drafter", str(tmp_path / "head")]
    assert words[:8] == ["trtkit", "build", *named]
