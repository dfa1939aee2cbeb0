"""What a draft head is worth: hits by depth on held-out text, tokens per step by tree shape on held-out problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drafter.config import TreeShape
from drafter.data import Sample, Window, pack
from drafter.loss import DraftLoss, draft_loss
from drafter.model import Drafter
from trtkit.log import Progress
from trtkit.runtime.api import Engine, Request, SamplingParams
from trtkit.runtime.model import DecoderModel
from trtkit.training.target import draft_batch

__all__ = ["THIRDS", "DepthHits", "TreeResult", "hits_by_depth", "measure_tree"]

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthHits:
    """Shares of held-out predictions that are right, by depth 1, 2, ..."""

    part: str
    """``all``, or a third of the solutions."""
    top1: tuple[float, ...]
    top5: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeResult:
    """One tree shape at one temperature, decoded for real."""

    tree: str
    temperature: float
    tokens_per_step: float
    all_accepted: float
    """Share of row-steps in which a whole beam was accepted."""
    accepted_by_depth: tuple[float, ...]
    """Shares of row-steps in which at least 1, 2, ... drafted tokens were accepted."""


@torch.no_grad()
def hits_by_depth(
    drafter: Drafter, model: DecoderModel, samples: Sequence[Sample], *, depths: int, tokens: int
) -> list[DepthHits]:
    """Over whole solutions, and over their early, middle and late thirds."""
    results = []
    for index, part in enumerate(("all", *THIRDS)):
        chosen = [_third(sample, index - 1) for sample in samples]
        losses = [
            draft_loss(drafter, draft_batch(model, group), depth_weights=[1.0] * depths)
            for group in pack([window for window in chosen if window.end - window.start > depths + 1], tokens)
        ]
        if losses:
            results.append(
                DepthHits(
                    part=part,
                    top1=_weighted(losses, lambda loss: loss.top1),
                    top5=_weighted(losses, lambda loss: loss.top5),
                )
            )
    return results


def _third(sample: Sample, third: int) -> Window:
    """The window of one third of the completion (0, 1, 2), or of all of it (-1)."""
    start, total = sample.prompt, len(sample.tokens)
    if third < 0:
        return Window(sample=sample, start=max(start - 1, 0), end=total)
    edges = [start + (total - start) * i // 3 for i in range(4)]
    return Window(sample=sample, start=edges[third], end=edges[third + 1])


def _weighted(losses: Sequence[DraftLoss], column: Callable[[DraftLoss], torch.Tensor]) -> tuple[float, ...]:
    total = torch.stack([column(loss) * loss.count for loss in losses]).sum(dim=0)
    count = torch.stack([loss.count for loss in losses]).sum(dim=0).clamp_min(1)
    return tuple((total / count).tolist())


def measure_tree(
    engine: Engine, prompts: Sequence[tuple[int, ...]], *, tree: TreeShape, temperature: float,
    stop_ids: tuple[int, ...], max_tokens: int,
) -> TreeResult:  # fmt: skip
    """Decode the prompts on an engine that drafts with ``tree`` and read its counters."""
    sampling = SamplingParams(temperature=temperature)
    for index, prompt in enumerate(prompts):
        engine.submit(
            Request(
                id=str(index), prompt=prompt, sampling=sampling, stop_ids=stop_ids, max_tokens=max_tokens, seed=index
            )
        )
    with Progress(f"measure {tree} at temperature {temperature:g}", total=len(prompts), unit="problems") as progress:
        while engine.has_work:
            if ended := sum(output.finish is not None for output in engine.step()):
                progress.advance(ended)
    stats = engine.stats()
    shares = tuple(count / stats.drafted_row_steps for count in stats.accepted_by_depth)
    return TreeResult(
        tree=str(tree),
        temperature=temperature,
        tokens_per_step=stats.tokens_per_step,
        all_accepted=shares[-1],
        accepted_by_depth=shares,
    )
