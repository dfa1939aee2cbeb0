"""The two big verbs on the bundled practice checkpoint, as a user runs them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from trtkit.bundled import practice_dir
from trtkit.cli.app import run
from trtkit.cli.engines import stem
from trtkit.gpu import profile_named
from trtkit.training.run import HeadReport

PROBLEM = json.dumps({"id": "1", "problem": "What is 2 + 3?", "answer": "5"})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "engine"
    assert run(["--quiet", "build", "--precision", "int4", "--int4-method", "rtn", "--out", str(out)]) == 0
    return out


def solve(problems: Path, engine: Path, out: Path, *more: str) -> int:
    few = ["--samples", "2", "--max-tokens", "8", "--device", "cpu", "--out", str(out)]
    return run(["--quiet", "solve", str(problems), "--engine", str(engine), *few, *more])


def test_build_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    assert run(["--quiet", "build", "--precision", "int8", "--out", str(out), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"next: trtkit solve problems.jsonl --engine {out}"
    document = json.loads(lines[-1])
    assert document.keys() == {"engine_dir", "precision", "output_layer", "backend", "quality"}
    assert document["output_layer"] == "int8"
    assert document["engine_dir"] == str(out)
    assert run(["--quiet", "build", "--precision", "int8", "--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err


def test_a_run_goes_into_no_engine_and_no_file(
    tmp_path: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(PROBLEM)
    before = sorted(engine.iterdir())
    assert solve(problems, engine, engine) == 2
    assert "no place for a run" in capsys.readouterr().err
    assert sorted(engine.iterdir()) == before
    assert solve(problems, engine, problems) == 1
    assert "is a file, not a directory" in capsys.readouterr().err
    assert problems.read_text() == PROBLEM


def test_force_replaces_engines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(practice_dir(), checkpoint)
    arguments = ["--quiet", "build", "--precision", "bf16", "--force", "--out"]
    assert run([*arguments, str(checkpoint), "--model", str(checkpoint)]) == 1
    assert "does not replace" in capsys.readouterr().err
    assert (checkpoint / "problems.jsonl").is_file()
    for _ in range(2):
        assert run([*arguments, str(tmp_path / "engine")]) == 0
    journal = tmp_path / "engine" / "runs" / "a" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.touch()
    assert run([*arguments, str(tmp_path / "engine")]) == 1
    assert f"- {journal.parent}\n" in capsys.readouterr().err
    assert journal.is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("int8", 1e-6), ("int4", 2e-4)])
def test_an_int8_output_layer_costs_the_practice_model_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, limit: float
) -> None:
    kl = {}
    for head in ("model", "int8"):
        out = tmp_path / head
        assert run(["--quiet", "build", "-p", precision, "--output-layer", head, "--out", str(out), "--json"]) == 0
        quality = json.loads(capsys.readouterr().out.splitlines()[-1])["quality"]
        kl[head] = quality["kl_mean"]
        assert quality["top1_agreement"] > 0.999
    assert kl["int8"] != kl["model"], "the head was not measured"
    assert kl["int8"] < limit
    assert kl["int8"] < 1.2 * kl["model"] + 1e-7


def test_an_output_layer_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "engine")]
    assert run(["build", "-p", "int8", "--output-layer", "int9", *out]) == 2
    assert "--output-layer 'int9'; did you mean 'int8'?" in capsys.readouterr().err
    compiled = ["build", "-p", "int8", "--backend", "tensorrt-llm", "--gpu", "l4", "--print-command", *out]
    assert run([*compiled, "--output-layer", "int8"]) == 2
    assert "--output-layer int8: a compiled engine keeps lm_head in 16 bits" in capsys.readouterr().err
    assert run(compiled) == 0
    assert list(tmp_path.iterdir()) == []


def test_gpu_auto_is_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trtkit.cli.build.detect", lambda: profile_named("t4x3"))
    assert run(["build", "-p", "fp8", "--gpu", "auto", "--out", str(tmp_path / "engine")]) == 1
    assert "fp8 needs compute capability 8.9, 3x T4 has 7.5" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missed_gate_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine"
    assert (
        run(["--quiet", "build", "--precision", "int4", "--int4-method", "rtn", "--max-kl", "1e-9", "--out", str(out)])
        == 1
    )
    assert "exceeds --max-kl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_solve_json_and_resume(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, out = tmp_path / "p.jsonl", tmp_path / "run"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    assert solve(problems, engine, out, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert list(document) == [
        "problems", "answered", "accuracy", "pass_at_1", "maj_at_k", "samples", "tokens", "tokens_per_second",
        "seconds", "stopped_early", "run_dir", "defaulted", "answers_per_problem", "forced", "looped", "settled",
        "cancelled", "out_of_time", "loading_seconds", "share_seconds", "time_limit", "engine",
    ]  # fmt: skip
    assert lines[-2] == f"next: trtkit report {out}"
    assert {"run.json", "journal.jsonl", "solutions.jsonl", "summary.json"} <= {path.name for path in out.iterdir()}
    assert solve(problems, engine, out, "--json", "--verbose") == 0
    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1])["tokens"] == document["tokens"]
    assert "all 1 problem(s) were solved before" in again.err
    assert solve(problems, engine, out, "--seed", "5") == 2
    assert "different run" in capsys.readouterr().err
    assert solve(problems, engine, out, "--output-layer", "model") == 2
    assert 'arguments.output_layer: null in that run, "model" now' in capsys.readouterr().err


def test_solve_opens_the_engine_with_the_output_layer_asked_for(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtkit.runtime import load

    asked = []

    def noted(directory: Path, options: load.OpenOptions) -> Any:
        asked.append(options.output_layer)
        return open_engine(directory, options)

    open_engine = load.open_engine
    monkeypatch.setattr(load, "open_engine", noted)
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    assert solve(problems, engine, tmp_path / "a", "--output-layer", "model") == 0
    assert solve(problems, engine, tmp_path / "b") == 0
    assert solve(problems, engine, tmp_path / "c", "--output-layer", "int4") == 2
    assert asked == ["model", None]


def test_solve_drafts_as_it_is_told(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine without a head, with one that is named, from the text, and both."""
    from trtkit.runtime import load

    asked = []

    def noted(directory: Path, options: load.OpenOptions) -> Any:
        asked.append((options.drafter, options.lookup, options.tree))
        return open_engine(directory, options)

    open_engine = load.open_engine
    monkeypatch.setattr(load, "open_engine", noted)
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    head, tree = practice_dir() / "drafter", TreeShape(beams=2, length=2)
    lines = ["", "--lookup --tree 2x2", "--drafter practice --tree 2x2", "--drafter practice --lookup --tree 2x2"]
    drafted = []
    for number, line in enumerate(lines):
        assert solve(problems, engine, tmp_path / str(number), *line.split(), "--max-tokens", "48", "--json") == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        drafted.append(bool(summary["engine"]["accepted_by_depth"]))
    assert asked == [(None, False, None), (None, True, tree), (head, False, tree), (head, True, tree)]
    assert drafted == [False, True, True, True]
    assert solve(problems, engine, tmp_path / "none", "--drafter", str(tmp_path / "nowhere")) == 1
    assert "hint:  --drafter takes a directory of `trtkit train-drafter`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "p.jsonl"),
        (b'{"id": "1", "problem": "x"\n', "p.jsonl:1"),
        (b'{"id": "1", "problem": "x"}\n[1]\n', "p.jsonl:2"),
        (b'{"id": "1", "problem": "x"}\n{"id": "1", "problem": "y"}\n', "1"),
        (b'{"id": "1"}\n', "problem"),
        (b'{"id": "1", "problem": "\xff"}\n', "p.jsonl:1"),
    ],
)
def test_bad_problem_files(
    content: bytes, said: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, out = tmp_path / "p.jsonl", tmp_path / "run"
    problems.write_bytes(content)
    assert solve(problems, engine, out) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert said in err
    assert not out.exists()


def test_a_prompt_that_is_too_long_fails_alone(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, out = tmp_path / "p.jsonl", tmp_path / "run"
    long = json.dumps({"id": "long", "problem": "7 + " * 5000, "answer": "1"})
    problems.write_text(f"{long}\n{PROBLEM}\n", encoding="utf-8")
    assert solve(problems, engine, out, "--json") == 0
    rows = [json.loads(line) for line in (out / "solutions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["error"]
    assert rows[1]["error"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"] == 2


def test_not_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    assert solve(problems, tmp_path, tmp_path / "run") == 1
    assert "not an engine directory (no engine.json)\nhint:  build one" in capsys.readouterr().err
    assert solve(problems, problems, tmp_path / "run") == 1
    assert "not an engine directory (a file)" in capsys.readouterr().err
    assert solve(problems, practice_dir(), tmp_path / "run") == 1
    assert f"trtkit build --model {practice_dir()}\n" in capsys.readouterr().err
    assert solve(tmp_path / "missing.jsonl", practice_dir(), tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--stop", "agre(4)"], "agree"), (["--prompt", "slove"], "solve"), (["--order", "x"], "order"),
     (["--answer-mode", "x"], "answer mode"), (["--modulus", "1000"], "integer"),
     (["--policy", "competition"], "--time-limit"), (["--policy", "x", "--time-limit", "9s"], "competition"),
     (["--time-limit", ""], "--time-limit: '' is no duration"), (["--policy", ""], "competition"),
     (["--reserve", "", "--time-limit", "9s"], "--reserve: '' is no duration"), (["--switch-penalty", ""], "penalty"),
     (["--time-limit", "soon"], "duration"), (["--weights", "lenght"], "length"), (["--stop-at", "box"], "first-box"),
     (["--full-vote", "--time-limit", "9s"], "full vote"), (["--reserve", "9s"], "time limit"),
     (["--default-answer", "x", "--answer-mode", "integer"], "default answer"),
     (["--temperature", "-1"], "temperature"), (["--top-p", "2"], "top-p"), (["--samples", "0"], "samples")],
)  # fmt: skip
def test_options_that_make_no_sense(
    options: list[str], said: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    few = ["--engine", str(engine), "--out", str(tmp_path / "run")]
    assert run(["solve", str(problems), *few, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_names_of_outputs() -> None:
    assert stem("RabotniKuma/Fast-Math-R1-14B") == "fast-math-r1-14b"
    assert stem("/models/My Model/") == "my-model"
    assert stem("practice") == "practice"


def test_a_start_that_failed_does_not_claim_the_directory(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, out = tmp_path / "p.jsonl", tmp_path / "run"
    problems.write_text(PROBLEM + "\n", encoding="utf-8")
    assert solve(problems, engine, out, "--seed", "5", "--device", "nothing") == 2
    assert solve(problems, engine, out, "--seed", "6") == 0
    assert json.loads((out / "run.json").read_text())["arguments"]["seed"] == 6
    assert "different run" not in capsys.readouterr().err


def test_a_penalty_out_of_range_is_wrong_usage(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM, encoding="utf-8")
    assert solve(problems, engine, tmp_path / "run", "--switch-penalty=-1,600,Wait") == 2
    assert "alpha -1.0" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "warned"), [("0.9", True), ("0.9s", False), ("60", False)])
def test_a_plain_time_limit_that_leaves_little_is_pointed_out(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str, warned: bool
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM, encoding="utf-8")
    assert solve(problems, engine, tmp_path / "run", "--time-limit", limit) == 0
    assert (f"--time-limit {limit} counts seconds" in capsys.readouterr().err) is warned


def test_the_summary_says_how_votes_weighed_and_how_much_code_ran(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text(PROBLEM, encoding="utf-8")
    assert solve(problems, engine, tmp_path / "plain") == 0
    said = capsys.readouterr().out
    assert "votes by" not in said
    assert "code" not in said
    assert solve(problems, engine, tmp_path / "run", "--weights", "length", "--tools", "python", "--tools-unsafe") == 0
    said = capsys.readouterr().out
    assert "votes by length; maj@2" in said
    assert "no sample wrote a block to run" in said


def test_revotes_next_line_runs_where_it_is_printed(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From another directory, with the default directory of runs taken already."""
    monkeypatch.chdir(tmp_path)
    Path("my problems.jsonl").write_text(PROBLEM, encoding="utf-8")
    made = ["--samples", "4", "--max-tokens", "40", "--full-vote", "--save-text", "--temperature", "0"]
    assert run(["--quiet", "solve", "my problems.jsonl", "--engine", str(engine), *made]) == 0
    [there] = Path("runs").iterdir()
    for _ in range(2):
        capsys.readouterr()
        assert run(["--quiet", "revote", str(there), "--weights", "finish"]) == 0
        line = capsys.readouterr().out.splitlines()[-1].removeprefix("next: trtkit ")
        assert "--weights finish" in line
        assert run(["--quiet", *shlex.split(line), "--max-tokens", "40"]) == 0, capsys.readouterr().err
    assert len(list(Path("runs").iterdir())) == 3


def test_an_engine_in_the_place_of_the_problems_is_told_before_one_is_looked_for(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where none was built
    assert run(["solve", str(engine)]) == 1
    assert f"hint:  the problems come first: trtkit solve problems.jsonl --engine {engine}" in capsys.readouterr().err


def test_next_lines_can_be_pasted_where_paths_have_spaces(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(PROBLEM, encoding="utf-8")
    assert solve(Path("p.jsonl"), engine, Path("my run")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: trtkit report 'my run'"
    assert run(["--quiet", "build", "--precision", "bf16", "--out", "my engine"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "next: trtkit solve problems.jsonl --engine 'my engine'"
    assert run(["inspect", "my engine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_trained_heads_build_goes_beside_an_engine_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = HeadReport(parameters=1, updates=1, train_tokens=1, held_out=1, hits=(), trees=())
    monkeypatch.setattr("trtkit.training.run.train_head", lambda *_, **__: report)
    line = "next: trtkit build --model practice --drafter engines/built/practice-drafter"
    for aside in ("", " --out engines/built/practice-fp8-drafter"):
        assert run(["--quiet", "train-drafter"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == line + aside
        Path("engines/built/practice-fp8").mkdir(parents=True, exist_ok=True)
