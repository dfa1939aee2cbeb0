from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import TreeShape
from tests.engines import tiny_engine_dir
from trtkit.build.trtllm_config import check_gpu
from trtkit.checkpoint.convert import check_alignment
from trtkit.checkpoint.trtllm_check import TrtllmOptions, check_trtllm
from trtkit.checkpoint.trtllm_layout import rank_layout
from trtkit.errors import CapacityError, UnsupportedError
from trtkit.gpu import GPUS, GpuProfile, profile_named
from trtkit.known_models import KNOWN_MODELS, known_model
from trtkit.model_spec import ModelSpec, read_model_spec
from trtkit.plan import (
    PlanRow,
    Workload,
    check_precision,
    default_draft,
    memory_plan,
    plan_rows,
    step_bytes,
)
from trtkit.plan.speed import step_cost
from trtkit.recipe import Recipe
from trtkit.runtime import load
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.scheme import SCHEMES, KvDtype, OutputLayer, scheme_named

WORK = Workload(batch=12, length=16384)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_devices_weights_are_those_of_its_rank_file(precision: str, tied: bool, count: int) -> None:
    """The table of embeddings is whole in each of them. Scales of int4 are 32 bits there and 16 in the plan."""
    spec, scheme = known_model("fast-math-r1-14b"), scheme_named(precision)
    assert spec is not None
    spec = replace(spec, tied=tied)
    layout = rank_layout(spec, scheme, TrtllmOptions(tensor_parallel=count), None, stage=0, pre_scale=False)
    stored = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
    planned = memory_plan(spec, scheme, profile_named(f"l4x{count}" if count > 1 else "l4"), WORK).weight_bytes
    assert planned == pytest.approx(stored, rel=0.035 if precision == "int4" else 0.005)


def spec_of(name: str = "nemotron-14b") -> ModelSpec:
    spec = known_model(name)
    assert spec is not None
    return spec


def row(rows: list[PlanRow], precision: str, drafter: str | None = None) -> PlanRow:
    return next(r for r in rows if (r.precision, r.drafter) == (precision, drafter))


def test_known_models_by_every_name() -> None:
    for short, (hub_id, spec) in KNOWN_MODELS.items():
        assert known_model(short) is known_model(hub_id) is known_model(hub_id.upper()) is spec
    assert known_model("gpt-2") is None


def test_weights_have_the_published_sizes() -> None:
    spec, gpu = spec_of(), profile_named("h100")
    # 29.5, about 16 and about 10 GB; 192 KiB of keys and values per token in 16 bit, 160 for Qwen3.
    sizes = {name: memory_plan(spec, scheme_named(name), gpu, WORK).weight_bytes / 1e9 for name in SCHEMES}
    assert sizes["bf16"] == pytest.approx(29.5, abs=0.1)
    assert sizes["fp8"] == sizes["int8"] == pytest.approx(16.3, abs=0.1)
    assert sizes["int4"] == pytest.approx(9.9, abs=0.1)
    assert memory_plan(spec, scheme_named("fp8"), gpu, WORK).kv_bytes_per_token == 192 * 1024
    qwen3 = spec_of("fast-math-qwen3-14b")
    assert memory_plan(qwen3, scheme_named("fp8"), gpu, WORK).kv_bytes_per_token == 160 * 1024
    assert default_draft(spec).head.parameters * 2 / 1e9 == pytest.approx(3.64, abs=0.02)


def test_no_estimate_exceeds_the_data_sheet() -> None:
    for name in ("l4x4", "h100", "h100x2", "rtx4090x2"):
        for found in plan_rows(spec_of(), profile_named(name), WORK):
            if found.fits:
                assert (found.tokens_per_second or 0) < (found.ceiling_tokens_per_second or 0)


def test_every_planned_precision_of_int4_carries_the_caution() -> None:
    for found in plan_rows(spec_of(), profile_named("l4x4"), WORK):
        assert ("accuracy" in found.reason) == (found.precision == "int4")


def test_what_does_not_fit_says_what_would() -> None:
    rows = plan_rows(spec_of(), profile_named("l4"), WORK)
    bf16 = row(rows, "bf16")
    assert (bf16.fits, bf16.max_rows, bf16.tokens_per_second) == (False, 0, None)
    assert "int4" in bf16.reason
    assert "bf16 on l4x2" in bf16.reason
    assert "without drafter" in row(rows, "fp8", "1x3").reason
    assert "rows at full length" in row(rows, "fp8").reason


@pytest.mark.parametrize("gpu", ["t4", "l4", "l4x2", "l4x4", "rtx4090", "a100-40gb", "h100", "cpu"])
@pytest.mark.parametrize(("length", "layers"), [(512, 48), (16384, 48), (16384, 96), (131072, 48), (131072, 400)])
def test_every_way_out_is_one_and_none_is_missing(gpu: str, length: int, layers: int) -> None:
    spec, profile, work = replace(spec_of(), layers=layers), profile_named(gpu), Workload(length=length)
    rows = plan_rows(spec, profile, work)

    def fits(found: PlanRow, where: str, tokens: int) -> bool:
        there = plan_rows(spec, profile_named(where), Workload(length=tokens))
        return row(there, found.precision, found.drafter).fits

    for found in rows:
        if "; fits: " not in found.reason:
            assert found.fits or "GB usable" not in found.reason
            continue
        said = found.reason.split("; fits: ")[1]
        expected = []
        if found.drafter and row(rows, found.precision).fits:
            expected.append(f"{found.precision} without drafter")
        others = [other.precision for other in rows if other.drafter == found.drafter and other.fits]
        if others:
            expected.append(f"{' or '.join(others)} here")
        larger = [f"{profile.kind}x{n}" for n in (2, 4, 8) if n > profile.count and not profile.is_cpu]
        if works := [name for name in larger if fits(found, name, length)]:
            expected.append(f"{found.precision} on {works[0]}")
        shorter = re.search(r"at length (\d+)$", said)
        if shorter:
            tokens = int(shorter[1])
            assert 1024 <= tokens < length
            assert fits(found, gpu, tokens)
            assert tokens < 8192 or not fits(found, gpu, tokens + 256), "the longest"
            expected.append(f"{found.precision} at length {tokens}")
        else:
            # Below 8k the planner's answer is careful: a shorter prompt needs less room for activations as well.
            assert not fits(found, gpu, 8192)
        assert said == (", or ".join(expected) or "nothing on this GPU; use a larger one or a smaller model")


def test_no_fp8_before_ada() -> None:
    a100 = profile_named("a100")
    refused = row(plan_rows(spec_of(), a100, WORK), "fp8")
    assert "8.9" in refused.reason
    assert (refused.max_rows, refused.tokens_per_second) == (0, None), "although there would be room"
    with pytest.raises(UnsupportedError, match="int8") as caught:
        check_precision(scheme_named("fp8"), a100)
    assert "compute capability 8.9" in str(caught.value)
    check_precision(scheme_named("fp8"), profile_named("l4"))
    check_precision(scheme_named("fp8"), profile_named("cpu"))


def test_a_head_or_vocabulary_that_cannot_be_split_is_refused() -> None:
    rows = plan_rows(spec_of(), profile_named("l4x4"), WORK)
    assert all(r.fits for r in rows)
    odd = plan_rows(replace(spec_of(), vocab=152065), profile_named("l4x4"), WORK)
    assert row(odd, "fp8").fits
    assert "152065" in row(odd, "fp8", "1x3").reason
    assert (
        "30 attention heads" in row(plan_rows(replace(spec_of(), heads=30), profile_named("l4x4"), WORK), "fp8").reason
    )


def built(spec: ModelSpec, gpu: GpuProfile, kv_dtype: KvDtype, precision: str, head: Path | None) -> bool:
    """Whether `trtkit build` takes the line."""
    scheme, tree = replace(scheme_named(precision), kv_dtype=kv_dtype), TreeShape(beams=1, length=3) if head else None
    try:
        check_precision(scheme, gpu)
        if gpu.is_cpu:
            check_alignment(spec, scheme)
        else:
            check_gpu(Recipe(model="m", precision=precision, gpu=gpu.name, kv_dtype=kv_dtype, tree=tree))
            check_trtllm(spec, scheme, TrtllmOptions(tensor_parallel=gpu.count, drafter=head, tree=tree))
    except UnsupportedError:
        return False
    return True


def test_what_a_build_refuses_does_not_fit_and_nothing_else(tmp_path: Path) -> None:
    small = [
        replace(spec_of(), layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                intermediate=intermediate, vocab=vocab)
        for layers, hidden, heads, kv_heads, head_dim, intermediate, vocab in (
            (28, 1536, 12, 2, 128, 8960, 151936), (28, 3584, 28, 4, 128, 18944, 152064),
            (28, 1024, 16, 8, 128, 3072, 151936), (2, 192, 6, 3, 32, 500, 333), (2, 512, 8, 1, 32, 1024, 512),
        )
    ]  # fmt: skip
    small.append(replace(small[0], rope=replace(small[0].rope, kind="yarn", factor=4.0, truncate=False)))
    small.append(replace(small[0], rope=replace(small[0].rope, kind="llama3", factor=8.0, truncate=True)))
    for number, spec in enumerate([spec_of(), spec_of("fast-math-qwen3-14b"), *small]):
        head = tmp_path / str(number)
        head.mkdir()
        (head / "config.json").write_text(json.dumps(asdict(default_draft(spec).head)))
        for gpu in GPUS.values():
            large = replace(gpu, memory_bytes=1 << 50)  # so that size is no reason
            for kv_dtype in get_args(KvDtype):
                for found in plan_rows(spec, large, Workload(kv_dtype=kv_dtype)):
                    wanted = built(spec, gpu, kv_dtype, found.precision, head if found.drafter else None)
                    assert found.fits == wanted, (spec, gpu.name, kv_dtype, found)


@pytest.mark.parametrize(
    ("rows", "dtype", "value_bytes"),
    [(0, torch.bfloat16, 2), (3, torch.bfloat16, 2), (5, torch.bfloat16, 2), (3, torch.float32, 4),
     (3, torch.float16, 4)],
)  # fmt: skip
def test_on_a_cpu_as_many_rows_fit_as_the_runtime_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, value_bytes: int
) -> None:
    directory = tiny_engine_dir(tmp_path, dtype=dtype)
    spec, work, scheme = read_model_spec(directory), Workload(batch=16, length=256), scheme_named("bf16")
    weights = memory_plan(spec, scheme, profile_named("cpu"), work).weight_bytes
    free = int(4 * (rows + 0.5) * work.length * spec.kv_bytes_per_token(value_bytes))
    computer = replace(profile_named("cpu"), memory_bytes=weights + free)
    assert memory_plan(spec, scheme, computer, work).max_rows == rows
    monkeypatch.setattr(load, "free_bytes", lambda device: free)  # once the weights are there
    if rows == 0:
        with pytest.raises(CapacityError):
            load.open_engine(directory, load.OpenOptions(device="cpu"))
        return
    with load.open_engine(directory, load.OpenOptions(device="cpu")) as engine:
        assert engine.stats().kv_blocks * 16 // work.length == rows


@pytest.mark.parametrize("kv_dtype", get_args(KvDtype))
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
def test_a_tokens_keys_and_values_take_what_the_runtime_takes(dtype: torch.dtype, name: Any, kv_dtype: KvDtype) -> None:
    spec = replace(spec_of(), dtype=name)
    plan = memory_plan(spec, scheme_named("bf16"), profile_named("cpu"), Workload(kv_dtype=kv_dtype))
    assert plan.kv_bytes_per_token * 16 == kv_block_bytes(spec, kv_dtype, dtype, 16)


def test_keys_and_values_are_split_by_heads_and_repeated_where_there_are_too_few() -> None:
    spec = replace(spec_of(), layers=10, kv_heads=2, head_dim=128)
    per_head = 2 * 10 * 128 * 2  # keys and values of all layers, 16 bit
    for gpu, heads in (("l4", 2), ("l4x2", 1), ("l4x4", 1), ("l4x8", 1)):
        assert memory_plan(spec, scheme_named("fp8"), profile_named(gpu), WORK).kv_bytes_per_token == heads * per_head


def test_on_a_cpu_a_quarter_of_what_weights_and_draft_head_leave_is_for_keys_and_values() -> None:
    spec, computer = spec_of(), replace(profile_named("cpu"), memory_bytes=64 << 30)
    head = default_draft(spec)
    for draft, bytes_of_head in ((None, 0), (head, 2 * head.head.parameters)):
        plan = memory_plan(spec, scheme_named("bf16"), computer, WORK, draft)
        assert plan.kv_bytes == pytest.approx(((64 << 30) - 2 * spec.parameters - bytes_of_head) / 4, rel=1e-6)


def test_in_float32_a_cpu_keeps_every_weight_in_four_bytes_and_a_gpu_builds_16_bits() -> None:
    spec = replace(spec_of(), dtype="float32")
    for scheme in SCHEMES.values():
        for layer in get_args(OutputLayer):
            held = memory_plan(spec, scheme, profile_named("cpu"), WORK, output_layer=layer)
            assert held.weight_bytes == 4 * spec.parameters
        cost = [step_cost(replace(spec, dtype=name), scheme, profile_named("cpu"), WORK, 1)
                for name in ("float16", "float32")]  # fmt: skip
        assert cost[0] == cost[1]
        assert cost[0].read_bytes > 4 * (spec.parameters - spec.vocab * spec.hidden - spec.layers * 30_000)
        for name in ("h100", "l4x4"):
            plans = [memory_plan(replace(spec, dtype=d), scheme, profile_named(name), WORK)
                     for d in ("bfloat16", "float32")]  # fmt: skip
            assert plans[0] == plans[1]


@given(batch=st.integers(1, 64), length=st.integers(256, 32768), gpu=st.sampled_from(["l4", "l4x4", "h100", "h200"]))
def test_monotone(batch: int, length: int, gpu: str) -> None:
    """Longer rows never leave room for more of them; fewer bits never leave less; more rows are never slower."""
    spec, profile = spec_of(), profile_named(gpu)
    work, longer = Workload(batch=batch, length=length), Workload(batch=batch, length=length + 512)
    for name in SCHEMES:
        shorter_rows = memory_plan(spec, scheme_named(name), profile, work).max_rows
        assert memory_plan(spec, scheme_named(name), profile, longer).max_rows <= shorter_rows
    room = [memory_plan(spec, scheme_named(name), profile, work).kv_bytes for name in ("bf16", "fp8", "int4")]
    assert room == sorted(room)
    for found in plan_rows(spec, profile, work):
        assert found.fits == (found.tokens_per_second is not None) == (found.max_rows > 0)
        if not found.fits:
            assert found.reason
    more = {(r.precision, r.drafter): r for r in plan_rows(spec, profile, Workload(batch=batch + 1, length=length))}
    for found in plan_rows(spec, profile, work):
        other = more[found.precision, found.drafter]
        if found.fits and other.fits:
            assert (other.tokens_per_second or 0) >= (found.tokens_per_second or 0) * 0.999


def test_an_int8_output_layer_is_counted() -> None:
    spec, cpu = spec_of(), profile_named("cpu")
    head = 152064 * 5120
    read = [step_bytes(spec, scheme_named("int4"), rows=0, context=0, output_layer=o) for o in ("model", "int8")]
    assert read[0] - read[1] == head
    for tied in (False, True):
        shape = replace(spec, tied=tied)
        held = [memory_plan(shape, scheme_named("int4"), cpu, WORK, output_layer=o) for o in ("model", "int8")]
        # A tied matrix is there twice, once for the embeddings: they are read from rows, products from a packed copy.
        assert held[0].weight_bytes - held[1].weight_bytes == head
    assert step_cost(spec, scheme_named("int8"), cpu, WORK, 12).read_bytes - (
        step_cost(spec, scheme_named("int8"), cpu, WORK, 12, output_layer="int8").read_bytes
    ) == head  # fmt: skip


@pytest.mark.parametrize("gpu", ["cpu", "h100", "l4x4"])
def test_a_plan_counts_the_output_layer_of_the_backend_that_it_is_for(gpu: str) -> None:
    spec, profile = spec_of(), profile_named(gpu)
    for found in plan_rows(spec, profile, WORK):
        int8 = gpu == "cpu" and found.precision in ("int8", "int8-sq", "int4")
        assert found.output_layer == ("int8" if int8 else "model")
        scheme = scheme_named(found.precision)
        assert found.memory.weight_bytes == memory_plan(
            spec, scheme, profile, WORK, output_layer=found.output_layer
        ).weight_bytes  # fmt: skip
        if found.fits and found.drafter is None:
            cost = step_cost(spec, scheme, profile, WORK, min(12, found.max_rows), output_layer=found.output_layer)
            assert found.ceiling_tokens_per_second == pytest.approx(
                min(12, found.max_rows) * profile.bandwidth * profile.count / cost.read_bytes
            )


def test_step_bytes_of_the_14b_model() -> None:
    # 13.2B linear weights at one byte and the 16-bit lm_head: 14.8 GB, the figure of the published cost model.
    assert step_bytes(spec_of(), scheme_named("fp8"), rows=0, context=0) / 1e9 == pytest.approx(14.8, abs=0.1)
