"""What fits on a GPU and how fast it should decode: pure arithmetic, no GPU and no torch needed.

Memory per device: weights (embeddings and lm_head stay 16 bit) + draft head + workspace; what is left holds keys and
values. Speed: a decode step reads every weight once and every row's keys and values, multiplies, and (with several
devices) adds up partial sums over the link::

    step = max(read, multiply) + exchange        tokens per second = rows x tokens per step / step

Two fitted constants (``READ_EFFICIENCY`` here, the link of PCIe cards in ``gpu``) bring this to within 10 % of the
published 14B figures on 4xL4 at batch 12 (NemoSkills, AIMO-2): bf16 210, int8 315, fp8 310, int4 436 and fp8 with
draft head 554 tok/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from drafter.config import DrafterConfig, TreeShape
from trtkit.errors import UnsupportedError
from trtkit.gpu import GPUS, GpuProfile, capability_text
from trtkit.model_spec import ModelSpec
from trtkit.scheme import SCHEMES, KvDtype, QuantScheme

__all__ = ["DraftPlan", "MemoryPlan", "PlanRow", "Workload", "check_precision", "default_draft", "memory_plan",
           "plan_rows", "step_bytes"]  # fmt: skip

READ_EFFICIENCY = 0.60
"""Fitted: share of the data-sheet bandwidth that a whole decode step reaches, kernel launches and small operations
included. (The other fitted constant of the 4xL4 figures is the link's bandwidth, in ``gpu``.)"""
MULTIPLY_EFFICIENCY = 0.5
"""Share of the dense FLOP/s reached by skinny matrix products. Decoding below some 100 rows is bound by reading, so the
published figures do not depend on it."""
ACCEPT_PER_DEPTH = 0.65 ** (1 / 3)
"""Published for the 14B draft head: all three drafted tokens are accepted in 65 % of the steps."""
MEMORY_FRACTION = 0.92
"""Share of the device memory that is used at all: the serving setting of the published runs."""
RUNTIME_BYTES = 600 << 20
"""CUDA context, communication buffers, kernels."""
_WORKSPACE_TOKENS = 8192
"""Tokens of one prefill chunk whose activations exist at once."""
_KV_BYTES: dict[KvDtype, float] = {"model": 2.0, "fp8": 1.0, "int8": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A draft head and the tree it draws in every step."""

    head: DrafterConfig
    tree: TreeShape
    accept_per_depth: float = ACCEPT_PER_DEPTH

    @property
    def tokens_per_step(self) -> float:
        """One token for sure, one more for every depth reached (along the best beam)."""
        return sum(self.accept_per_depth**depth for depth in range(self.tree.length + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the GPU is asked to do."""

    batch: int = 12
    length: int = 16384
    """Longest prompt + answer: memory is planned for it."""
    kv_dtype: KvDtype = "model"

    @property
    def context(self) -> float:
        """Mean tokens in a row's cache while it decodes. Published samples use about half of their budget, and a row
        is on average half way through its sample."""
        return self.length / 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes per device."""

    usable_bytes: int
    weight_bytes: int
    draft_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: float
    length: int

    @property
    def kv_bytes(self) -> int:
        """What is left for keys and values; negative when the weights alone do not fit."""
        return self.usable_bytes - self.weight_bytes - self.draft_bytes - self.workspace_bytes

    @property
    def max_rows(self) -> int:
        """Rows of full length that fit at once."""
        return max(0, int(self.kv_bytes // (self.kv_bytes_per_token * self.length)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One line of the answer: a precision with or without a drafter."""

    precision: str
    drafter: str | None
    """The draft tree (``1x3``), None without a drafter."""
    fits: bool
    reason: str
    """Why it does not fit and what would; or a caution; may be empty."""
    max_rows: int
    tokens_per_second: float | None
    """All rows together, at the asked batch or at ``max_rows`` if that is less; None when it does not fit."""
    tokens_per_step: float
    memory: MemoryPlan


def default_draft(spec: ModelSpec) -> DraftPlan:
    """The published head (two blocks, exit_dim 2 H, recurrent) with one beam of three tokens."""
    head = DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=2 * spec.hidden)
    return DraftPlan(head=head, tree=TreeShape(beams=1, length=3))


def check_precision(scheme: QuantScheme, gpu: GpuProfile) -> None:
    """Raise :class:`UnsupportedError` when ``gpu`` has no units for ``scheme``. A CPU runs them all (some emulated)."""
    if gpu.capability is None or gpu.capability >= scheme.min_capability:
        return
    able = [other.name for other in SCHEMES.values() if gpu.capability >= other.min_capability]
    raise UnsupportedError(
        f"{scheme.name} needs compute capability {capability_text(scheme.min_capability)}, "
        f"{gpu.title} has {capability_text(gpu.capability)}",
        hint=f"{gpu.title} runs: {', '.join(able)}",
    )


def memory_plan(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None = None
) -> MemoryPlan:
    """Memory of one device when the model is split over all ``gpu.count`` of them."""
    linears = _linear_values(spec)
    other = spec.parameters - linears
    weights = linears * scheme.weight_bytes_per_value + 2 * other
    nodes = 1 if draft is None else draft.tree.max_nodes
    # Activations of one prefill chunk (input, residual, gate and up at once) and float32 logits of every row and node.
    workspace = RUNTIME_BYTES if not gpu.is_cpu else 0
    chunk = min(_WORKSPACE_TOKENS, work.length)
    workspace += chunk * (4 * spec.hidden + 3 * spec.intermediate // gpu.count) * 2
    workspace += 2 * 4 * work.batch * nodes * spec.vocab // gpu.count
    # Fewer KV heads than devices: heads are repeated, so the cache shrinks no further.
    share = max(spec.kv_heads / gpu.count, 1) / spec.kv_heads
    return MemoryPlan(
        usable_bytes=int(gpu.memory_bytes * MEMORY_FRACTION),
        weight_bytes=int(weights / gpu.count),
        draft_bytes=0 if draft is None else 2 * draft.head.parameters // gpu.count,
        workspace_bytes=workspace,
        kv_bytes_per_token=spec.kv_bytes_per_token(_KV_BYTES[work.kv_dtype]) * share,
        length=work.length,
    )


def step_bytes(
    spec: ModelSpec, scheme: QuantScheme, *, rows: int, context: float, kv_dtype: KvDtype = "model",
    draft: DraftPlan | None = None,
) -> float:  # fmt: skip
    """Bytes that one decode step reads over all devices: every linear, lm_head, the rows' keys and values, and the
    draft head once per drafted position. The embedding table is looked up, not read."""
    weights = _linear_values(spec) * scheme.weight_bytes_per_value + 2 * spec.vocab * spec.hidden
    cache = rows * context * spec.kv_bytes_per_token(_KV_BYTES[kv_dtype])
    drafting = 0.0 if draft is None else 2.0 * draft.head.parameters * draft.tree.length
    return weights + cache + drafting


def _linear_values(spec: ModelSpec) -> int:
    return spec.layers * sum(out * width for out, width in spec.linear_shapes.values())


def _step_seconds(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, rows: int, draft: DraftPlan | None
) -> float:
    nodes = 1 if draft is None else draft.tree.max_nodes
    tokens = rows * nodes
    read = step_bytes(spec, scheme, rows=rows, context=work.context, kv_dtype=work.kv_dtype, draft=draft)
    reading = read / (gpu.bandwidth * gpu.count * READ_EFFICIENCY)
    unit = scheme.activations if scheme.activations in gpu.flops else "bf16"
    linear = 2 * tokens * _linear_values(spec) / gpu.flops[unit]
    other = 2 * tokens * (spec.vocab * spec.hidden + 2 * work.context * spec.layers * spec.q_width) / gpu.flops["bf16"]
    if draft is not None:
        other += 2 * rows * draft.tree.beams * draft.tree.length * draft.head.parameters / gpu.flops["bf16"]
    multiplying = (linear + other) / (gpu.count * MULTIPLY_EFFICIENCY)
    # Two all-reduces per layer of 16-bit hidden states; a ring moves 2 (n - 1) / n of the bytes.
    moved = 2 * spec.layers * tokens * spec.hidden * 2 * 2 * (gpu.count - 1) / gpu.count
    return max(reading, multiplying) + moved / gpu.link_bandwidth


def plan_rows(spec: ModelSpec, gpu: GpuProfile, work: Workload, draft: DraftPlan | None = None) -> list[PlanRow]:
    """Every precision, plain and with ``draft`` (by default the published head)."""
    draft = draft or default_draft(spec)
    return [_plan_row(spec, scheme, gpu, work, option) for scheme in SCHEMES.values() for option in (None, draft)]


def _plan_row(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None
) -> PlanRow:
    memory = memory_plan(spec, scheme, gpu, work, draft)
    reason = _refusal(spec, scheme, gpu, draft)
    if not reason and memory.max_rows < 1:
        reason = _too_large(spec, scheme, gpu, work, draft)
    fits = not reason
    rows = min(work.batch, memory.max_rows)
    step = 1.0 if draft is None else draft.tokens_per_step
    speed = rows * step / _step_seconds(spec, scheme, gpu, work, rows, draft) if fits else None
    if fits:
        cautions = []
        if rows < work.batch:
            cautions.append(f"{rows} of {work.batch} rows at full length, the others wait")
        if scheme.name == "int4":
            cautions.append("int4 costs accuracy (published: about 8 points of maj@12)")
        reason = "; ".join(cautions)
    return PlanRow(
        precision=scheme.name, drafter=None if draft is None else str(draft.tree), fits=fits, reason=reason,
        max_rows=memory.max_rows if fits else 0, tokens_per_second=speed, tokens_per_step=step, memory=memory,
    )  # fmt: skip


def _refusal(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, draft: DraftPlan | None) -> str:
    """Why this cannot run at any size."""
    try:
        check_precision(scheme, gpu)
    except UnsupportedError as problem:
        return problem.message
    if spec.heads % gpu.count:
        return f"{spec.heads} attention heads cannot be split over {gpu.count} devices"
    if draft is not None and spec.vocab % gpu.count:
        return f"a vocabulary of {spec.vocab} cannot be split over {gpu.count} devices, which the drafter needs"
    if spec.family == "qwen3" and scheme.name == "int8-sq" and not gpu.is_cpu:
        return "TensorRT-LLM does not support Qwen3 with SmoothQuant (the torch backend does)"
    return ""


def _too_large(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None) -> str:
    memory = memory_plan(spec, scheme, gpu, work, draft)
    row = memory.kv_bytes_per_token * work.length
    needed = memory.usable_bytes - memory.kv_bytes + row
    text = f"needs {needed / 1e9:.1f} GB per device for one row, {memory.usable_bytes / 1e9:.1f} GB usable"
    return f"{text}; fits: {_what_fits(spec, scheme, gpu, work, draft)}"


def _what_fits(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None) -> str:
    def holds(other: QuantScheme, where: GpuProfile, drafting: DraftPlan | None) -> bool:
        return not _refusal(spec, other, where, drafting) and (
            memory_plan(spec, other, where, work, drafting).max_rows >= 1
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
    shorter = memory_plan(spec, scheme, gpu, work, draft)
    tokens = int(shorter.kv_bytes // shorter.kv_bytes_per_token) // 256 * 256
    if tokens >= 1024:
        options.append(f"{scheme.name} at length {tokens}")
    return ", or ".join(options) or "nothing on this GPU; use a larger one or a smaller model"
