"""Trainings that are interrupted, begun twice or refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_files import save_problems
from tests.tiny import save_tiny
from tests.training.small import small_training
from trtkit.describe import describe
from trtkit.errors import CheckpointError, InputError, OutputError, UsageError
from trtkit.training import answers, run, work

CPU = torch.device("cpu")


def test_an_interrupted_training_keeps_the_answers_and_ends_in_the_same_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, plan = small_training(tmp_path, 12, max_tokens=120, trees=())
    assert run.train_head(plan, tmp_path / "whole", device=CPU) is not None

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.train_head(plan, tmp_path / "out", device=CPU)
    rows.unlink()
    monkeypatch.setattr(work, "own_answers", interrupted)
    assert run.train_head(plan, tmp_path / "out", device=CPU) is not None
    whole, again = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == again.read_bytes()
    assert oct(again.stat().st_mode)[-3:] == "644"


def test_two_processes_do_not_train_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())

    def meanwhile(*_: Any, **__: Any) -> None:
        with pytest.raises(OutputError, match="this training is being worked on already"):
            run.train_head(plan, tmp_path / "out", device=CPU)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", meanwhile)
        with pytest.raises(KeyboardInterrupt):
            run.train_head(plan, tmp_path / "out", device=CPU)
    assert run.train_head(plan, tmp_path / "out", device=CPU) is not None, "the lock went with its holder"


def test_kept_answers_are_not_mixed_with_those_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = small_training(tmp_path, 12, max_tokens=120, trees=())
    with monkeypatch.context() as patch:
        patch.setattr(answers.KeptAnswers, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train_head(plan, tmp_path / "out", device=CPU)
    save_tiny(tmp_path / "model", seed=1, max_position_embeddings=160)
    with pytest.raises(UsageError, match="for something else") as refused:
        run.train_head(plan, tmp_path / "out", device=CPU)
    assert "checkpoint_sha256" in refused.value.offenders[0]


def test_a_start_that_failed_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    few = save_problems(tmp_path / "few.jsonl", 1)
    with pytest.raises(InputError, match="would be held out") as refused:
        run.train_head(dataclasses.replace(plan, data=str(few)), tmp_path / "out", device=CPU)
    assert refused.value.where == str(few)
    assert not (tmp_path / "out").exists(), "before the model writes its answers"
    for own in (False, True):
        with pytest.raises(InputError, match=r"no problem.* room for an answer in 40 tokens"):
            run.train_head(dataclasses.replace(plan, own=own, max_tokens=40), tmp_path / "out", device=CPU)
    with monkeypatch.context() as patch:
        patch.setattr(run, "read_samples", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run.train_head(dataclasses.replace(plan, exit_dim=10**6), tmp_path / "out", device=CPU)
    assert run.train_head(plan, tmp_path / "out", device=CPU) is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_and_leaves_what_was_saved(tmp_path: Path) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    place = tmp_path / "out" / "work"
    place.mkdir(parents=True)
    (place / "state.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot be saved: No space left on device") as refused:
        run.train_head(plan, tmp_path / "out", device=CPU)
    assert refused.value.where == str(place)
    assert not list(place.glob("state.pt*")), "half a state takes room that is needed"
    assert run.train_head(plan, tmp_path / "out", device=CPU) is not None


def test_damaged_files_of_a_training_are_named_and_may_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "hits_by_depth", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train_head(plan, out, device=CPU)
    for name, error in (("state.pt", CheckpointError), ("samples.jsonl", InputError)):
        path = out / "work" / name
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(error, match=rf"{name}.* cannot be read") as refused:
            run.train_head(plan, out, device=CPU)
        assert "delete" in (refused.value.hint or "")
        if name == "state.pt":
            with pytest.raises(error, match="cannot be read"):
                describe(out)
        path.unlink()
    assert run.train_head(plan, out, device=CPU) is not None


@pytest.mark.parametrize("left", [None, "", "[1]\n"])
def test_a_head_is_published_without_the_reports_of_its_training(tmp_path: Path, left: str | None) -> None:
    """Deleted or damaged since; what is published already stays."""
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    out = tmp_path / "out"
    first = run.train_head(plan, out, device=CPU)
    reports, path = (out / "metrics.jsonl").read_text(), out / "work" / "metrics.jsonl"
    if left is None:
        path.unlink()
    else:
        path.write_text(left)
    assert run.train_head(plan, out, device=CPU) == first
    assert (out / "metrics.jsonl").read_text() == reports


def test_another_training_may_take_the_texts_along(tmp_path: Path) -> None:
    rows, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    assert run.train_head(plan, tmp_path / "out", device=CPU) is not None
    rows.unlink()
    samples = Path("work/samples.jsonl")
    for changes, kept in (({"rate": 0.01}, True), ({"seed": 1}, False)):
        with pytest.raises(UsageError, match="another training") as refused:
            run.train_head(dataclasses.replace(plan, **changes), tmp_path / "out", device=CPU)
        assert (f"a copy of {tmp_path / 'out' / samples}" in (refused.value.hint or "")) is kept
    (tmp_path / "other" / "work").mkdir(parents=True)
    shutil.copy(tmp_path / "out" / samples, tmp_path / "other" / samples)
    assert run.train_head(dataclasses.replace(plan, rate=0.01), tmp_path / "other", device=CPU) is not None


def test_a_directory_of_something_else_is_not_trained_into(tmp_path: Path) -> None:
    """The checkpoint itself, say: the finished head's files have the same names."""
    _, plan = small_training(tmp_path, 12, own=False, max_tokens=120, trees=())
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(OutputError, match=r"holds something else.* config\.json") as refused:
        run.train_head(plan, tmp_path / "model", device=CPU)
    assert refused.value.where == str(tmp_path / "model")
    with pytest.raises(OutputError, match="is a file"):
        run.train_head(plan, tmp_path / "rows.jsonl", device=CPU)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_head_is_not_measured_on_what_the_first_one_was_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, plan = small_training(tmp_path, 24, own=False, max_tokens=120, trees=())
    head = tmp_path / "head"
    assert run.train_head(plan, head, device=CPU) is not None
    more = dataclasses.replace(plan, start_from=str(head), epochs=0.1)
    with pytest.raises(UsageError, match=r"50% of the problems .* all but 30%") as refused:
        run.train_head(dataclasses.replace(more, held_out=0.5), tmp_path / "larger", device=CPU)
    assert refused.value.where == str(head)
    assert run.train_head(dataclasses.replace(more, held_out=0.3), tmp_path / "same", device=CPU) is not None
    assert "was trained on" not in caplog.text
    (head / "training.json").unlink()
    assert run.train_head(more, tmp_path / "unknown", device=CPU) is not None
    assert "does not say what it was trained on" in caplog.text
