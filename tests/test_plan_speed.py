"""Steps that are bound by arithmetic, by reading and by the link, against data-sheet figures."""

from __future__ import annotations

from typing import Any

import pytest

from trtkit.gpu import profile_named
from trtkit.known_models import known_model
from trtkit.model_spec import ModelSpec
from trtkit.plan import Workload, default_draft, plan_rows
from trtkit.plan.speed import ceiling_tokens_per_second, step_cost, tokens_per_second
from trtkit.scheme import scheme_named

MANY = 100_000
"""So many rows that reading weights is nothing beside multiplying."""
SHORT = Workload(batch=MANY, length=4)
LINEARS = 48 * (5120 * (5120 + 2 * 1024) + 5120 * 5120 + 3 * 5120 * 13824)
HEAD = 152064 * 5120


def spec() -> ModelSpec:
    found = known_model("nemotron-14b")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gpu", "precision", "teraflops"),
    [("h100", "bf16", 989), ("h100", "fp8", 1979), ("h100", "int8", 989), ("h100", "int8-sq", 1979),
     ("h100", "int4", 989), ("a100", "int8-sq", 624), ("rtx4090", "int8-sq", 660), ("rtx4090", "fp8", 330),
     ("l40s", "fp8", 733)],
)  # fmt: skip
def test_many_rows_are_bound_by_the_units_that_multiply_the_format(gpu: str, precision: str, teraflops: float) -> None:
    """Two operations per weight and token at half of the dense figure; lm_head and attention in 16 bits always."""
    profile = profile_named(gpu)
    cost = step_cost(spec(), scheme_named(precision), profile, SHORT, MANY)
    plain = {"h100": 989, "a100": 312, "rtx4090": 165, "l40s": 362}[gpu] * 1e12
    linears = 2 * LINEARS * MANY / (0.5 * teraflops * 1e12)
    assert cost.seconds(profile) == pytest.approx(linears + 2 * HEAD * MANY / (0.5 * plain), rel=0.001)


def test_attention_multiplies_every_key_and_value_once() -> None:
    gpu, scheme = profile_named("h100"), scheme_named("bf16")
    short, long = (step_cost(spec(), scheme, gpu, Workload(length=length), 12) for length in (4096, 16384))
    # A query of 40 heads of 128 with (16384 - 4096) / 4 more keys, and as much again with values, in 48 layers.
    more = 12 * 48 * 2 * 2 * 40 * 128 * (16384 - 4096) / 4
    assert (long.multiply_seconds - short.multiply_seconds) * 989e12 == pytest.approx(more)


def test_several_devices_share_reading_and_multiplying_and_pay_the_link() -> None:
    scheme = scheme_named("bf16")
    one, two = profile_named("h100"), profile_named("h100x2")
    for rows, work in ((12, Workload()), (MANY, SHORT)):
        alone, shared = (step_cost(spec(), scheme, gpu, work, rows) for gpu in (one, two))
        assert alone.moved_bytes == 0
        # Two sums per layer of 16-bit vectors; in a ring of two, each device sends its half twice.
        assert shared.moved_bytes == 48 * 2 * rows * 5120 * 2
        assert alone.seconds(one) / 2 == pytest.approx(shared.seconds(two) - shared.moved_bytes / 300e9)


@pytest.mark.parametrize("gpu", ["h100", "l4x4"])
def test_a_draft_head_costs_its_reading_its_arithmetic_and_a_tree_of_tokens(gpu: str) -> None:
    draft, profile, scheme = default_draft(spec()), profile_named(gpu), scheme_named("fp8")
    plain, drafting = (step_cost(spec(), scheme, profile, Workload(), 12, option) for option in (None, draft))
    # Its blocks and its output layer are read for each of the three drafted positions.
    assert drafting.read_bytes - plain.read_bytes == 3 * 2 * draft.head.parameters
    # The tree has one beam of three tokens behind the token that is sure.
    head = 2 * 12 * 3 * draft.head.parameters / profile.flops["bf16"] / profile.count
    assert drafting.multiply_seconds == pytest.approx(4 * plain.multiply_seconds + head)
    assert drafting.moved_bytes == 4 * plain.moved_bytes


@pytest.mark.parametrize("gpu", ["h100", "l4x4", "cpu"])
def test_a_ceiling_is_the_data_sheet_and_counts_what_a_step_emits(gpu: str) -> None:
    profile, draft = profile_named(gpu), default_draft(spec())
    for option, per_step in ((None, 1.0), (draft, 1 + 0.65 ** (1 / 3) + 0.65 ** (2 / 3) + 0.65)):
        cost = step_cost(spec(), scheme_named("int4"), profile, Workload(), 12, option)
        seconds = cost.read_bytes / profile.bandwidth / profile.count
        assert ceiling_tokens_per_second(cost, profile, 12, option) == pytest.approx(12 * per_step / seconds)
        assert tokens_per_second(cost, profile, 12, option) == pytest.approx(12 * per_step / cost.seconds(profile))


def test_rows_that_wait_for_room_are_not_counted() -> None:
    few: dict[str, Any] = {row.precision: row for row in plan_rows(spec(), profile_named("l4x2"), Workload(batch=64))
                           if row.drafter is None and row.fits}  # fmt: skip
    assert few
    for row in few.values():
        assert row.max_rows < 64
        same = plan_rows(spec(), profile_named("l4x2"), Workload(batch=row.max_rows))
        found = next(other for other in same if (other.precision, other.drafter) == (row.precision, None))
        # Fewer rows asked leave a little more room, but no more rows decode.
        assert row.tokens_per_second == pytest.approx(found.tokens_per_second)
