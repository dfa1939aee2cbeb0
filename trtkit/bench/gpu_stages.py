"""The stages of ``scripts/gpu_bench``: what each measures, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trtkit.bench.device_clock import copy_bandwidth
from trtkit.bench.gpu_machine import environment
from trtkit.bench.gpu_points import BLOCK_SIZE, PointPlan
from trtkit.bench.gpu_ranks import SharedPlan
from trtkit.bench.gpu_subprocess import ENDING_SECONDS, gpu_tests, peer_figures
from trtkit.bench.random_model import random_head, shape_spec
from trtkit.checkpoint.rank_share import can_share
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.scheme import Precision, scheme_named

if TYPE_CHECKING:
    from trtkit.bench.gpu import GpuBench

__all__ = ["PUBLISHED_ACCEPTANCE", "STAGES", "Stage", "bandwidth"]

PUBLISHED_ACCEPTANCE = (0.86, 0.74, 0.65)
"""Shares of steps that accept at least 1, 2, 3 drafted tokens. Published for the 14B head: all three in 65 % of the
steps; the first two are about what a constant chance per depth gives."""
DRAFT_VOCABULARY = 32768
"""Of the trimmed head that is measured beside the published one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What runs on its own, and its share of the budget."""

    work: Callable[[GpuBench], None]
    least_seconds: float = 0.0
    """Without so much left it does not begin."""
    most_seconds: float = 60.0
    """What hangs takes no more from the others."""


def _environment(bench: GpuBench) -> None:
    facts = {"shape": bench.options.shape, **environment(bench.options.device)}
    bench.document["environment"] = facts
    bench.say("  " + ", ".join(f"{key} {value}" for key, value in facts.items()))


def bandwidth(bench: GpuBench) -> None:
    """What all shares are of."""
    bench.document["copy_bytes_per_second"] = copy_bandwidth(bench.options.device)
    bench.say(f"  copy: {bench.document['copy_bytes_per_second'] / 1e9:.0f} GB/s, read plus written")


def _precision(precision: Precision) -> Callable[[GpuBench], None]:
    """1 and 12 rows, each step read before the next one is launched; then as the engine runs by default, each launched
    before the one in flight is read; fp8 with keys and values of 8 bits too. The profiler comes last: of all that runs
    here it is the likeliest to bring the process down."""

    def work(bench: GpuBench) -> None:
        options = bench.options
        plans = [
            PointPlan(precision=precision, rows=rows, context=options.context, steps=options.steps, overlap=overlap)
            for overlap in (False, True)
            for rows in (1, 12)
        ]
        if precision == "fp8":
            plans.append(
                PointPlan(
                    precision="fp8", rows=12, context=options.context, steps=options.steps, kv_dtype="fp8",
                    overlap=True,
                )
            )  # fmt: skip
        found = [bench.point(plan) for plan in plans]
        for plan, figures in zip(plans, found, strict=True):
            if not plan.overlap:
                bench.profile(plan, figures)

    return work


def _draft(bench: GpuBench) -> None:
    """fp8 with the draft head. Acceptance is forced to the published profile: not a model's own."""
    options, spec = bench.options, shape_spec(bench.options.shape)
    for vocabulary in (None, 64 if options.tiny else DRAFT_VOCABULARY):
        head = random_head(spec, device=options.device, dtype=options.dtype, vocabulary=vocabulary)
        notes = {"draft_vocabulary": vocabulary or spec.vocab, "acceptance": "forced, not a model's"}
        plain, ahead = (
            PointPlan(
                precision="fp8", rows=12, context=options.context, steps=options.steps, shares=PUBLISHED_ACCEPTANCE,
                overlap=overlap,
            )
            for overlap in (False, True)
        )  # fmt: skip
        figures = bench.point(plain, head, **notes)
        bench.point(ahead, head, **notes)
        bench.profile(plain, figures, head)
        del head
        bench.free()


def _long(bench: GpuBench) -> None:
    """64 rows of 16k tokens with fp8 weights, in a cache of 8 bits where 16 do not fit; fewer rows where neither do."""
    options, spec = bench.options, shape_spec(bench.options.shape)
    context, steps = (512, 4) if options.tiny else (16384, 16)
    model = bench.model("fp8")
    bench.free()
    free = torch.cuda.mem_get_info()[0] - (3 << 30) if options.device.type == "cuda" else 1 << 30
    needs = {}
    for kv_dtype in ("model", "fp8"):
        plan = PointPlan(precision="fp8", rows=64, context=context, steps=steps, kv_dtype=kv_dtype)
        block = kv_block_bytes(spec, plan.kv_dtype, model.dtype, BLOCK_SIZE)
        needs[kv_dtype] = plan.blocks * block
        if needs[kv_dtype] <= free:
            break
    rows = min(64, int(free // (needs[plan.kv_dtype] / 64)))
    bench.document["long"] = {"free_bytes": free, "needed_bytes": needs, "rows": rows, "kv_dtype": plan.kv_dtype}
    if rows < 64:
        bench.say(f"  64 rows need {needs['fp8'] / 1e9:.0f} GB of cache, {free / 1e9:.0f} GB are free: {rows} rows")
    bench.point(PointPlan(precision="fp8", rows=rows, context=context, steps=steps, kv_dtype=plan.kv_dtype))


def _ranks(bench: GpuBench) -> None:
    """One engine over all GPUs, at the batch and in the precisions of the published 4xL4 figures. On a CPU, for trying,
    over two processes."""
    options, spec = bench.options, shape_spec(bench.options.shape)
    here = torch.cuda.device_count() if options.device.type == "cuda" else 2
    ranks = next((count for count in (8, 4, 2) if count <= here and can_share(spec, scheme_named("bf16"), count)), 1)
    if ranks == 1:
        bench.say("  one GPU: nothing to share")
        return
    bench.drop()
    kinds: list[tuple[Precision, tuple[float, ...], int | None]] = [
        ("bf16", (), None), ("int8", (), None), ("int4", (), None), ("fp8", (), None),
        ("fp8", PUBLISHED_ACCEPTANCE, None), ("fp8", PUBLISHED_ACCEPTANCE, 64 if options.tiny else DRAFT_VOCABULARY),
    ]  # fmt: skip
    for precision, shares, vocabulary in kinds:
        if not can_share(spec, scheme_named(precision), ranks):
            bench.say(f"  {precision}: its groups cannot be shared out over {ranks}")
            continue
        point = PointPlan(
            precision=precision, rows=12, context=options.context, steps=options.steps, shares=shares, overlap=True
        )
        bench.shared(
            SharedPlan(
                shape=options.shape, device=options.device.type, ranks=ranks, point=point, draft_vocabulary=vocabulary
            )
        )


def _peer(bench: GpuBench) -> None:
    bench.drop()
    options = bench.options
    limit = _beside(bench) if not options.tiny else 100.0
    new_tokens = 8 if options.tiny else 64
    bench.document["transformers"] = peer_figures(options.shape, options.device, options.context, new_tokens, limit)


def _tests(bench: GpuBench) -> None:
    bench.drop()
    bench.document["gpu_tests"] = found = gpu_tests(_beside(bench))
    bench.say("  " + found["summary"])


def _beside(bench: GpuBench) -> float:
    """Seconds for a process of its own: that it ends, and is heard, within the time of its stage."""
    return min(150.0, max(bench.left, 20.0) - ENDING_SECONDS)


STAGES: dict[str, Stage] = {
    "environment": Stage(work=_environment),
    "bandwidth": Stage(work=bandwidth),
    "bf16": Stage(work=_precision("bf16"), least_seconds=15, most_seconds=150),
    "fp8": Stage(work=_precision("fp8"), least_seconds=15, most_seconds=120),
    "draft": Stage(work=_draft, least_seconds=20, most_seconds=120),
    "long": Stage(work=_long, least_seconds=25, most_seconds=90),
    "int4": Stage(work=_precision("int4"), least_seconds=15, most_seconds=90),
    "int8": Stage(work=_precision("int8"), least_seconds=15, most_seconds=90),
    "ranks": Stage(work=_ranks, least_seconds=30, most_seconds=240),
    "tests": Stage(work=_tests, least_seconds=30, most_seconds=180),
    "peer": Stage(work=_peer, least_seconds=45, most_seconds=180),
}
"""In their order."""
