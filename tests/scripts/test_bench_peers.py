"""scripts/bench_peers: the rotation, what becomes of peers that misbehave, the table; two real workers end to end."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peers import environments, machine, ours, run
from peers.__main__ import main
from peers.catalogue import OURS, PEERS, Line, Peer, chosen, with_forced
from peers.checkpoint import make_checkpoint
from peers.environments import Environment, InstallError, ensure_environment, last_words
from peers.report import document, notes, rows_of, table_rows
from peers.run import Attempt, Plan, Run, rotated, run_peers
from peers.worker import Point, Task, _point

MODES = ("good", "crash", "short", "equal", "unprepared", "slow", "child")
FAKE = Peer(module="tests.scripts.fake_peer", variants=MODES, what="a fake", environment=None)
FAR_MORE = 0.5
"""A share of a core far beyond what counts as quiet."""


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither wait for a quiet machine nor measure its memory."""
    monkeypatch.setattr(run, "idle_share", lambda: 0.0)
    monkeypatch.setattr(run, "_probe", lambda plan, found, say: found.read_bytes_per_second.append(1e9))


def measured(tmp_path: Path, peers: dict[str, Peer], names: list[str], **changes: Any) -> tuple[Plan, Run, list[str]]:
    plan = Plan(
        lines=tuple(chosen(names, peers)), peers=peers, work=tmp_path, prepared=tmp_path / "prepared", model=tmp_path,
        prompt=(1, 2, 3), batches=(1, 2), new_tokens=8, rounds=1, threads=1,
    )  # fmt: skip
    plan = dataclasses.replace(plan, **changes)
    found, said = Run(), []
    run_peers(plan, found, said.append, lambda: None)
    return plan, found, said


def test_every_line_takes_every_third_of_the_order() -> None:
    lines = [Line("peer", str(number)) for number in range(6)]
    orders = [rotated(lines, turn, 3) for turn in range(3)]
    assert all(sorted(order) == lines for order in orders)
    assert [order[0].variant for order in orders] == ["0", "2", "4"]
    places = {line: {order.index(line) // 2 for order in orders} for line in lines}
    assert all(thirds == {0, 1, 2} for thirds in places.values())
    assert [order[0].variant for order in (rotated(lines[:2], turn, 3) for turn in range(3))] == ["0", "1", "0"]


def test_names_mean_lines() -> None:
    assert chosen(["llama:Q4_0", "transformers", "transformers:bf16"]) == [
        Line("llama", "Q4_0"),
        Line("transformers", "bf16"),
        Line("transformers", "fp32"),
    ]
    assert Line(OURS, "int8+drafter") in chosen([], drafting=True)
    assert not any("drafter" in line.variant for line in chosen([]))
    with pytest.raises(ValueError, match=r"llama:Q9, nobody, trtkit:int8\+drafter"):
        chosen(["llama:Q9", "nobody", "trtkit:int8+drafter", "vllm"])


def test_forced_lines_are_there_only_when_asked_for() -> None:
    endings = ours.forced_endings(151936)
    assert not any("forced" in line.variant for line in chosen([], forced=endings))
    asked = ["trtkit:int8+forced-32k", "llama:Q8_0", "trtkit:int4"]
    lines = chosen(asked, forced=endings)
    assert [str(line) for line in lines] == asked
    assert [line.variant for line in with_forced(lines, endings)] == [
        "int8+forced-32k", "Q8_0", "int4", "int4+forced", "int4+forced-32k",
    ]  # fmt: skip
    assert ours.forced_endings(32768) == ("+forced",), "nothing to trim"
    for names in (["trtkit:int8+forced-32k"], ["llama:Q8_0+forced"]):
        with pytest.raises(ValueError, match="unknown"):
            chosen(names, forced=ours.forced_endings(1024))


@pytest.mark.parametrize(
    ("peers", "drafter", "message"),
    [("trtkit:int8", True, "there is .*drafter"), ("llama", False, "names none")],
)
def test_forcing_what_cannot_be_forced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], peers: str, drafter: bool,
    message: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text('{"vocab_size": 1024}')
    if drafter:
        (tmp_path / "drafter").mkdir()
    argv = ["bench_peers", "--model", str(tmp_path), "--work", str(tmp_path / "work"), "--peers", peers, "--forced"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 2
    assert re.search(message, capsys.readouterr().err)


def test_misbehaving_peers_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    names = [f"fake:{mode}" for mode in MODES if mode not in ("slow", "child")]
    plan, found, said = measured(tmp_path, {"fake": FAKE}, names, rounds=2)
    rows = rows_of(found, plan.lines)
    cells = {row.variant: [cell.batch for cell in row.cells] for row in rows}
    assert cells == {"good": [1, 2], "short": [], "equal": [1]}
    (good,) = (row for row in rows if row.variant == "good")
    assert [cell.processes for cell in good.cells] in ([2, 2], [1, 2], [2, 1], [1, 1])
    assert all(cell.ms_per_step >= 10 and cell.tokens_per_step == 1.0 for cell in good.cells)
    assert set(found.unavailable) == {"fake:crash", "fake:unprepared"}
    assert "SIGILL" in found.unavailable["fake:crash"]
    assert "no such format" in found.unavailable["fake:unprepared"]
    # A line that crashed is not tried again.
    assert [attempt.round for attempt in found.attempts if attempt.variant == "crash"] == [1]
    assert sum("different seeds gave equal samples" in note for note in notes(found, rows)) == 2
    assert sum("rows of [7] tokens, 8 asked for" in note for note in notes(found, rows)) == 4
    assert any("round 2 of 2" in line and "left" in line for line in said)


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    _, found, _ = measured(tmp_path, {"fake": FAKE}, ["fake:slow"], timeout_seconds=1.0)
    assert found.unavailable["fake:slow"] == "not done after 1 s"
    _, found, _ = measured(tmp_path, {"fake": FAKE}, ["fake:child"])
    assert found.attempts[0].outcome is not None
    # Workers run in the work folder, and so do their children. A killed process takes a moment to be gone.
    until = time.monotonic() + 20
    while left := [path for path in Path("/proc").glob("[0-9]*/cwd") if _target(path) == str(tmp_path)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def attempt(seconds: float, share: float | None, *, number: int = 1, tokens: int = 39) -> Attempt:
    point = {
        "batch": 1, "prefill_seconds": 0.5, "decode_seconds": seconds, "steps": 39, "decode_tokens": tokens,
        "foreign_share": share, "wrong": None,
    }  # fmt: skip
    outcome = {
        "versions": {"x": "1"}, "import_seconds": 1.0, "load_seconds": 2.0, "weight_bytes": 500_000_000,
        "peak_rss_bytes": 10**9, "points": [point],
    }  # fmt: skip
    return Attempt(peer="llama", variant="Q8_0", round=number, seconds=9.0, outcome=outcome)


def test_disturbed_timings_count_only_where_no_other_is_left() -> None:
    line = Line("llama", "Q8_0")
    found = Run(attempts=[attempt(3.9, 0.0), attempt(39.0, FAR_MORE), attempt(4.1, None)], read_bytes_per_second=[2e10])
    (row,) = rows_of(found, [line, Line("llama", "Q4_0")])
    assert row.cells[0].ms_per_step == pytest.approx(1e3 * 4.0 / 39)
    assert (row.cells[0].processes, row.cells[0].disturbed) == (2, False)
    # 500 MB per 102.6 ms are 4.9 GB/s of 20.
    assert row.read_fraction == pytest.approx(0.2437, abs=1e-3)
    assert "1 of 3 timings" in notes(found, [row])[0]
    found = Run(attempts=[attempt(39.0, FAR_MORE)])
    (row,) = rows_of(found, [line])
    assert row.cells[0].disturbed
    headings, lines = table_rows([row], (1, 8))
    named = dict(zip(headings, lines[0], strict=True))
    assert (named["ms B=1"], named["ms B=8"], named["of read"], named["load s"]) == ("~1,000", "-", "-", "3.0")


def test_drafting_is_told_by_tokens_per_step() -> None:
    found = Run(attempts=[attempt(3.9, 0.0, tokens=78)])
    rows = rows_of(found, [Line("llama", "Q8_0")])
    assert (rows[0].cells[0].tokens_per_second, rows[0].cells[0].tokens_per_step) == (pytest.approx(20), 2.0)
    assert "compare tok/s" in notes(found, rows)[0]
    assert document(found, rows, {"version": 1})["processes"][0]["outcome"]["points"][0]["decode_tokens"] == 78


def test_no_reader_takes_a_forced_acceptance_for_an_honest_one() -> None:
    found = Run(attempts=[dataclasses.replace(attempt(3.9, 0.0, tokens=121), peer=OURS, variant="int8+forced")])
    rows = rows_of(found, [Line(OURS, "int8+forced"), Line("llama", "Q8_0")])
    said = notes(found, rows)
    assert any("trtkit:int8+forced: tokens per step and row 3.10 at B=1" in line for line in said)
    (note,) = (line for line in said if "random weights" in line)
    assert note.startswith("forced        +forced: draft head with random weights, acceptance forced to the published")
    assert "86%, 74%, 65% of the steps" in note
    assert note in document(found, rows, {})["notes"]


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", tmp_path_factory.mktemp("peers") / "checkpoint")


def forced_point(checkpoint: Path, variant: str, seed: int) -> tuple[Point, list[list[int]], int]:
    """One timing of ours in this process, and its samples; and the weights that a step reads."""
    task = Task(
        action="measure", variant=variant, model=str(checkpoint), prepared=str(checkpoint.parent / "ours" / variant),
        prompt=tuple(range(5)), batches=(16,), new_tokens=60, threads=1, seed=seed,
    )  # fmt: skip
    ours._prepare(task)
    model = ours._opened(task)
    samples: list[list[int]] = []

    class Recorded:
        weight_bytes = model.weight_bytes

        def generate(self, *arguments: Any) -> list[list[int]]:
            samples[:] = model.generate(*arguments)
            return samples

    return _point(Recorded(), task, 16), samples, model.weight_bytes


def test_a_random_head_is_accepted_by_the_profile(tiny_checkpoint: Path) -> None:
    point, samples, read = forced_point(tiny_checkpoint, "int8+forced", seed=1)
    assert point.wrong is None
    # 1 + 0.86 + 0.74 + 0.65; about 250 row-steps with a spread of 1.13 each.
    assert point.decode_tokens / point.steps / 16 == pytest.approx(3.25, abs=0.3)
    assert point.steps < 60 / 2
    assert forced_point(tiny_checkpoint, "int8+forced", seed=1)[1] == samples
    other = forced_point(tiny_checkpoint, "int8+forced", seed=10_001)[0]
    assert other.decode_tokens / other.steps != point.decode_tokens / point.steps, "each round has its own luck"
    plain, _, without = forced_point(tiny_checkpoint, "int8", seed=1)
    assert (plain.wrong, plain.steps, plain.decode_tokens) == (None, 59, 59 * 16)
    # Three times the head: W, U and its bias, two blocks of width 512, 1024 tokens, 2 bytes each.
    assert read - without == 3 * 2 * (2 * 256 * 256 + 256 + 2 * (512 * 512 + 512) + 512 * 1024)


def test_a_trimmed_head_reads_less_and_drafts_its_own_tokens(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from peers import forced

    monkeypatch.setattr(forced, "DRAFT_VOCABULARY", 100)
    whole = forced_point(tiny_checkpoint, "bf16+forced", seed=1)
    trimmed = forced_point(tiny_checkpoint, "bf16+forced-32k", seed=1)
    assert whole[2] - trimmed[2] == 3 * 2 * 512 * (1024 - 100)
    assert (trimmed[0].wrong, trimmed[0].steps) == (None, whole[0].steps)
    # 2.25 of 3.25 emitted tokens are drafted ones, here among the first 100.
    few = [sum(token < 100 for row in samples for token in row) / (16 * 60) for _, samples, _ in (whole, trimmed)]
    assert few[0] < 0.3
    assert few[1] > 0.6


def test_only_the_time_of_others_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy, own = iter((100.0, 102.0)), iter((50.0, 53.0)), iter((7.0, 9.5))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(machine, "_own_seconds", lambda: next(own))
    assert machine.ForeignLoad().share() == pytest.approx(0.25)


def test_an_environment_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Environment(torch=False, packages=("a-package-that-is-nowhere",))
    monkeypatch.setitem(environments.ENVIRONMENTS, "absent", absent)
    python = tmp_path / "work" / "environments" / "absent" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "ERROR: no matching distribution for $*"; echo "[notice] a new pip is there"; exit 1\n'
    )
    python.chmod(0o755)
    peers = {"fake": FAKE, "gone": dataclasses.replace(FAKE, environment="absent")}
    plan, found, _ = measured(tmp_path / "work", peers, ["gone:good", "fake:good"])
    assert "a-package-that-is-nowhere" in found.unavailable["gone:good"]
    assert [row.peer for row in rows_of(found, plan.lines)] == ["fake"]
    with pytest.raises(InstallError, match="not installed"):
        ensure_environment("absent", tmp_path / "work" / "environments" / "absent", tmp_path / "log")


def test_the_telling_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("working\nRuntimeError: needs AVX512\n  at the end\n\n")
    assert last_words(log) == "RuntimeError: needs AVX512"
    log.write_text("")
    assert last_words(log) == "no output"


def test_list_and_unknown_names(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_peers", "--list"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PEERS)
    assert "llama-cpp-python==" in shown
    assert shown.splitlines()[-1].startswith("next: ")


@pytest.mark.slow
def test_transformers_and_ours_on_a_tiny_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint("tiny", tmp_path / "checkpoint-tiny")
    monkeypatch.setitem(PEERS, "transformers", dataclasses.replace(PEERS["transformers"], environment=None))
    argv = [
        "bench_peers",
        "--work",
        str(tmp_path),
        "--shape",
        "tiny",
        "--peers",
        "transformers:bf16,trtkit:int8",
        "--forced",
    ]
    argv += ["--batches", "1,3", "--rounds", "1", "--new-tokens", "8", "--prompt-tokens", "5", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setitem(os.environ, "PYTHONWARNINGS", "default")
    assert main() == 0
    shown = capsys.readouterr()
    assert "not measured  " not in shown.out
    assert "left out" not in shown.out
    lines = [line.split() for line in shown.out.splitlines() if line.startswith(("transformers ", "trtkit "))]
    assert [line[:2] for line in lines] == [["transformers", "bf16"], ["trtkit", "int8"], ["trtkit", "int8+forced"]]
    assert "draft head with random weights" in shown.out
    assert (tmp_path / "peers.json").is_file()
