"""Options that only mean something beside another one are refused without it, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.report.run_dirs import attempt, solution, write_run
from trtkit.cli.app import run


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("places")
    engine = tiny_engine_dir(directory / "engine")
    save_chat_files(engine)
    problems = [{"id": "a", "problem": "x", "answer": "7"}]
    made = write_run(directory / "run", problems, [attempt("a", 0, "7"), solution("a", "7")])
    traces = directory / "traces.jsonl"
    traces.write_text(json.dumps({"problem": "x", "text": "7"}) + "\n")
    return {"ENGINE": str(engine), "PROBLEMS": str(directory / "problems.jsonl"), "RUN": str(made),
            "TRACES": str(traces)}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("solve --tool-calls 6", "--tool-calls: only with --tools python"),
        ("solve --tool-seconds 9", "--tool-seconds: only with --tools python"),
        ("solve --tools-unsafe", "--tools-unsafe: only with --tools python"),
        ("solve --full-vote --stop agree(3)", "--stop: not with --full-vote"),
        ("solve --full-vote --stop certificate(0.05)", "--stop: not with --full-vote"),
        ("solve --full-vote --kill-loops", "--kill-loops: not with --full-vote"),
        ("solve --full-vote --force-close", "--force-close: not with --full-vote"),
        ("solve --together 8 --order sequential", "--together: only in pooled runs"),
        ("solve --together 8 --time-limit 5h", "--together: only in pooled runs"),
        ("solve --tree 1x3", "no draft head"),
        ("solve --tree none --lookup", "--lookup: not with --tree none"),
        ("solve --tree none --drafter practice", "--drafter: not with --tree none"),
        ("bench --lookup", "random tokens have nothing to look up"),
        ("bench --problems PROBLEMS --lookup --draft-precision int8", "none of the engines has one"),
        ("build -p int8 --int4-method awq", "--int4-method: only with --precision int4"),
        ("build -p fp8 --smooth-alpha 0.5", "--smooth-alpha: only with --precision int8-sq"),
        ("build -p int8 --calibrator trtkit", "--calibrator: nothing of int8 is calibrated"),
        ("build -p int4 --int4-method rtn --calibrator modelopt", "--calibrator: nothing of plain int4 is calibrated"),
        ("build -p bf16 --calibration PROBLEMS", "--calibration: bf16 is the original"),
        ("build -p bf16 --output-layer model --max-kl 0.1", "--max-kl: bf16 is the original"),
        ("build -p bf16 --calibration-rows 8", "--calibration-rows: bf16 is the original"),
        ("build -p fp8 --backend tensorrt-llm --gpu l4 --print-command --workers 1", "--workers: nothing is compiled"),
        ("bench --model practice", "--model: only with --suite"),
        ("bench --problems PROBLEMS --prompt-tokens 64", "--prompt-tokens: not with --problems"),
        ("bench --profile --repeats 3", "--repeats: not with --profile"),
        ("bench --tree none --drafter practice", "--drafter: not with --tree none"),
        ("bench --tree 1x3", "none of the engines has one"),
        ("bench --draft-precision int8", "none of the engines has one"),
        ("plan --published --gpu l4", "--gpu: not with --published"),
        ("plan --catalogue OUT -p fp8", "--precision: not with --catalogue"),
        ("inspect RUN --verify", "--verify: a run has neither digests nor tensors"),
        ("revote RUN --fields text=a", "--fields: only with files of traces"),
        ("revote TRACES --problems PROBLEMS", "--problems: only with a run"),
        ("train-drafter --split tir", "--split: only with OpenMathReasoning"),
        ("train-drafter --start-from OUT --no-rnn --layers 1", "--no-rnn: not with --start-from"),
    ],
)
def test_what_would_be_ignored_is_refused(
    line: str, said: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    verb, *words = [{**places, "OUT": str(out)}.get(word, word) for word in line.split()]
    engine = ["--engine", places["ENGINE"], "--device", "cpu"]
    more = {"solve": [places["PROBLEMS"], *engine, "--out", str(out)], "bench": engine if "--suite" not in line else [],
            "build": ["--out", str(out)], "train-drafter": ["--out", str(out)]}  # fmt: skip
    assert run([verb, *words, *more.get(verb, [])]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "hint:" in error
    assert not (out / "journal.jsonl").exists()
    assert not (out / "engine.json").exists()


@pytest.mark.parametrize("changes", ["--output-layer int8", "--kv-dtype fp8", "--kv-dtype int8 --calibrator trtkit"])
def test_bf16_weights_are_judged_where_something_else_changes(
    changes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--quiet", "build", "-p", "bf16", *changes.split(), "--out", str(tmp_path / "out")]
    assert run([*line, "--calibration-rows", "8", "--max-kl", "1e-12"]) == 1
    assert "exceeds --max-kl" in capsys.readouterr().err


def test_a_prompt_that_promises_code_is_pointed_out(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "solve", places["PROBLEMS"], "--engine", places["ENGINE"], "--device", "cpu", "--samples", "1", "--max-tokens",
        "4", "--prompt", "python",
    ]  # fmt: skip
    assert run([*line, "--out", str(tmp_path / "plain")]) == 0
    assert "without --tools it does not" in capsys.readouterr().err
