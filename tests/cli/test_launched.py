"""One voice for the processes that torchrun starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trtkit.cli import app as module
from trtkit.cli import launched
from trtkit.cli.app import run
from trtkit.log import logger

WRONG = ["plan", "--gpu", "l44"]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the command sleeps, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(launched.time, "sleep", slept.append)
    return slept


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, local: int, world: int = 4) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", world), ("TORCHELASTIC_RUN_ID", "r")):
        monkeypatch.setenv(name, str(value))


def test_the_first_process_of_a_machine_speaks_at_once(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, rank=2, local=0)
    assert run(WRONG) == 2
    assert capsys.readouterr().err.startswith("error: unknown GPU 'l44'")
    assert pauses == []


def test_another_process_speaks_when_the_first_stays_silent(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, rank=3, local=1)
    assert run(WRONG) == 2
    assert capsys.readouterr().err.startswith("error: process 3: unknown GPU 'l44'")
    assert len(pauses) == 1
    assert pauses[0] >= 10


@pytest.mark.parametrize("without", ["TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_process_that_torchrun_did_not_start_beside_others_speaks_at_once(
    without: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, rank=1, local=1)
    monkeypatch.delenv(without)
    assert run(WRONG) == 2
    assert capsys.readouterr().err.startswith("error: unknown GPU")
    assert pauses == []


@pytest.mark.parametrize("local", [0, 1])
def test_an_interruption_is_told_once_and_at_once(
    local: int, pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    launch(monkeypatch, rank=local, local=local)
    monkeypatch.setattr(module, "app", interrupted)
    assert run(["train-drafter"]) == 130
    assert ("interrupted" in capsys.readouterr().err) == (local == 0)
    assert pauses == []


@pytest.mark.parametrize(
    ("local", "options", "heard"), [(0, [], True), (1, [], False), (1, ["--verbose"], True), (1, ["--debug"], True)]
)
def test_the_log_is_the_first_process_s(
    local: int, options: list[str], heard: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, rank=local, local=local)
    assert run(["plan", "--gpu", "l4", *options]) == 0
    logger.warning("a note")
    assert ("a note" in capsys.readouterr().err) == heard


def test_under_torchrun_a_refusal_is_printed_once() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "trtkit.cli", "train-drafter", "--parts", "2", "--loss", "foo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("unknown --loss 'foo'") == 1, done.stderr
    assert done.stderr.count("hint:") == 1
    assert "exitcode  : 2" in done.stderr
