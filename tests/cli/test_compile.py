"""From a checkpoint to voted answers through TensorRT-LLM's double, as a user runs it, against the torch backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trtllm_double.install import forget_double, install_double
from tests.trtllm_double.model import save_head, save_model
from trtkit.cli.app import run

PROBLEMS = [
    {"id": "1", "problem": "What is 2 + 3?", "answer": "5"},
    {"id": "2", "problem": "What is 7 - 4?", "answer": "3"},
]
SMALL = ["--max-total-tokens", "512", "--batch", "8"]
FEW = ["--calibration-rows", "8", *SMALL]
GPU = ["--backend", "tensorrt-llm", "--gpu", "l4x2"]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install_double(monkeypatch, tmp_path / "dist")
    yield
    forget_double()


def last(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    """The ``next:`` line and the JSON document."""
    lines = capsys.readouterr().out.splitlines()
    return lines[-2], json.loads(lines[-1])


def answers(directory: Path) -> list[tuple[object, ...]]:
    """(problem, index, variant, tokens, text) of every sample."""
    rows = [json.loads(line) for line in (directory / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    fields = ("problem", "index", "variant", "tokens", "text")
    return sorted(tuple(row[name] for name in fields) for row in rows if row["kind"] == "attempt")


def test_build_compile_solve(host: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In int8: an fp8 bundle's input scales are rounded, and its tokens another's where two are nearly as likely."""
    bundle, engine, torch = (str(tmp_path / name) for name in ("bundle", "engine", "torch"))
    quiet = ["--quiet"]
    assert run([*quiet, "build", "-p", "int8", *GPU, *FEW, "--prepare-only", "--out", bundle, "--json"]) == 0
    step, document = last(capsys)
    assert step == f"next: copy {bundle} to the GPU host, then: trtkit compile bundle"
    assert document["bundle_dir"] == bundle
    assert run([*quiet, "compile", bundle, "--out", engine, "--json"]) == 0
    step, document = last(capsys)
    assert step == f"next: trtkit solve problems.jsonl --engine {engine}"
    assert (document["backend"], document["engine_dir"]) == ("tensorrt-llm", engine)
    assert document["quality"] is not None
    for directory in (bundle, engine):
        assert run([*quiet, "inspect", directory, "--verify", "--json"]) == 0
        assert last(capsys)[1]["verified"] is True
    assert run([*quiet, "build", "-p", "int8", *FEW, "--out", torch]) == 0
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS), encoding="utf-8")
    capsys.readouterr()
    runs = []
    for directory in (engine, torch):
        out = tmp_path / f"run-{Path(directory).name}"
        asked = ["--samples", "2", "--max-tokens", "120", "--temperature", "0", "--full-vote", "--save-text"]
        assert run([*quiet, "solve", str(problems), "--engine", directory, *asked, "--out", str(out)]) == 0
        runs.append(answers(out))
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4


def test_print_command_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    assert run(["build", "-p", "fp8", *GPU, "--print-command", "--out", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"trtllm-build --checkpoint_dir {out}/checkpoint --output_dir {out}/compiled ")
    assert "--gemm_plugin fp8" in line
    assert list(tmp_path.iterdir()) == []


def test_greedy_engines_are_told_from_others(host: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, head = save_model(tmp_path / "model"), save_head(tmp_path / "head")
    drafted = ["--model", str(model), "--drafter", str(head), "--tree", "1x2", *SMALL]
    engine = tmp_path / "engine"
    assert run(["--quiet", "build", "-p", "bf16", "--backend", "tensorrt-llm", "--gpu", "l4", "--greedy", *drafted,
                "--out", str(engine)]) == 0  # fmt: skip
    assert "temperature 0 only" in capsys.readouterr().out
    problems = tmp_path / "p.jsonl"
    problems.write_text(json.dumps(PROBLEMS[0]) + "\n", encoding="utf-8")
    solve = ["solve", str(problems), "--engine", str(engine), "--max-tokens", "4", "--samples", "4"]
    assert run([*solve, "--out", str(tmp_path / "run")]) == 2
    assert "--temperature 0 --top-p 1 --top-k 0 --min-p 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    plain = ["--temperature", "0", "--top-p", "1", "--min-p", "0", "--save-text"]
    assert run([*solve, *plain, "--out", str(tmp_path / "run")]) == 0
    assert "note: this engine was built for temperature 0" in capsys.readouterr().err
    assert {row[1]: row[2] for row in answers(tmp_path / "run")} == {
        0: "solve",
        1: "reason",
        2: "system",
        3: "nemotron",
    }


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--prepare-only"], 2, "--prepare-only: only with --backend tensorrt-llm"),
        (["--greedy", "--workers", "2"], 2, "--greedy, --workers: only with"),
        (["--backend", "tensorrt-llm", "--prepare-only"], 1, "name it with --gpu"),
        (["--backend", "tensorrt-llm"], 1, "name it with --gpu"),
        ([*GPU], 1, "TensorRT-LLM is not installed"),
        (["--backend", "tensorrt-llm", "--gpu", "a100"], 1, "8.9"),
    ],
)
def test_refusals(options: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "-p", "fp8", *options, "--out", str(tmp_path / "out")]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compile_needs_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(tmp_path)]) == 1
    assert "--prepare-only" in capsys.readouterr().err
