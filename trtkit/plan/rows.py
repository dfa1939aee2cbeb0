"""The table of ``trtkit plan``: every precision with and without a drafter, whether it fits, and what to expect."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.gpu import GPUS, GpuProfile
from trtkit.model_spec import ModelSpec
from trtkit.plan.memory import DraftPlan, MemoryPlan, Workload, default_draft, memory_plan
from trtkit.plan.refusals import refusal
from trtkit.plan.speed import ceiling_tokens_per_second, step_cost, tokens_per_second
from trtkit.recipe import Backend, default_output_layer
from trtkit.scheme import SCHEMES, OutputLayer, QuantScheme

__all__ = ["INT4_CAUTION", "PlanRow", "plan_rows", "planned_backend"]

INT4_CAUTION = "int4 costs accuracy (published: about 8 points of maj@12)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One line of the answer: a precision with or without a drafter."""

    precision: str
    output_layer: OutputLayer
    drafter: str | None
    """The draft tree (``1x3``), None without a drafter."""
    fits: bool
    reason: str
    """Why it does not fit and what would; or a caution; may be empty."""
    max_rows: int
    """Rows of the asked length that fit at once."""
    tokens_per_second: float | None
    """All rows together, at the asked batch or at ``max_rows`` if that is less; None when it does not fit."""
    ceiling_tokens_per_second: float | None
    """The same at the data-sheet bandwidth and nothing else: what no system can exceed."""
    tokens_per_step: float
    memory: MemoryPlan


def planned_backend(gpu: GpuProfile) -> Backend:
    """The backend that a plan is for: compiled engines on GPUs, whose published speeds the estimate follows."""
    return "torch" if gpu.is_cpu else "tensorrt-llm"


def plan_rows(spec: ModelSpec, gpu: GpuProfile, work: Workload, draft: DraftPlan | None = None) -> list[PlanRow]:
    """Every precision, plain and with ``draft`` (by default the published head)."""
    draft = draft or default_draft(spec)
    return [_plan_row(spec, scheme, gpu, work, option) for scheme in SCHEMES.values() for option in (None, draft)]


def _plan_row(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None
) -> PlanRow:
    memory = _memory(spec, scheme, gpu, work, draft)
    reason = refusal(spec, scheme, gpu, work.kv_dtype, draft)
    if not reason and memory.max_rows < 1:
        reason = _too_large(spec, scheme, gpu, work, draft)
    fits = not reason
    rows = min(work.batch, memory.max_rows)
    step = 1.0 if draft is None else draft.tokens_per_step
    output_layer = default_output_layer(scheme.name, planned_backend(gpu))
    speed = ceiling = None
    if fits:
        cost = step_cost(spec, scheme, gpu, work, rows, draft, output_layer)
        speed = tokens_per_second(cost, gpu, rows, draft)
        ceiling = ceiling_tokens_per_second(cost, gpu, rows, draft)
        cautions = []
        if rows < work.batch:
            cautions.append(f"{rows} of {work.batch} rows at full length, the others wait")
        if scheme.name == "int4":
            cautions.append(INT4_CAUTION)
        reason = "; ".join(cautions)
    return PlanRow(
        precision=scheme.name, output_layer=output_layer, drafter=None if draft is None else str(draft.tree),
        fits=fits, reason=reason,
        max_rows=memory.max_rows if fits else 0, tokens_per_second=speed,
        ceiling_tokens_per_second=ceiling, tokens_per_step=step, memory=memory,
    )  # fmt: skip


def _memory(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None
) -> MemoryPlan:
    return memory_plan(spec, scheme, gpu, work, draft, default_output_layer(scheme.name, planned_backend(gpu)))


def _too_large(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None) -> str:
    memory = _memory(spec, scheme, gpu, work, draft)
    row = memory.kv_bytes_per_token * work.length
    needed = memory.usable_bytes - memory.kv_bytes + row
    text = f"needs {needed / 1e9:.1f} GB per device for one row, {memory.usable_bytes / 1e9:.1f} GB usable"
    return f"{text}; fits: {_what_fits(spec, scheme, gpu, work, draft)}"


def _what_fits(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None) -> str:
    def holds(other: QuantScheme, where: GpuProfile, drafting: DraftPlan | None) -> bool:
        return not refusal(spec, other, where, work.kv_dtype, drafting) and (
            _memory(spec, other, where, work, drafting).max_rows >= 1
        )

    options = []
    if draft is not None and holds(scheme, gpu, None):
        options.append(f"{scheme.name} without drafter")
    smaller = [other.name for other in SCHEMES.values() if other is not scheme and holds(other, gpu, draft)]
    if smaller:
        options.append(f"{' or '.join(smaller)} here")
    more = [other for other in GPUS.values() if other.kind == gpu.kind and other.count > gpu.count]
    larger = next((other for other in more if holds(scheme, other, draft)), None)
    if larger is not None:
        options.append(f"{scheme.name} on {larger.name}")
    shorter = _memory(spec, scheme, gpu, work, draft)
    tokens = int(shorter.kv_bytes // shorter.kv_bytes_per_token) // 256 * 256
    if tokens >= 1024:
        options.append(f"{scheme.name} at length {tokens}")
    return ", or ".join(options) or "nothing on this GPU; use a larger one or a smaller model"
