"""How fast a decode step should be.

A step reads every weight once and every row's keys and values, the draft head once per drafted position (with its own
output layer), multiplies, and on several devices adds up partial sums twice per layer::

    step = max(read / (bandwidth * share), multiply) + moved / link        tokens per second = rows * per step / step

``READ_SHARE`` and ``LINK_BANDWIDTH`` hold the only three fitted figures: least squares on the relative error of the
step times in ``published`` (in which the step is linear in 1/constant). They describe whole published systems, server,
code sandbox and the thinning batch towards the end included, not a kernel. A fixed cost per layer or per step is not in
the model because the measurements leave no room for it: on 2xH100 bf16 is published 1.7 to 2.2 times slower than fp8,
and the bytes differ by a factor of 1.6; any fixed cost would make the estimate less, not more, different.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trtkit.gpu import GpuProfile, LinkKind, MemoryKind
from trtkit.model_spec import ModelSpec
from trtkit.plan.memory import DraftPlan, ValueBytes, Workload, linear_values, value_bytes
from trtkit.scheme import KvDtype, OutputLayer, QuantScheme

__all__ = ["LINK_BANDWIDTH", "READ_SHARE", "StepCost", "ceiling_tokens_per_second", "step_bytes", "step_cost",
           "tokens_per_second"]  # fmt: skip

_GDDR_SHARE = 0.627
"""Fitted to 4xL4."""
_HBM_SHARE = 0.167
"""Fitted to 2xH100: what the published serving stack reached. Read it as the lower end for other stacks."""
_HOST_LINK = 3.23e9
"""Fitted to 4xL4: all-reduce bus bandwidth of PCIe cards without peer-to-peer copies, bytes per second."""

READ_SHARE: Mapping[MemoryKind, float] = {"gddr": _GDDR_SHARE, "hbm": _HBM_SHARE, "ddr": _GDDR_SHARE}
"""Share of the data-sheet bandwidth that a whole decode step reaches. CPUs have no figure of their own."""
LINK_BANDWIDTH: Mapping[LinkKind, float] = {"host": _HOST_LINK, "pcie": 12e9, "nvlink": 300e9}
"""All-reduce bus bandwidth. ``pcie`` and ``nvlink`` are typical figures, not fitted: no published speed depends on
them (on NVLink the exchange takes under 1 % of a step)."""
_MULTIPLY_SHARE = 0.5
"""Share of the dense FLOP/s that skinny matrix products reach. Not fitted: below some 100 rows a step is bound by
reading, and no published speed depends on it."""
_SIXTEEN_BIT = ValueBytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one decode step has to do, over all devices, before any efficiency is applied."""

    read_bytes: float
    multiply_seconds: float
    """At the full dense FLOP/s of all devices."""
    moved_bytes: float
    """Over the link of each device."""

    def seconds(self, gpu: GpuProfile) -> float:
        """Expected duration of the step on ``gpu``."""
        reading = self.read_bytes / (gpu.bandwidth * gpu.count * READ_SHARE[gpu.memory])
        return max(reading, self.multiply_seconds / _MULTIPLY_SHARE) + self.moved_bytes / LINK_BANDWIDTH[gpu.link]


def step_bytes(
    spec: ModelSpec, scheme: QuantScheme, *, rows: int, context: float, kv_dtype: KvDtype = "model",
    draft: DraftPlan | None = None, output_layer: OutputLayer = "model", per: ValueBytes = _SIXTEEN_BIT,
) -> float:  # fmt: skip
    """Bytes that one decode step reads over all devices: every linear, lm_head, the rows' keys and values, and the
    draft head once per drafted position. The embedding table is looked up, not read."""
    weights = linear_values(spec) * per.linear(scheme)
    weights += per.output(output_layer) * spec.vocab * spec.hidden
    cache = rows * context * spec.kv_bytes_per_token(per.cache(kv_dtype))
    drafting = 0.0 if draft is None else per.plain * draft.head.parameters * draft.tree.length
    return weights + cache + drafting


def step_cost(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, work: Workload, rows: int, draft: DraftPlan | None = None,
    output_layer: OutputLayer = "model",
) -> StepCost:  # fmt: skip
    """The work of one step with ``rows`` rows of the mean context of ``work``."""
    tokens = rows * (1 if draft is None else draft.tree.max_nodes)
    unit = scheme.activations if scheme.activations in gpu.flops else "bf16"
    linear = 2 * tokens * linear_values(spec) / gpu.flops[unit]
    other = 2 * tokens * (spec.vocab * spec.hidden + 2 * work.context * spec.layers * spec.q_width) / gpu.flops["bf16"]
    if draft is not None:
        other += 2 * rows * draft.tree.beams * draft.tree.length * draft.head.parameters / gpu.flops["bf16"]
    read = step_bytes(
        spec, scheme, rows=rows, context=work.context, kv_dtype=work.kv_dtype, draft=draft, output_layer=output_layer,
        per=value_bytes(spec, gpu),
    )  # fmt: skip
    return StepCost(
        read_bytes=read,
        multiply_seconds=(linear + other) / gpu.count,
        # Two all-reduces per layer of 16-bit hidden states; a ring moves 2 (n - 1) / n of the bytes.
        moved_bytes=2 * spec.layers * tokens * spec.hidden * 2 * 2 * (gpu.count - 1) / gpu.count,
    )


def tokens_per_second(cost: StepCost, gpu: GpuProfile, rows: int, draft: DraftPlan | None = None) -> float:
    """Expected speed of all rows together."""
    return rows * _per_step(draft) / cost.seconds(gpu)


def ceiling_tokens_per_second(cost: StepCost, gpu: GpuProfile, rows: int, draft: DraftPlan | None = None) -> float:
    """Speed if the step did nothing but read at the data-sheet bandwidth: no system can be faster."""
    return rows * _per_step(draft) * gpu.bandwidth * gpu.count / cost.read_bytes


def _per_step(draft: DraftPlan | None) -> float:
    return 1.0 if draft is None else draft.tokens_per_step
