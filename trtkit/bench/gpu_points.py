"""One measurement of ``scripts/gpu_bench``: an engine with random weights at one batch size and context."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from trtkit.bench.device_clock import device_seconds, kernels_of
from trtkit.bench.random_model import StandingEngine, forced_acceptance, standing_rows
from trtkit.model_spec import ModelSpec
from trtkit.plan import step_bytes
from trtkit.runtime.api import Engine
from trtkit.runtime.blocks import blocks_for
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.scheme import KvDtype, Precision, scheme_named

__all__ = [
    "BLOCK_SIZE",
    "PointPlan",
    "Timed",
    "draft_bytes",
    "measure_point",
    "profile_point",
    "standing_engine",
    "step_reads",
    "timed_steps",
]

BLOCK_SIZE = 16
_WARM_UP = 8
"""Steps before the clock starts: graphs are captured, and the block table grows past its size at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPlan:
    """What is measured."""

    precision: Precision
    rows: int
    context: int
    """Tokens in each row's cache when it begins."""
    steps: int
    kv_dtype: KvDtype = "model"
    shares: tuple[float, ...] = ()
    """With a head: the forced acceptance."""
    overlap: bool = False
    """Launch each step before the one in flight is read."""

    @property
    def tree(self) -> TreeShape | None:
        """A chain as long as the profile."""
        return TreeShape(beams=1, length=len(self.shares)) if self.shares else None

    @property
    def new_tokens(self) -> int:
        """Most tokens that a row can gain."""
        return (self.steps + _WARM_UP + 2) * (1 + len(self.shares))

    @property
    def blocks(self) -> int:
        """KV blocks of all rows."""
        reach = self.context + self.new_tokens + 1 + len(self.shares)
        return self.rows * (blocks_for(reach, BLOCK_SIZE) + 1)


def standing_engine(model: DecoderModel, plan: PointPlan, head: Drafter | None = None) -> StandingEngine:
    """An engine whose rows are all at ``plan.context`` tokens."""
    limits = TorchLimits(
        rows=plan.rows, total_tokens=plan.context + plan.new_tokens, kv_blocks=plan.blocks, block_size=BLOCK_SIZE,
        kv_dtype=plan.kv_dtype, fixed_shapes=True, overlap=plan.overlap,
    )  # fmt: skip
    drafting = None if head is None or plan.tree is None else Drafting(head=head, trees=(plan.tree,))
    engine = StandingEngine(model, limits, drafting)
    engine.fill_cache()
    if drafting is not None:
        engine.force(forced_acceptance(plan.shares, model.spec.vocab))
    standing_rows(engine, plan.rows, plan.context, plan.new_tokens, model.spec.vocab)
    return engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The timed steps of a point."""

    seconds: tuple[float, ...]
    tokens: int
    rows: int
    context: float
    """Tokens in a row's cache, on average."""

    @property
    def total(self) -> float:
        """Seconds."""
        return sum(self.seconds)

    def figures(self) -> dict[str, float]:
        """As they stand in the document."""
        steps = len(self.seconds)
        return {
            "tokens_per_second": self.tokens / self.total, "tokens_per_step": self.tokens / (self.rows * steps),
            "step_ms": 1e3 * self.total / steps, "best_step_ms": 1e3 * min(self.seconds),
        }  # fmt: skip


def timed_steps(engine: Engine, plan: PointPlan) -> Timed:
    """Warm up, then time ``plan.steps`` steps of an engine whose rows are standing, scheduling included."""
    for _ in range(_WARM_UP):
        engine.step()
    before = engine.stats()
    seconds: list[float] = []
    for _ in range(plan.steps):
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    after = engine.stats()
    assert after.row_steps - before.row_steps == plan.rows * plan.steps, "a row ended while the clock ran"
    tokens = after.new_tokens - before.new_tokens
    context = plan.context + (before.new_tokens + tokens / 2) / plan.rows
    return Timed(seconds=tuple(seconds), tokens=tokens, rows=plan.rows, context=context)


@torch.inference_mode()
def measure_point(model: DecoderModel, plan: PointPlan, copy: float, head: Drafter | None = None) -> dict[str, Any]:
    """Time the point; ``copy`` is the bandwidth to compare with."""
    engine = standing_engine(model, plan, head)
    timed = timed_steps(engine, plan)
    read = step_reads(model.spec, plan, head, timed)
    result = {
        **asdict(plan), "tree": None if plan.tree is None or head is None else str(plan.tree), **timed.figures(),
        "step_bytes": read, "graphs": engine.captured, "copy_fraction": read * plan.steps / timed.total / copy,
    }  # fmt: skip
    engine.close()
    return result


@torch.inference_mode()
def profile_point(
    model: DecoderModel, plan: PointPlan, found: dict[str, Any], head: Drafter | None = None
) -> None:  # fmt: skip
    """Add to the figures ``found`` of ``plan`` the device's time for each phase, for the whole step and for its
    longest kernels; ``host`` is what the whole step leaves of the measured one."""
    engine = standing_engine(model, plan, head)
    for _ in range(_WARM_UP):
        engine.step()
    works, whole = engine.parts(plan.tree)
    phases = {name: 1e3 * device_seconds(work, engine.device) for name, work in works.items()}
    found["phase_ms"] = phases | {"host": found["step_ms"] - phases["step"]}
    found["kernel_us"] = kernels_of(whole, engine.device, repeats=4)
    engine.close()


def draft_bytes(config: DrafterConfig, lines: int, length: int) -> float:
    """What drafting ``length`` tokens reads: per token all weights in 16 bits, with ``lines`` tokens left in the output
    layer."""
    return 2.0 * length * (config.parameters - (config.vocab_size - lines) * config.exit_dim)


def step_reads(spec: ModelSpec, plan: PointPlan, head: Drafter | None, timed: Timed) -> float:
    """Bytes of a step: weights, lm_head, keys and values, and the head's own weights once per drafted token."""
    drafting = 0.0
    if head is not None and plan.tree is not None:
        lines = head.config.vocab_size if head.token_ids is None else len(head.token_ids)
        drafting = draft_bytes(head.config, lines, plan.tree.length)
    scheme = scheme_named(plan.precision)
    return drafting + step_bytes(spec, scheme, rows=plan.rows, context=timed.context, kv_dtype=plan.kv_dtype)
