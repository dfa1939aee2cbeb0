"""What cannot be built at any size, by the rules of the build that a plan is for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from trtkit.errors import UnsupportedError
from trtkit.gpu import GpuProfile, capability_text
from trtkit.model_spec import ModelSpec
from trtkit.plan.memory import DraftPlan
from trtkit.scheme import SCHEMES, KvDtype, QuantScheme

__all__ = ["check_precision", "device_refusals", "refusal", "uneven"]

_ADA, _BLACKWELL, _CONSUMER_BLACKWELL = (8, 9), (10, 0), (12, 0)
_WEIGHT_ONLY_ALIGNMENT, _FP8_ALIGNMENT = 64, 16
"""Of the whole model times the devices, and of each device's part: see checkpoint/trtllm_check.py."""


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


def device_refusals(scheme: QuantScheme, gpu: GpuProfile, kv_dtype: KvDtype, *, drafter: bool) -> list[str]:
    """Why TensorRT-LLM cannot run this on the GPU, whatever the model; empty when it can, and for a CPU."""
    if gpu.capability is None:
        return []
    wrong = []
    if gpu.capability < scheme.min_capability:
        wrong.append(f"{scheme.name} needs compute capability {capability_text(scheme.min_capability)}")
    if kv_dtype == "fp8" and gpu.capability < _ADA:
        wrong.append("an fp8 KV cache needs compute capability 8.9")
    if drafter and gpu.capability < (8, 0):
        wrong.append("ReDrafter needs compute capability 8.0")
    if _BLACKWELL <= gpu.capability < _CONSUMER_BLACKWELL:
        if scheme.weight_format in ("int8", "int4"):
            wrong.append(f"TensorRT-LLM refuses {scheme.name} weights from compute capability 10.0 on")
        if kv_dtype == "int8":
            wrong.append("TensorRT-LLM refuses an int8 KV cache from compute capability 10.0 on")
    return wrong


def refusal(
    spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile, kv_dtype: KvDtype, draft: DraftPlan | None = None
) -> str:
    """The first reason why ``trtkit build`` would refuse it; empty when it would not."""
    try:
        check_precision(scheme, gpu)
    except UnsupportedError as problem:
        return problem.message
    reasons = itertools.chain(
        device_refusals(scheme, gpu, kv_dtype, drafter=draft is not None),
        () if gpu.is_cpu else _rope(spec),
        _splits(spec, gpu.count, draft),
        _alignment(spec, scheme, gpu),
    )
    return next(reasons, "")


def _rope(spec: ModelSpec) -> Iterator[str]:
    if spec.rope.attention_factor is not None or not spec.rope.truncate:
        yield "TensorRT-LLM takes yarn without attention_factor and with truncate only"


def uneven(spec: ModelSpec, devices: int) -> Iterator[str]:
    """What of a layer cannot be shared out evenly. KV heads are repeated where there are fewer than devices."""
    if spec.heads % devices:
        yield f"{spec.heads} attention heads"
    if spec.kv_heads % devices and devices % spec.kv_heads:
        yield f"{spec.kv_heads} KV heads"
    if spec.intermediate % devices:
        yield f"an intermediate size of {spec.intermediate}"


def _splits(spec: ModelSpec, devices: int, draft: DraftPlan | None) -> Iterator[str]:
    over = f"cannot be split over {devices} devices"
    yield from (f"{what} {over}" for what in uneven(spec, devices))
    if draft is not None and spec.vocab % devices:
        yield f"a vocabulary of {spec.vocab} {over}, which the drafter needs"


def _alignment(spec: ModelSpec, scheme: QuantScheme, gpu: GpuProfile) -> Iterator[str]:
    group = scheme.group_size or 0
    if gpu.is_cpu:
        if group:
            sizes = (spec.hidden, spec.q_width, spec.intermediate)
            yield from (f"{size} inputs are no multiple of the group of {group}" for size in sizes if size % group)
        return
    if scheme.activations == "fp8":
        step, hidden_step = _FP8_ALIGNMENT * gpu.count, _FP8_ALIGNMENT
    elif scheme.activations == "none" and scheme.weight_bits < 16:
        step = hidden_step = max(_WEIGHT_ONLY_ALIGNMENT, group) * gpu.count
    else:
        return
    kv_heads = max(gpu.count, spec.kv_heads)  # repeated where there are fewer than devices
    checked = (
        ("hidden size", spec.hidden, hidden_step),
        ("queries, keys and values", (spec.heads + 2 * kv_heads) * spec.head_dim, step),
        ("queries", spec.q_width, step),
        ("intermediate size", spec.intermediate, step),
    )
    for name, size, unit in checked:
        if size % unit:
            yield f"{name} {size}: {scheme.name} on {gpu.count} device(s) takes multiples of {unit}"
