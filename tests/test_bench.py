from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.fakes import FakeEngine
from tests.tiny import save_tiny
from trtkit.bench import engines, machine
from trtkit.bench.device_clock import spent_by_name
from trtkit.bench.engines import BenchOptions, measure
from trtkit.bench.profile import KINDS, kind_of, profile_engine
from trtkit.bench.suite import measure_suite
from trtkit.build.native import build_native
from trtkit.errors import EngineError, UsageError
from trtkit.model_spec import read_model_spec
from trtkit.recipe import Limits, Recipe, read_manifest
from trtkit.runtime.api import EngineStats, StepOutput


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BUFFER_BYTES", 1 << 20)


def test_points_and_document(tmp_path: Path) -> None:
    engine = tiny_engine_dir(tmp_path)
    options = BenchOptions(batches=(1, 4), prompt_tokens=8, new_tokens=6, repeats=2, device="cpu")
    document = json.loads(json.dumps(measure([engine], options).document(), allow_nan=False))
    assert document["machine"]["read_bytes_per_second"] > 0
    assert [point["batch"] for point in document["points"]] == [1, 4]
    for point in document["points"]:
        assert {"precision", "drafter", "batch", "tokens_per_second", "tokens_per_step", "roofline_fraction"} <= set(
            point
        )
        assert point["precision"] == "bf16"
        assert point["drafter"] is None
        assert point["tokens_per_step"] == 1.0
        assert point["roofline_fraction"] > 0


def test_an_engine_with_a_head_is_measured_plain_and_drafting(tmp_path: Path) -> None:
    engine = tiny_engine_dir(tmp_path / "engine")
    spec = read_model_spec(engine)
    head = Drafter(DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=32))
    (tmp_path / "head").mkdir()
    save_drafter(head, tmp_path / "head", dtype=torch.float32)
    options = BenchOptions(
        batches=(2,), prompt_tokens=8, new_tokens=12, repeats=1, rounds=2, device="cpu", drafter=tmp_path / "head",
        tree=TreeShape(beams=1, length=2),
    )  # fmt: skip
    plain, drafting = measure([engine], options).points
    assert (plain.drafter, plain.speedup, plain.accepted_by_depth) == (None, None, ())
    assert drafting.drafter == "1x2"
    assert drafting.speedup == pytest.approx(drafting.tokens_per_second / plain.tokens_per_second)
    assert len(drafting.accepted_by_depth) == 2
    assert drafting.tokens_per_step == pytest.approx(1 + sum(drafting.accepted_by_depth), abs=0.3)
    assert drafting.phase_seconds.keys() == {"draft", "verify", "accept"}


class Clocked(FakeEngine):
    """Takes 4 s for the prompts and 1 s for a step, 1.25 s where it drafts; the first time around 10 s each."""

    def __init__(self, speculative: bool, now: list[float]) -> None:
        super().__init__(lambda request: [1] * request.max_tokens, rows=64, burst=1 + speculative, max_total_tokens=256)
        self._seconds = 1.25 if speculative else 1.0
        self._now = now
        self._counts = {"steps": 0, "row_steps": 0, "new_tokens": 0, "prefill_tokens": 0}
        self._accepted = 0
        self._phases = {"prefill": 0.0, "verify": 0.0}
        self._prompted = 0

    def step(self) -> list[StepOutput]:
        fresh = self.submitted[self._prompted :]
        self._prompted += len(fresh)
        outputs = super().step()
        warm = not any(output.request_id.startswith("bench-0") for output in outputs)
        spent = {"prefill": 4.0 * bool(fresh), "verify": self._seconds if warm else 10.0}
        for phase, seconds in spent.items():
            self._phases[phase] += seconds
            self._now[0] += seconds
        self._accepted += sum(len(output.tokens) == 2 for output in outputs)
        for name, more in (
            ("steps", 1), ("row_steps", len(outputs)), ("new_tokens", sum(len(o.tokens) for o in outputs)),
            ("prefill_tokens", sum(len(request.prompt) for request in fresh)),
        ):  # fmt: skip
            self._counts[name] += more
        return outputs

    def stats(self) -> EngineStats:
        drafted = self._counts["row_steps"] if self._burst == 2 else 0
        return EngineStats(
            **self._counts, drafted_row_steps=drafted, accepted_by_depth=(self._accepted,) if drafted else (),
            seconds=dict(self._phases),
        )  # fmt: skip


def test_figures_are_of_decoding_alone_and_without_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: 7 tokens of each row, of which the first step is no part."""
    rows, now = 4, [0.0]
    monkeypatch.setattr(engines, "open_engine", lambda _, opening: Clocked(opening.speculative, now))
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    directory = tiny_engine_dir(tmp_path, recipe={"tree": TreeShape(beams=1, length=1)})
    options = BenchOptions(batches=(rows,), prompt_tokens=8, new_tokens=6, repeats=1, device="cpu")
    result = measure([directory], options)
    plain, drafting = result.points
    assert plain.tokens_per_second == pytest.approx(rows)
    assert (plain.tokens_per_step, plain.phase_seconds) == (1.0, {"verify": 1.0})
    assert plain.prefill_tokens_per_second == pytest.approx(rows * 8 / 4)
    # Two tokens in the first step, then 2, 2 and 1.
    assert drafting.tokens_per_second == pytest.approx(rows * 5 / 3.75)
    assert drafting.speedup == pytest.approx(5 / 3.75)
    assert drafting.tokens_per_step == pytest.approx(5 / 3)
    assert drafting.accepted_by_depth == pytest.approx((2 / 3,))
    assert drafting.phase_seconds == {"verify": 1.25}
    # A step reads the weights once for all rows, and the keys and values of half of what is decoded.
    steps = result.machine.read_bytes_per_second / plain.step_bytes
    assert plain.roofline_fraction == pytest.approx(rows / (rows * steps))
    assert drafting.roofline_fraction == pytest.approx(rows * 5 / 3.75 / (rows * 5 / 3 * steps))
    (longer, _) = measure([directory], dataclasses.replace(options, new_tokens=16)).points
    spec = read_model_spec(directory)
    cached = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4  # float32
    assert longer.step_bytes - plain.step_bytes == rows * 5 * cached


def test_a_count_ends_with_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that draft well end early: the smaller batch that goes on is another batch's business."""

    class Counting(FakeEngine):
        def stats(self) -> EngineStats:
            return EngineStats(steps=self.steps, new_tokens=sum(self._emitted.values()))

    engine = Counting(lambda request: [7] * (5 if request.seed == 1 else 20), rows=3)
    monkeypatch.setattr(engines, "time", SimpleNamespace(perf_counter=lambda: float(engine.steps)))
    timing = engines.time_once(engine, [(1, 2, 3)], 3, BenchOptions(new_tokens=19), 0)
    assert timing.tokens_per_second == 3
    assert engine.steps == 6, "five, and one in which the others are told that they are cancelled"
    assert not engine.has_work


def test_a_profile_accounts_for_the_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = tiny_engine_dir(tmp_path)
    options = BenchOptions(prompt_tokens=8, new_tokens=6, device="cpu", tree=TreeShape(beams=1, length=3))
    capfd.readouterr()
    step = profile_engine(engine, 2, options)
    assert capfd.readouterr().err == "", "torch's profiler writes past sys.stderr"
    assert set(step.kinds) == set(KINDS)
    assert all(seconds >= 0 for seconds in step.kinds.values())
    assert step.kinds["linears"] > 0
    assert step.kinds["attention"] > 0
    assert sum(step.kinds.values()) == pytest.approx(step.step_seconds, rel=0.2)
    assert kind_of("mkldnn::_linear_pointwise") == "linears"
    assert kind_of("aten::index_copy_") == "cache"
    assert kind_of("aten::silu") == "other"
    assert kind_of("product") == "linears"
    assert kind_of("aten::scaled_dot_product_attention") == "attention"


def test_a_kernels_time_counts_once() -> None:
    """torch gives it to the operation that launched it as well, and the host waits for as long."""

    def event(number: int, name: str, micros: tuple[int, int], device: DeviceType) -> FunctionEvent:
        return FunctionEvent(number, name, 0, *micros, device_type=device, use_device="cuda", stack=[])

    launched = event(1, "aten::mm", (0, 10), DeviceType.CPU)
    launched.append_kernel("sm90_gemm", 0, 100)
    waited = event(2, "cudaStreamSynchronize", (10, 110), DeviceType.CPU)
    kernel = event(3, "sm90_gemm", (5, 105), DeviceType.CUDA)
    events = EventList([launched, waited, kernel], use_device="cuda")
    events._build_tree()
    averages = events.key_averages()
    assert spent_by_name(averages, torch.device("cuda")) == {"sm90_gemm": 100}
    assert spent_by_name(averages, torch.device("cpu")) == {"aten::mm": 10, "cudaStreamSynchronize": 100}


def test_the_suite_builds_what_is_missing_and_writes_its_files(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", max_position_embeddings=512)
    save_chat_files(model)
    options = BenchOptions(batches=(1, 2), prompt_tokens=8, new_tokens=4, repeats=1, device="cpu")
    result = measure_suite(str(model), tmp_path / "out", options, precisions=("bf16", "int8"))
    assert [(p.precision, p.batch) for p in result.points] == [("bf16", 1), ("bf16", 2), ("int8", 1), ("int8", 2)]
    written = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert len(written["points"]) == 4
    built = (tmp_path / "out" / "engines" / "int8" / "engine.json").stat().st_mtime_ns
    measure_suite(str(model), tmp_path / "out", options, precisions=("int8",))
    assert (tmp_path / "out" / "engines" / "int8" / "engine.json").stat().st_mtime_ns == built
    other = save_tiny(tmp_path / "other", max_position_embeddings=512)
    save_chat_files(other)
    measure_suite(str(other), tmp_path / "out", options, precisions=("int8",))
    assert read_manifest(tmp_path / "out" / "engines" / "int8").recipe.model == str(other), (
        "not the other model's speed"
    )


def test_the_roofline_counts_the_output_layer_that_runs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    save_chat_files(model)
    recipe = Recipe(model=str(model), precision="int8", limits=Limits(batch=4, prompt_tokens=64, total_tokens=128))
    build_native(recipe, tmp_path / "engine", device="cpu")
    found = {}
    for asked in (None, "model", "int8"):
        options = BenchOptions(
            batches=(1,), prompt_tokens=8, new_tokens=4, repeats=1, device="cpu",
            output_layer=asked,
        )  # fmt: skip
        (found[asked],) = measure([tmp_path / "engine"], options).points
    assert {asked: point.output_layer for asked, point in found.items()} == {
        None: "int8", "model": "model", "int8": "int8",
    }  # fmt: skip
    # One byte for each of 320 x 256 weights instead of two.
    assert found["model"].step_bytes - found["int8"].step_bytes == 320 * 256
    assert found[None].step_bytes == found["int8"].step_bytes
    with pytest.raises(UsageError, match="must be model or int8"):
        BenchOptions(output_layer="int4")


def test_bad_options_are_listed_together() -> None:
    with pytest.raises(UsageError) as caught:
        BenchOptions(batches=(0,), repeats=0)
    assert len(caught.value.offenders) == 2


def test_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        measure([tmp_path / "nothing"], BenchOptions())
    engine = tiny_engine_dir(tmp_path / "engine")
    with pytest.raises(UsageError, match="exceed the engine's 256"):
        measure([engine], BenchOptions(prompt_tokens=250, new_tokens=10, device="cpu"))
