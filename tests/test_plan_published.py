"""The planner beside the published figures, and its constants beside the fit that they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trtkit.gpu import profile_named
from trtkit.known_models import known_model
from trtkit.model_spec import ModelSpec
from trtkit.plan import Workload, default_draft, plan_rows, step_bytes
from trtkit.plan.published import PUBLISHED, Comparison, compare
from trtkit.plan.speed import LINK_BANDWIDTH, READ_SHARE
from trtkit.scheme import scheme_named

BEYOND_ANY_SHARE = ("tutorial", "fp8", False)
"""Published 2.17 x bf16 where the bytes differ by 1.64; the same benchmark in the notebook says 1.71."""


def spec_of() -> ModelSpec:
    spec = known_model("nemotron-14b")
    assert spec is not None
    return spec


def line_of(item: Comparison) -> tuple[str, str, bool]:
    return item.published.source, item.published.precision, item.published.drafter


def test_published_speeds_within_20_percent_and_ratios_within_15() -> None:
    found = compare()
    assert len(found) == 11
    assert {line_of(item) for item in found if abs(item.error) > 0.20} == set()
    assert {line_of(item) for item in found if abs(item.ratio_error) > 0.15} == {BEYOND_ANY_SHARE}


def test_the_published_speeds_are_the_published_ones() -> None:
    """4xL4: arXiv 2504.16891 table 9. 2xH100: ten requests at 34.6, 75.2 and 138.5 tok/s, 4.0x from end to end."""
    speeds = {line_of(item): item.published.tokens_per_second for item in compare()}
    paper = [speeds["paper", name, False] for name in ("bf16", "int8", "int4", "fp8")]
    assert [*paper, speeds["paper", "fp8", True]] == [210, 315, 436, 310, 554]
    tutorial = [speeds["tutorial", "bf16", False], speeds["tutorial", "fp8", False], speeds["tutorial", "fp8", True]]
    assert tutorial == pytest.approx([346, 752, 1385])
    assert tutorial[2] / tutorial[0] == pytest.approx(4.0, abs=0.05)


def test_the_table_of_the_command_gives_the_published_answers() -> None:
    """What ``trtkit plan --gpu l4x4`` prints is what ``compare`` compares."""
    rows = plan_rows(spec_of(), profile_named("l4x4"), Workload(batch=12, length=16384))
    for item in compare():
        if item.published.gpu == "l4x4":
            drafter = "1x3" if item.published.drafter else None
            found = next(r for r in rows if (r.precision, r.drafter) == (item.published.precision, drafter))
            assert found.tokens_per_second == pytest.approx(item.planner)


def test_the_three_constants_are_the_least_squares_fit() -> None:
    """A step takes read / (bandwidth share) + moved / link: linear in 1 / share and 1 / link. Refitted here from the
    published speeds, on the relative error of the step's duration."""
    spec, draft = spec_of(), default_draft(spec_of())
    per_step = 1 + 0.65 ** (1 / 3) + 0.65 ** (2 / 3) + 0.65
    weights, known = [], []
    for item in PUBLISHED:
        l4 = item.gpu == "l4x4"
        devices, bandwidth, context = (4, 300e9, 4096) if l4 else (2, 3350e9, 2500)
        read = step_bytes(spec, scheme_named(item.precision), rows=12, context=context,
                          draft=draft if item.drafter else None)  # fmt: skip
        nodes = 4 if item.drafter else 1
        # 48 layers, two sums each, 16-bit vectors of 5120, around a ring.
        moved = 48 * 2 * 12 * nodes * 5120 * 2 * 2 * (devices - 1) / devices
        seconds = 12 * (per_step if item.drafter else 1) / item.tokens_per_second
        reading = read / (devices * bandwidth) / seconds
        weights.append([reading, 0, moved / seconds] if l4 else [0, reading, 0])
        known.append(1 if l4 else 1 - moved / 300e9 / seconds)
    fit = 1 / np.linalg.lstsq(np.array(weights), np.array(known), rcond=None)[0]
    assert READ_SHARE["gddr"] == pytest.approx(fit[0], rel=0.005)
    assert READ_SHARE["hbm"] == pytest.approx(fit[1], rel=0.005)
    assert LINK_BANDWIDTH["host"] == pytest.approx(fit[2], rel=0.005)


def test_no_share_explains_the_tutorials_bf16_run() -> None:
    """The miss named above is not a matter of constants: published 2.17, and a step that does nothing but read gives
    1.64 (1.9 even with no keys and values at all). A fixed cost per step or layer would lower it further."""
    spec, context = spec_of(), 2500
    both = [step_bytes(spec, scheme_named(name), rows=12, context=context) for name in ("bf16", "fp8")]
    assert both[0] / both[1] == pytest.approx(1.64, abs=0.01)
    bare = [step_bytes(spec, scheme_named(name), rows=0, context=0) for name in ("bf16", "fp8")]
    assert bare[0] / bare[1] < 1.9


def test_the_documented_table_is_the_planners() -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("## The planner against published figures")[1].split("\n## ")[0]
    for item in compare():
        engine = item.published.precision + (" + drafter" if item.published.drafter else "")
        cells = (
            item.published.source, item.published.gpu, engine, f"{item.published.tokens_per_second:,.0f}",
            f"{item.planner:,.0f}", f"{item.error:+.1%}", f"{item.published_ratio:.2f}", f"{item.planner_ratio:.2f}",
            f"{item.ratio_error:+.1%}",
        )  # fmt: skip
        assert f"| {' | '.join(cells)} |" in section
