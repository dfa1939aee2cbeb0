from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import UnsupportedError
from trtkit.gpu import profile_named
from trtkit.known_models import KNOWN_MODELS, known_model
from trtkit.model_spec import ModelSpec
from trtkit.plan import (
    PlanRow,
    Workload,
    check_precision,
    default_draft,
    memory_plan,
    plan_rows,
    step_bytes,
)
from trtkit.scheme import SCHEMES, scheme_named

WORK = Workload(batch=12, length=16384)


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


@pytest.mark.parametrize(
    ("precision", "drafter", "published"),
    [("bf16", None, 210), ("int8", None, 315), ("int4", None, 436), ("fp8", None, 310), ("fp8", "1x3", 554)],
)
def test_the_published_speeds_of_four_l4_cards(precision: str, drafter: str | None, published: float) -> None:
    found = row(plan_rows(spec_of(), profile_named("l4x4"), WORK), precision, drafter).tokens_per_second
    assert found == pytest.approx(published, rel=0.1)


def test_the_published_gain_on_two_h100() -> None:
    rows = plan_rows(spec_of(), profile_named("h100x2"), WORK)
    both, plain = row(rows, "fp8", "1x3").tokens_per_second, row(rows, "bf16").tokens_per_second
    assert both is not None
    assert plain is not None
    # Published 4.0x. The estimate is low because the published bf16 run was slower than its bandwidth explains.
    assert both / plain == pytest.approx(4.0, rel=0.4)


def test_what_does_not_fit_says_what_would() -> None:
    rows = plan_rows(spec_of(), profile_named("l4"), WORK)
    bf16 = row(rows, "bf16")
    assert (bf16.fits, bf16.max_rows, bf16.tokens_per_second) == (False, 0, None)
    assert "int4" in bf16.reason
    assert "bf16 on l4x2" in bf16.reason
    assert "without drafter" in row(rows, "fp8", "1x3").reason
    assert "rows at full length" in row(rows, "fp8").reason


def test_no_fp8_before_ada() -> None:
    a100 = profile_named("a100")
    assert "8.9" in row(plan_rows(spec_of(), a100, WORK), "fp8").reason
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


def test_step_bytes_of_the_14b_model() -> None:
    # 13.2B linear weights at one byte and the 16-bit lm_head: 14.8 GB, the figure of the published cost model.
    assert step_bytes(spec_of(), scheme_named("fp8"), rows=0, context=0) / 1e9 == pytest.approx(14.8, abs=0.1)
