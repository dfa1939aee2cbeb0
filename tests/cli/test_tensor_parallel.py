"""Engines over several GPUs from the command line: who is told, what is recorded, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.tiny import save_tiny
from trtkit.bench import engines
from trtkit.bench.engines import BenchOptions, measure
from trtkit.bench.machine import Machine
from trtkit.cli.app import run
from trtkit.errors import EngineError
from trtkit.recipe import read_manifest
from trtkit.runtime import load
from trtkit.runtime.load import OpenOptions
from trtkit.runtime.ranks.group import ProcessRanks


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine_dir(tmp_path_factory.mktemp("built") / "engine")
    save_chat_files(directory)
    return directory


@pytest.mark.parametrize("verb", ["solve", "serve", "bench", "bench --profile"])
def test_every_verb_that_opens_engines_passes_it_on(
    verb: str, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def noted(_directory: Path, options: OpenOptions) -> Any:
        asked.append(options)
        raise EngineError("enough")

    for room in ("runtime.load", "bench.engines", "bench.profile"):
        monkeypatch.setattr(f"trtkit.{room}.open_engine", noted)
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"id": "1", "problem": "What is 2 + 3?"}\n', encoding="utf-8")
    arguments = {
        "solve": ["solve", str(problems), "--engine", str(engine), "--out", str(tmp_path / "run")],
        "serve": ["serve", str(engine), "--port", "0"],
        "bench": ["bench", "--engine", str(engine), "--batch", "1"],
        "bench --profile": ["bench", "--engine", str(engine), "--profile"],
    }[verb]
    assert run([*arguments, "--device", "cpu", "--tp", "2"]) == 1
    assert "enough" in capsys.readouterr().err
    assert [options.tensor_parallel for options in asked] == [2]


def test_an_engine_built_for_several_gpus_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = save_tiny(tmp_path / "model"), tmp_path / "engine"
    save_chat_files(model)
    build = ["--quiet", "build", "-p", "int8", "--model", str(model), "--out", str(out), "--gpu"]
    assert run([*build, "l4x3"]) == 1
    said = capsys.readouterr().err
    assert "cannot be shared out over 3 GPUs" in said
    assert "4 attention heads" in said
    assert not out.exists()
    assert run([*build, "l4x2"]) == 0
    assert read_manifest(out).recipe.tensor_parallel == 2
    assert run(["inspect", str(out)]) == 0
    assert "tensor parallel 2" in capsys.readouterr().out
    opened = []
    monkeypatch.setattr(load, "RankedEngine", lambda size, device, *_: opened.append((size, device)))
    monkeypatch.setattr(load, "device_named", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    load.open_engine(out)
    assert opened == [(2, "cuda")]


def test_a_rank_on_a_cpu_takes_its_share_of_the_cores(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(load, "_open_torch", lambda *arguments: threads.append(arguments[2].threads))
    first = ProcessRanks(rank=0, size=2, instructed=int)
    monkeypatch.setattr(load, "RankedEngine", lambda _size, _device, open_own: open_own(first))
    load.open_engine(engine, OpenOptions(device="cpu", tensor_parallel=2))
    load.open_engine(engine, OpenOptions(device="cpu", tensor_parallel=2, threads=3))
    assert threads == [4, 3]
    assert BenchOptions(tensor_parallel=4).threads_of_each == 2


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 2)])
def test_gpus_together_read_as_fast_as_all_of_them(
    device: str, times: int, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on one CPU share its memory."""
    machine = Machine(
        device="x", cores=1, threads=1, python="", torch="", read_bytes_per_second=1e9, copy_bytes_per_second=1e9,
        load_average=0.0, busy=False,
    )  # fmt: skip
    open_engine = engines.open_engine
    monkeypatch.setattr(engines, "measure_machine", lambda _: machine)
    monkeypatch.setattr(engines, "device_named", lambda _: torch.device(device))
    monkeypatch.setattr(engines, "open_engine", lambda place, _: open_engine(place, OpenOptions(device="cpu")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = BenchOptions(batches=(1,), prompt_tokens=8, new_tokens=4, repeats=1, tensor_parallel=2)
    (point,) = measure([engine], options).points
    assert point.tensor_parallel == 2
    assert point.ceiling_tokens_per_second == pytest.approx(times * 1e9 / point.step_bytes)
