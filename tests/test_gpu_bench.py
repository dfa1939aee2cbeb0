"""The GPU benchmark, as far as a CPU carries it: every line but the CUDA ones, on a tiny shape."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.tree import build_tree
from tests.runtime.ranks.threads import ThreadRanks, on_ranks
from trtkit.bench import gpu_ranks
from trtkit.bench.gpu import GpuBench, GpuBenchOptions, _options, main
from trtkit.bench.gpu_machine import STUCK
from trtkit.bench.gpu_points import PointPlan, Timed, timed_steps
from trtkit.bench.gpu_ranks import SharedPlan, measure_shared
from trtkit.bench.gpu_stages import PUBLISHED_ACCEPTANCE, STAGES, Stage
from trtkit.bench.gpu_targets import goals, lines
from trtkit.bench.random_model import RandomWeights, StandingEngine, forced_acceptance, shape_spec
from trtkit.quant.tensor import linear_reference
from trtkit.runtime.decode import Pending
from trtkit.runtime.model import DecoderModel

ROOT = Path(__file__).resolve().parents[1]
NOT_NEEDED = ("rich", "tomli_w", "math_verify", "huggingface_hub", "matplotlib", "typer", "jinja2")
"""What a bare GPU machine may lack."""


def _run(out: Path, stages: str) -> dict[str, Any]:
    code = main([str(out), "--shape", "tiny", "--device", "cpu", "--stages", stages])
    document: dict[str, Any] = json.loads(out.read_text())
    assert document["failures"] == {}
    assert code == 0
    return document


def test_a_tiny_run_measures_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = _run(tmp_path / "bench.json", "environment,bandwidth,bf16")
    assert document["environment"]["torch"] == torch.__version__
    one, twelve, one_ahead, twelve_ahead = document["points"]
    assert [(p["rows"], p["overlap"]) for p in document["points"]] == [(1, False), (12, False), (1, True), (12, True)]
    assert one_ahead["tokens_per_step"] == twelve_ahead["tokens_per_step"] == 1
    assert one["tokens_per_step"] == 1
    weights = 2 * (shape_spec("tiny").parameters - 512 * 256)
    # The biases and norms are not counted as reads; 64 prompt tokens and what was generated are in the cache.
    assert one["step_bytes"] == pytest.approx(weights + 70 * 2 * 2 * 128 * 2, rel=0.02)
    assert one["copy_fraction"] == pytest.approx(
        one["step_bytes"] / one["step_ms"] * 1e3 / document["copy_bytes_per_second"]
    )
    assert set(one["phase_ms"]) == {"draft", "verify", "accept", "step", "host"}
    assert one["kernel_us"]
    assert twelve["phase_ms"]["host"] == pytest.approx(twelve["step_ms"] - twelve["phase_ms"]["step"])
    assert [goal["name"] for goal in document["goals"]] == [
        "bf16, 1 row: share of copy bandwidth", "bf16, 12 rows: overlap, times without",
    ]  # fmt: skip
    table = capsys.readouterr().out
    assert "bf16, 1 row: share of copy bandwidth" in table
    assert "MISSED" in table


def test_a_numbered_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches there, wherever the tensors lie."""
    chosen: list[torch.device] = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": chosen.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert _options(["--device", "cuda:1"]).device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(SystemExit):
        _options(["--device", "cuda:2"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_runs(tmp_path: Path) -> None:
    document = _run(tmp_path / "bench.json", ",".join(STAGES))
    drafted = [point for point in document["points"] if point["tree"]]
    assert [point["draft_vocabulary"] for point in drafted] == [512, 512, 64, 64]
    assert "fp8" in {point["kv_dtype"] for point in document["points"] if point["rows"] == 12}
    assert all(abs(point["tokens_per_step"] - 3.25) < 0.6 for point in drafted)
    assert document["long"]["rows"] == 64
    assert [figure["compiled"] for figure in document["transformers"]["figures"]] == [False, True]
    assert [point["ranks"] for point in document["shared_points"]] == [2] * 5
    assert [point["draft_vocabulary"] for point in document["shared_points"]][-2:] == [None, 64]
    assert {goal["name"].split(",")[0] for goal in document["goals"]} >= {"bf16", "int8", "fp8", "int4"}


def test_a_point_over_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks as threads: each times the same steps, and drafts are accepted as they are forced to be."""
    point = PointPlan(precision="fp8", rows=12, context=64, steps=12, shares=PUBLISHED_ACCEPTANCE, overlap=True)
    plan = SharedPlan(shape="tiny", device="cpu", ranks=2, point=point, draft_vocabulary=64)

    class Ranked:
        """The first rank's engine, the other one doing as much on a thread of its own."""

        own: StandingEngine

        def __init__(self, size: int, device: str, open_own: Callable[[ThreadRanks], StandingEngine]) -> None:
            assert (size, device) == (2, "cpu")
            self.open_own = open_own

        def __enter__(self) -> Ranked:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    def timed(engine: Ranked, asked: PointPlan) -> Timed:
        both = on_ranks(2, lambda ranks: _timed(engine.open_own(ranks), asked))
        engine.own = both[0][0]
        assert both[0][1].tokens == both[1][1].tokens
        return both[0][1]

    monkeypatch.setattr(gpu_ranks, "RankedEngine", Ranked)
    monkeypatch.setattr(gpu_ranks, "timed_steps", timed)
    found = measure_shared(plan, copy=1e9)
    assert (found["ranks"], found["tree"], found["draft_vocabulary"]) == (2, "1x3", 64)
    assert abs(found["tokens_per_step"] - 3.25) < 0.6
    assert found["copy_fraction"] == pytest.approx(found["step_bytes"] / found["step_ms"] * 1e3 / 2e9)


def _timed(engine: StandingEngine, plan: PointPlan) -> tuple[StandingEngine, Timed]:
    return engine, timed_steps(engine, plan)


def test_a_failing_stage_does_not_take_the_others_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_bench: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(STAGES, "bf16", Stage(work=broken))
    out = tmp_path / "bench.json"
    assert main([str(out), "--shape", "tiny", "--device", "cpu", "--stages", "bf16,bandwidth"]) == 1
    document = json.loads(out.read_text())
    assert document["failures"] == {"bf16": "RuntimeError: out of luck"}
    assert document["copy_bytes_per_second"] > 0


def test_a_broken_device_is_left_for_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_bench: object) -> None:
        raise RuntimeError("no kernel of this product runs on this device")

    class LeftError(Exception):
        pass

    def leave(code: int) -> None:
        raise LeftError(code)

    monkeypatch.setitem(STAGES, "bf16", Stage(work=broken))
    monkeypatch.setattr("trtkit.bench.gpu.device_answers", lambda _device: False)
    monkeypatch.setattr("os._exit", leave)
    out = tmp_path / "bench.json"
    arguments = [str(out), "--shape", "tiny", "--device", "cpu", "--stages", "bandwidth,bf16,environment"]
    with pytest.raises(LeftError, match=str(STUCK)):
        main(arguments)
    copied = json.loads(out.read_text())["copy_bytes_per_second"]
    assert main([*arguments, "--resume"]) == 1
    document = json.loads(out.read_text())
    assert "no kernel" in document["failures"]["bf16"]
    assert "in broken" in document["tracebacks"]["bf16"]
    assert document["environment"]["torch"] == torch.__version__
    assert document["copy_bytes_per_second"] == copied, "what was measured is not measured again"


@pytest.mark.slow
def test_the_script_goes_on_behind_a_stage_that_ends_the_process(tmp_path: Path) -> None:
    """What crashes or hangs is named; the budget counts what it took."""
    out, python = tmp_path / "bench.json", tmp_path / "python"
    code = (
        "import os, runpy, signal, sys; from trtkit.bench.gpu_stages import STAGES, Stage; sys.argv.pop(0);"
        "STAGES['bf16'] = Stage(work=lambda _: os.kill(os.getpid(), signal.SIGSEGV));"
        "runpy.run_module('trtkit.bench.gpu', run_name='__main__')"
    )
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    command = [ROOT / "scripts/gpu_bench", out, "--shape", "tiny", "--device", "cpu", "--stages", "bf16,environment"]
    done = subprocess.run(
        command, env={**os.environ, "TRTKIT_PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    document = json.loads(out.read_text())
    assert done.returncode == 1, done.stderr
    assert "the process ended in it" in document["failures"]["bf16"]
    assert document["stage_seconds"].keys() == {"bf16", "environment"}
    assert "running" not in document
    assert main([str(out), "--shape", "tiny", "--device", "cpu", "--stages", "bf16,environment", "--resume"]) == 0
    document = json.loads(out.read_text())
    assert len(document["points"]) == 4, "a stage that failed is tried once more when it is asked for"
    assert document["failures"] == {}


def test_a_stage_without_the_time_that_it_needs_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setitem(STAGES, "bf16", Stage(work=lambda _bench: begun.append("bf16"), least_seconds=15))
    monkeypatch.setitem(STAGES, "fp8", Stage(work=lambda _bench: begun.append("fp8"), least_seconds=30))
    options = GpuBenchOptions(
        device=torch.device("cpu"), out=tmp_path / "bench.json", stages=("fp8", "bf16"), budget_seconds=30.0
    )
    said: list[str] = []
    document = GpuBench(options=options, say=said.append).run()
    assert begun == ["bf16"]
    assert list(document["failures"]) == ["fp8"]
    assert "s of the budget were left" in document["failures"]["fp8"]
    assert "not measured: fp8: skipped" in "\n".join(said)


@pytest.mark.parametrize("quick", [False, True])
def test_all_stages_are_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    begun: list[str] = []
    monkeypatch.setattr(GpuBench, "free", lambda _bench: None)  # nothing was taken, and to look for it takes long here
    for stage in STAGES:
        monkeypatch.setitem(STAGES, stage, Stage(work=lambda _bench, stage=stage: begun.append(stage)))
    out = tmp_path / "bench.json"
    arguments = [str(out), "--shape", "tiny", "--device", "cpu", *(["--quick"] if quick else [])]
    assert main(arguments) == 0
    assert begun == [stage for stage in STAGES if not quick or stage not in ("tests", "peer")]
    document = json.loads(out.read_text())
    assert list(document["stage_seconds"]) == begun
    assert document["seconds"] == pytest.approx(sum(document["stage_seconds"].values()))
    assert 0 <= document["seconds"] < 60


def test_a_broken_device_in_the_last_stage_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stage left, a new process would begin all over again."""

    def broken(_bench: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(STAGES, "bf16", Stage(work=broken))
    monkeypatch.setattr("trtkit.bench.gpu.device_answers", lambda _device: False)
    monkeypatch.setattr("os._exit", lambda _: pytest.fail("nothing is left to do"))
    out = tmp_path / "bench.json"
    assert main([str(out), "--shape", "tiny", "--device", "cpu", "--stages", "bf16"]) == 1
    assert "illegal memory access" in json.loads(out.read_text())["failures"]["bf16"]


def test_a_stage_may_not_take_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "bf16", Stage(work=lambda _bench: time.sleep(60), most_seconds=0.2))
    out = tmp_path / "bench.json"
    assert main([str(out), "--shape", "tiny", "--device", "cpu", "--stages", "bf16,environment"]) == 1
    document = json.loads(out.read_text())
    assert document["failures"] == {"bf16": "TimeoutError: not done after 0 s"}


def test_what_no_exception_reaches_ends_the_process() -> None:
    """A kernel that never ends: the host waits in the driver, where Python handles no signal."""
    code = (
        "import signal, time; from trtkit.bench import gpu_machine; gpu_machine._PATIENCE_SECONDS = 0.1\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "with gpu_machine.time_limit(0.1): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == STUCK
    assert 'File "<string>", line 3' in done.stderr, "says where"


def test_goals_compare_what_was_measured() -> None:
    def point(precision: str, rows: int, speed: float, share: float, **more: Any) -> dict[str, Any]:
        return {
            "precision": precision, "rows": rows, "tree": None, "tokens_per_second": speed, "copy_fraction": share,
            "context": 1, "kv_dtype": "model", "step_ms": 1.0, "overlap": False, **more,
        }  # fmt: skip

    document: dict[str, Any] = {
        "points": [
            point("bf16", 1, 100, 0.91), point("int4", 1, 300, 0.7), point("bf16", 12, 1000, 0.8),
            point("fp8", 12, 1980, 0.8, overlap=True), point("fp8", 12, 1800, 0.8),
            point("fp8", 12, 2100, 0.8, overlap=True, kv_dtype="fp8"),
            point("fp8", 12, 3300, 0.8, tree="1x3", draft_vocabulary=7),
            point("fp8", 12, 3400, 0.8, tree="1x3", draft_vocabulary=7, overlap=True),
        ],
        "transformers": {"figures": [{"compiled": True, "tokens_per_second": 50.0}]}, "failures": {"long": "no memory"},
    }  # fmt: skip
    document["goals"] = goals(document)
    found = {goal["name"]: (goal["value"], goal["met"]) for goal in document["goals"]}
    assert found == {
        "bf16, 1 row: share of copy bandwidth": (0.91, True),
        "int4, 1 row: share of copy bandwidth": (0.7, False),
        "fp8, 12 rows: times bf16": (1.98, True),
        "fp8, its keys and values too, 12 rows: times bf16": (2.1, True),
        "fp8, 12 rows: overlap, times without": (1.1, True),
        "fp8 + draft head of 7 tokens, 12 rows: times bf16": (3.4, True),
        "bf16, 1 row: times transformers, compiled": (2.0, True),
    }
    for count in range(len(document["points"])):  # stages that failed or were not asked for
        for points in itertools.combinations(document["points"], count):
            part = goals(document | {"points": points})
            assert {goal["name"] for goal in part} <= found.keys()
    text = "\n".join(lines(document))
    assert "not measured: long: no memory" in text
    assert text.count("forced acceptance, not a model's") == 2
    assert text.count("with overlap") == 3
    assert "met      1.98 (target 1.70)  fp8, 12 rows: times bf16" in text
    assert "MISSED   0.70 (target 0.75)  int4, 1 row: share of copy bandwidth" in text
    assert "transformers generate, compiled, static cache, bf16, 1 row: 50.0 tok/s" in text


def test_the_forced_acceptance_follows_the_profile() -> None:
    """Lengths by the profile, whatever was drawn; drawn tokens stay where they need not change."""
    rows, vocab = 20000, 50
    drafted = torch.randint(0, vocab, (rows, 1, 3))
    tree = build_tree(torch.zeros(rows, dtype=torch.int64), drafted)
    at = Pending(
        tokens=tree.tokens[:, 0], cached=torch.arange(rows) % 100, lines=torch.arange(rows),
        blocks=torch.zeros(rows, 1, dtype=torch.int64),
    )  # fmt: skip
    drawn = torch.randint(0, vocab, (rows, 4))
    forced = forced_acceptance(PUBLISHED_ACCEPTANCE, vocab)(tree, at, drawn)
    right = (forced[:, :3] == drafted[:, 0]).cumprod(dim=1)
    torch.testing.assert_close(
        right.double().mean(dim=0), torch.tensor(PUBLISHED_ACCEPTANCE).double(), atol=0.01, rtol=0
    )
    assert forced.max() < vocab
    assert torch.equal(forced[:, 3], drawn[:, 3])


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-sq", "fp8", "int4"])
def test_random_weights_make_a_model(precision: str) -> None:
    weights = RandomWeights(spec=shape_spec("tiny"), precision=precision, device=torch.device("cpu"))
    qkv = weights.linear(0, "qkv")
    assert linear_reference(torch.randn(2, 256), qkv).std() == pytest.approx(0.02 * 16, rel=0.2)
    model = DecoderModel(weights, device=torch.device("cpu"), dtype=torch.float32, max_tokens=8)
    assert model.logits(torch.randn(3, 256)).shape == (3, 512)


def test_engine_and_benchmark_need_little(tmp_path: Path) -> None:
    """They import with torch, transformers, safetensors and numpy alone."""
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in NOT_NEEDED)
    code = f"import sys; {blocked}; import trtkit.runtime.torch_engine, trtkit.bench.gpu, trtkit.runtime.draft_head"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
