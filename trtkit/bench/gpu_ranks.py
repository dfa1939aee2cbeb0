"""The points of ``scripts/gpu_bench`` over several GPUs: one engine whose processes share every layer."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trtkit.bench.gpu_points import PointPlan, standing_engine, step_reads, timed_steps
from trtkit.bench.random_model import RandomWeights, StandingEngine, random_head, shape_spec
from trtkit.checkpoint.rank_share import share_rows, share_spec
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.ranks.engine import RankedEngine
from trtkit.runtime.ranks.group import Ranks

__all__ = ["SharedPlan", "measure_shared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPlan:
    """What is measured."""

    shape: str
    device: str
    """cpu or cuda."""
    ranks: int
    point: PointPlan
    draft_vocabulary: int | None = None
    """With a forced acceptance: tokens that the head keeps; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _RandomShare(RandomWeights):
    """One rank's weights, random as all are; ``spec`` has the shapes of its share."""

    ranks: int

    def lm_head(self) -> Tensor:
        """As ``RankShare`` cuts it."""
        return share_rows(self._draw(self.spec.vocab, self.spec.hidden), 0, self.ranks)


def open_shared(plan: SharedPlan, ranks: Ranks) -> StandingEngine:
    """This rank's part, its rows standing at their context."""
    whole = shape_spec(plan.shape)
    device = torch.device("cuda", ranks.rank) if plan.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if plan.device == "cuda" else torch.float32
    weights = _RandomShare(
        spec=share_spec(whole, ranks.size), precision=plan.point.precision, device=device, ranks=ranks.size
    )
    reach = plan.point.context + plan.point.new_tokens + len(plan.point.shares) + 1
    model = DecoderModel(weights, device=device, dtype=dtype, max_tokens=reach, ranks=ranks)
    head = None
    if plan.point.shares:
        head = random_head(whole, device=device, dtype=dtype, vocabulary=plan.draft_vocabulary, ranks=ranks)
    return standing_engine(model, plan.point, head)


def measure_shared(plan: SharedPlan, copy: float) -> dict[str, Any]:
    """Time the point; ``copy`` is the bandwidth of one device, of which all together have as many times as there are
    ranks."""
    with RankedEngine(plan.ranks, plan.device, functools.partial(open_shared, plan)) as engine:
        timed = timed_steps(engine, plan.point)
        own = engine.own
        assert isinstance(own, StandingEngine)
        read = step_reads(shape_spec(plan.shape), plan.point, own.head, timed)
        return {
            **asdict(plan.point), "ranks": plan.ranks, "tree": None if own.head is None else str(plan.point.tree),
            "draft_vocabulary": plan.draft_vocabulary, **timed.figures(), "step_bytes": read, "graphs": own.captured,
            "copy_fraction": read * plan.point.steps / timed.total / (copy * plan.ranks),
        }  # fmt: skip
