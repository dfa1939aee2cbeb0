"""Where the time of a decode step goes: by kind of operation, and what the host adds to it.

The steps run under torch's profiler, which costs time itself: read the shares, not the sums. Phases (draft, verify,
accept) come from the engine's own clock.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from trtkit.bench.device_clock import spent_by_name
from trtkit.bench.engines import BenchOptions, can_draft, prompts_of
from trtkit.model_spec import read_model_spec
from trtkit.runtime.api import Engine, Request, SamplingParams
from trtkit.runtime.load import OpenOptions, device_named, open_engine

__all__ = ["KINDS", "StepProfile", "profile_engine"]

KINDS = ("exchange", "linears", "attention", "cache", "sampling", "other", "host")
"""``exchange`` is between the processes of one engine, waiting for each other included."""
_WARM_UP = 5
_STEPS = 30
_EXCHANGE = ("nccl", "gloo", "c10d")
_LINEARS = ("linear", "addmm", "::mm", "qlinear", "pack_mm", "scaled_mm", "gemm")
_ATTENTION = ("bmm", "matmul", "softmax", "masked_fill", "scaled_dot_product", "attend", "attention")
_CACHE = ("index_select", "index_copy", "index_put")
_SAMPLING = ("cumsum", "exp_", "::exp", "sort", "topk", "gather", "bitwise", "amax", "amin", "argmax", "sample", "pick")
_OWN = {
    "product": "linears", "product_words": "linears", "one_row": "linears", "expand_words": "linears",
    "quantize_activations": "linears", "rescale": "linears", "combine_splits": "attention",
    "peak": "sampling", "weigh": "sampling", "narrow": "sampling", "draw": "sampling",
}  # fmt: skip
"""The CUDA path's kernels, by their whole names: shorter ones are parts of torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """One engine at one batch size."""

    engine: str
    batch: int
    step_seconds: float
    """Mean duration of a step while it was profiled."""
    kinds: dict[str, float]
    """Seconds per step by kind of operation; ``host`` is the time in which no operation ran."""
    phases: dict[str, float]
    """Seconds per step by phase."""

    def document(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def profile_engine(directory: Path, batch: int, options: BenchOptions) -> StepProfile:
    """Profile steps of a full batch. With a draft head its tree is ``options.tree``, or 1x3."""
    opening = OpenOptions(
        device=options.device, threads=options.threads_of_each, rows=batch,
        speculative=options.speculative, tree=options.tree if can_draft(directory, options) else None,
        drafter=options.drafter, lookup=options.lookup, head=options.head, output_layer=options.output_layer,
        tensor_parallel=options.tensor_parallel,
    )  # fmt: skip
    prompts = prompts_of(directory, read_model_spec(directory).vocab, options)
    device = device_named(options.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with open_engine(directory, opening) as engine:
        _fill(engine, prompts, batch, options)
        for _ in range(_WARM_UP):
            engine.step()
        before = engine.stats()
        recorded = profile(activities=activities)
        with _without_chatter():
            recorded.start()
        try:
            begin = time.perf_counter()
            steps = 0
            while engine.has_work and steps < _STEPS:
                engine.step()
                steps += 1
            seconds = (time.perf_counter() - begin) / max(steps, 1)
        finally:
            with _without_chatter():
                recorded.stop()
        after = engine.stats()
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, micros in spent_by_name(recorded.key_averages(), device).items():
        kinds[kind_of(name)] += 1e-6 * micros / max(steps, 1)
    kinds["host"] += max(0.0, seconds - sum(kinds.values()))
    phases = {name: (total - before.seconds[name]) / max(steps, 1) for name, total in after.seconds.items()}
    return StepProfile(engine=str(directory), batch=batch, step_seconds=seconds, kinds=kinds, phases=phases)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop what torch's profiler writes to file descriptor 2, whatever its log level, when it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def kind_of(operation: str) -> str:
    """``aten::bmm`` -> ``attention``. The first kind that knows a part of the name."""
    if operation in _OWN:
        return _OWN[operation]
    for kind, parts in zip(KINDS, (_EXCHANGE, _LINEARS, _ATTENTION, _CACHE, _SAMPLING), strict=False):
        if any(part in operation for part in parts):
            return kind
    return "other"


def _fill(engine: Engine, prompts: Sequence[tuple[int, ...]], batch: int, options: BenchOptions) -> None:
    for row in range(batch):
        engine.submit(
            Request(
                id=f"profile-{row}", prompt=prompts[row % len(prompts)], max_tokens=8 * (_WARM_UP + _STEPS), seed=row,
                sampling=SamplingParams(temperature=options.temperature),
            )
        )  # fmt: skip
