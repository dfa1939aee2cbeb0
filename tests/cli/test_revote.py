from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from trtkit.cli.app import run
from trtkit.runtime.api import FinishReason
from trtkit.solve.ends import Ending, Probe
from trtkit.solve.journal import Journal
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.vote import Tally

RULES = ["--rules", "full", "--rules", "agree(2)", "--rules", "beta(0.9)+stragglers(2)"]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Six problems with eight samples each: five right, two wrong, one that never ends."""
    path = tmp_path / "traces.jsonl"
    rows: list[dict[str, Any]] = []
    for number in range(6):
        boxes = ["7", "8", "7", "7", "9", "7", "7"]
        samples = [f"thinking \\boxed{{{box}}}</think>" for box in boxes] + ["again " * 400]
        tokens = [50 + 10 * ((number + index) % 7) for index in range(7)] + [800]
        rows.append({"question": f"problem {number}", "target": 7, "outs": samples, "n": tokens})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


FIELDS = ["--fields", "text=outs,gold=target,problem=question,tokens=n"]


def revote(*arguments: str) -> int:
    return run(["--quiet", "revote", *arguments])


def test_json_and_table(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert revote(str(traces), *FIELDS, *RULES, "--samples", "4,8", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert lines[-2].startswith("next: trtkit solve problems.jsonl --samples 8 --stop '")
    assert list(document) == ["rules", "problems", "traces", "closed", "boxed", "looped"]
    assert [document[name] for name in list(document)[1:]] == [6, 48, 42, 42, 6]
    assert [(row["rule"], row["samples"]) for row in document["rules"]] == [
        (rule, count) for count in (4, 8) for rule in ("full", "agree(2)", "beta(0.9)+stragglers(2)")
    ]
    for row in document["rules"]:
        assert list(row) == ["rule", "samples", "accuracy", "accuracy_low", "accuracy_high", "tokens", "wall"]
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    full, agree, straggler = document["rules"][3:]
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    assert (full["accuracy"], full["tokens"], full["wall"]) == (1.0, sum(sum(row["n"]) for row in rows), 6 * 800)
    assert agree["tokens"] < full["tokens"]
    assert straggler["wall"] < 6 * 120
    table = "\n".join(lines[:-2])
    assert "48 traces of 6 problems: closed 42 (88%), boxed 42 (88%), looped 6 (12%)" in table
    assert "against full" in table


def test_answers_say_what_each_rule_would_have_said(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    assert revote(str(traces), *FIELDS, *RULES, "--samples", "8", "--draws", "1", "--answers", str(out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 18
    [row] = [row for row in rows if row["problem"] == "problem 0" and row["rule"] == "agree(2)"]
    # By length 7, 8, 7, 7, 9, 7: the first two differ; then three votes ahead, two to come.
    assert row["gold"] == "7"
    assert row["votes"] == [["7", 4], ["8", 1], ["9", 1]]
    assert (row["finished"], row["wall"], row["tokens"]) == (6, 100, 50 + 60 + 70 + 80 + 90 + 100 + 100 + 100)
    assert row["stopped_early"] == "unassailable"
    assert row["correct"] is True


def test_recorded_order_without_times_is_refused(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert revote(str(traces), *FIELDS, "--finish-order", "recorded") == 1
    assert "--fields seconds=" in capsys.readouterr().err


def test_png(traces: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures" / "trade.png"
    assert revote(str(traces), *FIELDS, *RULES, "--samples", "2,8", "--draws", "3", "--png", str(out)) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so_before_it_works(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert revote(str(tmp_path / "not read yet.jsonl"), "--png", str(tmp_path / "x.png")) == 1
    captured = capsys.readouterr()
    assert "pip install 'trtkit[report]'" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--rules", "agre(2)"], 2, "did you mean 'agree'"),
        (["--samples", "8,x"], 2, "--samples 8,16,32"),
        (["--samples", "0"], 2, "--samples"),
        (["--samples", "16"], 1, "the most that any has is 8"),
        (["--finish-order", "random"], 2, "must be length or recorded"),
        (["--stop-at", "never"], 2, "must be think or eos"),
        (["--weights", "lengthy"], 2, "did you mean 'length'"),
        (["--weights", "confidence"], 1, "42 of 42 answers were saved without their log-probability"),
        (["--modulus", "1000"], 2, "needs the answer mode integer"),
        (["--fields", "gold=nothing"], 1, "gold=nothing: no row has it"),
    ],
)
def test_wrong_usage(
    traces: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert revote(str(traces), *FIELDS, *arguments) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_the_same_samples_do_not_count_twice(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = traces.with_name("again.jsonl")
    again.symlink_to(traces)
    assert revote(str(traces), str(again), *FIELDS) == 2
    assert f"- {again}" in capsys.readouterr().err
    run_dir = traces.with_name("run")
    run_dir.mkdir()
    (run_dir / "journal.jsonl").touch()
    assert revote(str(run_dir), str(run_dir / "journal.jsonl")) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_answers_do_not_replace_the_samples(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = traces.read_bytes()
    assert revote(str(traces), *FIELDS, "--answers", str(traces)) == 2
    assert "would replace the samples" in capsys.readouterr().err
    assert traces.read_bytes() == before


def test_no_traces_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert revote(str(tmp_path / "missing.jsonl")) == 1
    assert "no such file" in capsys.readouterr().err
    assert revote(str(tmp_path)) == 1
    assert "no journal.jsonl" in capsys.readouterr().err


def test_more_samples_than_there_are_fail_before_the_replay(
    traces: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replayed(*_: object, **__: object) -> None:
        raise AssertionError("replayed something first")

    monkeypatch.setattr("trtkit.solve.tradeoff.replay", replayed)
    assert revote(str(traces), *FIELDS, *RULES, "--samples", "4,64") == 1
    assert "no problem has 64 samples" in capsys.readouterr().err


def test_the_next_line_never_names_a_rule_that_is_none(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert revote(str(traces), *FIELDS, "--rules", "full") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: trtkit revote {traces} {shlex.join(FIELDS)}"
    traces.write_text(traces.read_text("utf-8").replace('"target": 7, ', ""), "utf-8")
    assert revote(str(traces), "--fields", "text=outs,problem=question,tokens=n", "--rules", "agree(2)") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: name the gold answers")


def test_the_next_line_asks_samples_where_that_pays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples that know their answer after a quarter of their tokens; and others that never settle."""
    for name, early in (("sure", "7"), ("unsure", None)):
        said = tuple(Probe(at, 3, early) for at in (100, 200, 300))
        with Journal(tmp_path / name / "journal.jsonl") as journal:
            journal.begin(0.0, None)
            for number in range(3):
                attempts = [
                    Attempt(
                        problem_id=f"p{number}", index=index, variant="solve", tokens=1000 + index, box="7",
                        seconds=1.0, finish=FinishReason.STOP, ending=Ending.THINK, probes=said,
                    )
                    for index in range(4)
                ]  # fmt: skip
                solution = Solution(problem_id=f"p{number}", tally=Tally(), attempts=(), tokens=4006, seconds=1.0)
                journal.record(attempts, [solution])
        golds = tmp_path / "problems.jsonl"
        golds.write_text("".join(json.dumps({"id": f"p{n}", "problem": "x", "answer": "7"}) + "\n" for n in range(3)))
        rules = ["--rules", "full", "--rules", "full+probe(100,2)"]
        assert revote(str(tmp_path / name), "--problems", str(golds), *rules) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert ("--stop none --probe 100,2 " in last) == (early is not None)
        assert revote(str(tmp_path / name), "--rules", "probe(150,2)") == 1
        assert "asked every 100 tokens" in capsys.readouterr().err
