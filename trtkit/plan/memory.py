"""What fits: weights (embeddings stay 16 bit, and lm_head too unless it is said), the draft head and workspace; what is
left holds keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from drafter.config import DrafterConfig, TreeShape
from trtkit.gpu import GpuProfile
from trtkit.model_spec import Dtype, ModelSpec
from trtkit.scheme import KvDtype, OutputLayer, QuantScheme

__all__ = [
    "CPU_KV_SHARE",
    "DraftPlan",
    "MemoryPlan",
    "ValueBytes",
    "Workload",
    "default_draft",
    "linear_values",
    "memory_plan",
    "runtime_dtype",
    "value_bytes",
]

ACCEPT_PER_DEPTH = 0.65 ** (1 / 3)
"""Published for the 14B draft head: all three drafted tokens are accepted in 65 % of the steps."""
MEMORY_FRACTION = 0.92
"""Share of the device memory that is used at all: the serving setting of the published runs."""
CPU_KV_SHARE = 0.25
"""Of a computer's free memory the torch runtime takes this share for keys and values; the rest is for others."""
RUNTIME_BYTES = 600 << 20
"""CUDA context, communication buffers, kernels."""
_WORKSPACE_TOKENS = 8192
"""Tokens of one prefill chunk whose activations exist at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueBytes:
    """Bytes per value at run time, by what the engine computes in."""

    plain: float = 2.0
    """Of an unquantized value. In float32 (4) the torch runtime expands quantized weights too: their codes have
    kernels for 16-bit arithmetic only."""

    def linear(self, scheme: QuantScheme) -> float:
        """Of the weight of a linear."""
        return scheme.weight_bytes_per_value if self.plain <= 2 else self.plain

    def output(self, layer: OutputLayer) -> float:
        """Of a weight of lm_head."""
        return 1.0 if layer == "int8" and self.plain <= 2 else self.plain

    def cache(self, kv_dtype: KvDtype) -> float:
        """Of a key or value."""
        return self.plain if kv_dtype == "model" else 1.0


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


def default_draft(spec: ModelSpec) -> DraftPlan:
    """The published head (two blocks, exit_dim 2 H, recurrent) with one beam of three tokens."""
    head = DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=2 * spec.hidden)
    return DraftPlan(head=head, tree=TreeShape(beams=1, length=3))


def runtime_dtype(spec: ModelSpec, *, on_cpu: bool) -> Dtype:
    """What the torch runtime computes in unless it is told: the checkpoint's dtype, but float32 for float16 on a CPU,
    which has no float16 kernels worth using."""
    return "float32" if spec.dtype == "float16" and on_cpu else spec.dtype


def value_bytes(spec: ModelSpec, gpu: GpuProfile) -> ValueBytes:
    """For the backend that a plan is for: compiled engines are 16 bit whatever the checkpoint is."""
    return ValueBytes(plain=4.0 if gpu.is_cpu and runtime_dtype(spec, on_cpu=True) == "float32" else 2.0)


def memory_plan(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, draft: DraftPlan | None = None,
    output_layer: OutputLayer = "model",
) -> MemoryPlan:  # fmt: skip
    """Memory of one device when the model is split over all ``gpu.count`` of them."""
    linears, per = linear_values(spec), value_bytes(spec, gpu)
    # Every device has the whole table of embeddings, and its share of lm_head apart, also where they are the same.
    table = spec.vocab * spec.hidden
    others = spec.parameters - linears - (1 if spec.tied else 2) * table
    shared = linears * per.linear(scheme) + per.plain * others + per.output(output_layer) * table
    nodes = 1 if draft is None else draft.tree.max_nodes
    # Activations of one prefill chunk (input, residual, gate and up at once) and float32 logits of every row and node.
    workspace = RUNTIME_BYTES if not gpu.is_cpu else 0
    chunk = min(_WORKSPACE_TOKENS, work.length)
    workspace += chunk * (4 * spec.hidden + 3 * spec.intermediate // gpu.count) * int(per.plain)
    workspace += 2 * 4 * work.batch * nodes * spec.vocab // gpu.count
    # Fewer KV heads than devices: heads are repeated, so the cache shrinks no further.
    share = max(spec.kv_heads / gpu.count, 1) / spec.kv_heads
    weight_bytes = int(per.plain * table + shared / gpu.count)
    draft_bytes = 0 if draft is None else int(per.plain) * draft.head.parameters // gpu.count
    usable = int(gpu.memory_bytes * MEMORY_FRACTION)
    if gpu.is_cpu:
        taken = weight_bytes + draft_bytes
        usable = min(usable, taken + workspace + int(CPU_KV_SHARE * max(0, gpu.memory_bytes - taken)))
    return MemoryPlan(
        usable_bytes=usable,
        weight_bytes=weight_bytes,
        draft_bytes=draft_bytes,
        workspace_bytes=workspace,
        kv_bytes_per_token=spec.kv_bytes_per_token(per.cache(work.kv_dtype)) * share,
        length=work.length,
    )


def linear_values(spec: ModelSpec) -> int:
    """Weights of all linears of all layers: what a precision quantizes."""
    return spec.layers * sum(out * width for out, width in spec.linear_shapes.values())
