"""The training objective: unroll ``Drafter.step`` from every position, score every depth, never hold all logits.

Tokens lie flat: several windows back to back, told apart by ``segment``. At an anchor t the target has drawn x[t+1]
from hidden[t]; depth d = 1, 2, ... feeds e(x[t+d]) and has to predict x[t+d+1]. With ``ce`` the goal is that token,
with ``kd`` the target's own distribution there, softmax(lm_head hidden[t+d]).

Memory: logits exist for one chunk of anchors at one depth, and their gradient is used up on the spot. The naive loss
holds (depths, T, V) floats, and their gradients. Letters: T tokens, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter.model import Drafter

__all__ = ["DraftBatch", "DraftLoss", "Objective", "draft_loss"]

Objective: TypeAlias = Literal["ce", "kd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftBatch:
    """Windows of text with what the frozen target says about them."""

    tokens: Tensor
    """int64 (T,)"""
    hidden: Tensor
    """(T, H): the target's states after its final norm."""
    embeddings: Tensor
    """(T, H): the target's embeddings of ``tokens``."""
    segment: Tensor
    """int64 (T,): which window a token belongs to."""
    scored: Tensor
    """bool (T,): tokens worth predicting (the completion, not the prompt)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLoss:
    """The loss and what it is made of."""

    total: Tensor
    """(): the weighted mean over depths; has the gradient."""
    by_depth: Tensor
    """(L,): mean loss of each depth."""
    top1: Tensor
    """(L,): share of predictions whose most likely token is right."""
    top5: Tensor
    """(L,): share of predictions with the right token among the five most likely."""
    count: Tensor
    """(L,): scored predictions of each depth."""


def draft_loss(
    drafter: Drafter,
    batch: DraftBatch,
    *,
    depth_weights: Sequence[float],
    objective: Objective = "ce",
    lm_head: Tensor | None = None,
    chunk: int = 1024,
) -> DraftLoss:
    """The multi-step loss over all anchors and ``len(depth_weights)`` depths.

    ``lm_head`` (V, H) is the target's output layer, needed by ``kd``. ``chunk`` anchors have logits at a time.
    """
    assert objective == "ce" or lm_head is not None, "kd needs the target's output layer"
    length = batch.tokens.shape[0]
    context, state = batch.hidden, torch.zeros_like(batch.hidden)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for depth in range(1, len(depth_weights) + 1):
        # Anchors t = 0 .. anchors-1 have a token to feed at t + depth and one to predict at t + depth + 1.
        anchors = max(length - depth - 1, 0)
        state = drafter.next_state(state[:anchors], batch.embeddings[depth : depth + anchors])
        target = slice(depth + 1, depth + 1 + anchors)
        valid = batch.scored[target] & (batch.segment[target] == batch.segment[:anchors])
        where = valid.nonzero().squeeze(1)
        features = drafter.features(context[:anchors][where], state[where])
        goal = batch.tokens[target][where]
        teacher = batch.hidden[depth : depth + anchors][where]
        rows.append(_scored_in_chunks(drafter, features, goal, teacher, objective, lm_head, chunk))
    losses, top1, top5, counts = (torch.stack(column) for column in zip(*rows, strict=True))
    weights = torch.tensor(depth_weights, dtype=losses.dtype, device=losses.device)
    mean = losses / counts.clamp_min(1)
    return DraftLoss(
        total=(mean * weights).sum() / weights.sum(),
        by_depth=mean.detach(),
        top1=top1 / counts.clamp_min(1),
        top5=top5 / counts.clamp_min(1),
        count=counts,
    )


def _scored_in_chunks(
    drafter: Drafter, features: Tensor, goal: Tensor, teacher: Tensor, objective: Objective,
    lm_head: Tensor | None, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Summed loss and hits of one depth: four () tensors, the last one the number of predictions."""
    weight = lm_head if objective == "kd" else None
    loss, hits = _ChunkedCrossEntropy.apply(features, drafter.output.weight, goal, teacher, weight, chunk)  # type: ignore[no-untyped-call]
    return loss, hits[0], hits[1], torch.full_like(loss, features.shape[0])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Output layer and cross-entropy in one: the gradients are made in the forward pass, while a chunk's logits exist.

    The gradient of the loss with respect to the logits is softmax(logits) - goal, so nothing has to be kept or computed
    again for the backward pass but its products with the features and the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, goal: Tensor, teacher: Tensor, lm_head: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.to(features.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=features.device)
        hits = torch.zeros(2, dtype=torch.float32, device=features.device)
        wanted = any(ctx.needs_input_grad)
        by_features = torch.empty_like(features) if wanted else None
        by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        for start in range(0, features.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = F.linear(features[part], matrix).float()
            picked = goal[part, None]
            rank = (logits > logits.gather(1, picked)).sum(dim=1)
            hits += torch.stack([(rank == 0).sum(), (rank < 5).sum()])
            logits -= logits.logsumexp(dim=1, keepdim=True)
            if lm_head is None:
                loss -= logits.gather(1, picked).sum()
            else:
                target = F.linear(teacher[part], lm_head.to(teacher.dtype)).float().softmax(dim=1)
                loss -= (target * logits).sum()
            if by_features is None or by_weight is None:
                continue
            slope = logits.exp_()
            if lm_head is None:
                slope.scatter_add_(1, picked, -torch.ones_like(picked, dtype=slope.dtype))
            else:
                slope -= target
            small = slope.to(features.dtype)
            by_features[part] = small @ matrix
            by_weight += (small.T @ features[part]).float()
        ctx.save_for_backward(by_features, by_weight)
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        by_features, by_weight = ctx.saved_tensors
        return by_features * slopes[0], by_weight * slopes[0], None, None, None, None
