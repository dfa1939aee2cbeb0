from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines import tiny_engine_dir
from tests.tiny import save_tiny
from trtkit.bench import machine as bench_module
from trtkit.bench.engines import BenchOptions, BenchResult, Point
from trtkit.bench.machine import Machine
from trtkit.cli.app import run
from trtkit.cli.engines import chosen_engine
from trtkit.doctor import Diagnosis
from trtkit.errors import EngineError


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path)
    assert run(["inspect", str(tmp_path), "--verify", "--json"]) == 0
    assert last_json(capsys)["verified"] is True


def test_inspect_of_damaged_weights_fails_and_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert run(["inspect", str(tmp_path), "--verify", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["verified"] is False
    assert "model.safetensors" in captured.err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["doctor", "--json"])
    document = last_json(capsys)
    assert code == (0 if document["healthy"] else 1)


def test_bench_ends_with_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "_BUFFER_BYTES", 1 << 20)
    engine = str(tiny_engine_dir(tmp_path))
    sizes = ["--batch", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--device", "cpu"]
    assert run(["bench", "--engine", engine, *sizes]) == 0
    document = last_json(capsys)
    assert document.keys() == {"machine", "points"}


def test_the_latest_engine_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="no engine was built"):
        chosen_engine(None)
    for age, name in ((200, "a"), (100, "b"), (300, "c")):
        manifest = tmp_path / "engines" / "built" / name / "engine.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}", encoding="utf-8")
        os.utime(manifest, (1e9 - age, 1e9 - age))
    assert chosen_engine(None).name == "b"
    assert chosen_engine(Path("x")) == Path("x")


@pytest.mark.parametrize(
    ("options", "drafting", "next_line"),
    [
        (["--drafter", "some head"], 9.0, "solve problems.jsonl --engine E --drafter 'some head'"),
        (["--drafter", "some head", "--lookup", "--problems", "p.jsonl", "--tree", "2x3"], 9.0,
         "solve problems.jsonl --engine E --drafter 'some head' --lookup --tree 2x3"),
        (["--lookup", "--problems", "p.jsonl"], 0.5, "solve problems.jsonl --engine E"),
        (["--drafter", "some head"], 0.5, "solve problems.jsonl --engine E"),
        (["--tree", "2x3"], 9.0, "solve problems.jsonl --engine E --tree 2x3"),
        (["--output-layer", "int8"], 0.5, "solve problems.jsonl --engine E --output-layer int8"),
        (["--tp", "2"], 0.5, "solve problems.jsonl --engine E --tp 2"),
    ],
)  # fmt: skip
def test_the_next_line_of_bench_runs_what_was_fastest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str],
    drafting: float, next_line: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny_engine_dir(Path("E"), recipe={"output_layer": "model"})

    def measured(engines: Sequence[Path], asked: BenchOptions) -> BenchResult:
        machine = Machine(device="cpu", cores=1, threads=1, python="3", torch="2", read_bytes_per_second=1.0,
                          copy_bytes_per_second=1.0, load_average=0.0, busy=False)  # fmt: skip
        plain = Point(
            engine=str(engines[0]), precision="bf16", output_layer=asked.output_layer or "model", drafter=None, batch=1,
            tensor_parallel=asked.tensor_parallel or 1, tokens_per_second=1.0, prefill_tokens_per_second=1.0,
            tokens_per_step=1.0, accepted_by_depth=(),
            phase_seconds={}, speedup=None, step_bytes=1.0, ceiling_tokens_per_second=2.0, roofline_fraction=0.5,
        )  # fmt: skip
        drafts = replace(plain, drafter=str(asked.tree or "auto"), tokens_per_second=drafting, speedup=drafting)
        return BenchResult(machine=machine, points=(plain, drafts))

    monkeypatch.setattr("trtkit.bench.engines.measure", measured)
    assert run(["bench", "--engine", "E", *options]) == 0
    said = capsys.readouterr().out
    assert f"next: trtkit {next_line}\n" in said
    assert ("batch  tp  bytes/step" in said) == ("--tp" in options)


@pytest.mark.parametrize("named", ["--drafter", "--problems"])
@pytest.mark.parametrize("kind", ["suite", "engine"])
def test_bench_looks_at_its_files_before_it_builds_or_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: str, kind: str
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("began before it had looked")

    monkeypatch.setattr("trtkit.bench.suite.build_native", started)
    monkeypatch.setattr("trtkit.bench.engines.measure_machine", started)
    what = (
        ["--suite", "--out", str(tmp_path / "s")] if kind == "suite" else ["--engine", str(tiny_engine_dir(tmp_path))]
    )
    assert run(["bench", *what, named, str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_doctor_suggests_the_default_build_only_where_it_is_not_made_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trtkit.doctor.examine", lambda _: Diagnosis(checks=(), precisions=()))  # fit, wherever it runs
    monkeypatch.chdir(tmp_path)
    steps = []
    for _ in range(2):
        assert run(["doctor"]) == 0
        steps.append(capsys.readouterr().out.splitlines()[-1])
        (tmp_path / "engines" / "built" / "practice-fp8").mkdir(parents=True, exist_ok=True)
    assert steps == [
        "next: trtkit build --precision fp8",
        "next: trtkit solve problems.jsonl --engine engines/built/practice-fp8",
    ]


@pytest.mark.parametrize("beside", [False, True])
def test_the_build_of_a_checkpoint_says_that_it_needs_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: bool
) -> None:
    directory = save_tiny(tmp_path / "model")
    if beside:
        (directory / "calibration.jsonl").touch()
    assert run(["inspect", str(directory)]) == 0
    line = f"next: trtkit build --precision fp8 --model {directory}"
    assert capsys.readouterr().out.splitlines()[-1] == line + ("" if beside else " --calibration FILE.jsonl")
    assert run(["inspect", "practice"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: trtkit build --precision fp8 --model practice"
