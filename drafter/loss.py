"""The training objective: unroll ``Drafter.step`` from every position, score every depth, never hold all logits.

Tokens lie flat: several windows back to back, told apart by ``segment``. At an anchor t the target has drawn x[t+1]
from hidden[t]; depth d = 1, 2, ... feeds e(x[t+d]) and has to predict x[t+d+1]. With ``ce`` the goal is that token,
with ``kd`` the target's own distribution there, softmax(lm_head hidden[t+d]).

Memory: a few anchors at a time go all the way, unrolled, scored and back, and leave nothing but their share of the
gradient. Letters: T tokens, L depths, A anchors at a time, P = L * A predictions at a time, H hidden, E exit_dim,
V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter.model import Drafter

__all__ = ["DraftBatch", "DraftLoss", "Objective", "draft_loss"]

Objective: TypeAlias = Literal["ce", "kd"]

_TINY = torch.finfo(torch.float32).tiny
_IN_CACHE, _ON_DEVICE = 1 << 19, 1 << 27
"""Logits that are worked on at a time in float32: 2 MiB stay in a core's cache, 0.5 GB keep a GPU busy."""
_VOCAB_BLOCK = 2048
"""Rows of the output layer whose gradient is made at a time."""


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
    """(): the mean over all predictions, each with the weight of its depth."""
    weight: Tensor
    """(): the sum of these weights."""
    by_depth: Tensor
    """(L,): mean loss of each depth."""
    top1: Tensor
    """(L,): share of predictions whose most likely token is right."""
    top5: Tensor
    """(L,): share of predictions with the right token among the five most likely."""
    count: Tensor
    """(L,): scored predictions of each depth."""


@torch.no_grad()
def draft_loss(
    drafter: Drafter,
    batch: DraftBatch,
    *,
    depth_weights: Sequence[float],
    objective: Objective = "ce",
    lm_head: Tensor | None = None,
    chunk: int = 1024,
    backward: bool = False,
) -> DraftLoss:
    """The multi-step loss over all anchors and ``len(depth_weights)`` depths.

    ``backward``: add the gradient of ``total * weight`` to the ``grad`` of the head's parameters; over several batches
    these sums, divided by the sum of their weights, are the gradient of one batch with all their windows.
    ``lm_head`` (V, H) is the target's output layer, needed by ``kd``. ``chunk`` predictions have logits at a time.
    """
    assert objective == "ce" or lm_head is not None, "kd needs the target's output layer"
    valid = _valid(batch, len(depth_weights))
    weights = torch.tensor(depth_weights, dtype=torch.float32, device=valid.device)
    scorer = _Scorer(drafter, batch, lm_head if objective == "kd" else None, weights if backward else None)
    sums = torch.zeros(3, len(depth_weights), device=valid.device)
    anchors = valid.any(dim=0).nonzero().squeeze(1)
    size = max(1, chunk // len(depth_weights))
    # Always the same shapes, whatever the batch: oneDNN keeps code and buffers for every shape it has seen. The last
    # token has nothing to predict, so it fills the last piece.
    padded = F.pad(anchors, (0, -len(anchors) % size), value=len(batch.tokens) - 1)
    for start in range(0, len(anchors), size):
        part = padded[start : start + size]
        sums += scorer.add(part, valid[:, part])
    counts = valid.sum(dim=1).float()
    losses, top1, top5 = sums / counts.clamp_min(1)
    weight = (counts * weights).sum()
    total = (sums[0] * weights).sum() / weight.clamp_min(_TINY)
    return DraftLoss(total=total, weight=weight, by_depth=losses, top1=top1, top5=top5, count=counts)


def _valid(batch: DraftBatch, depths: int) -> Tensor:
    """Anchors t that have at depth d a token worth predicting, x[t+d+1], in their own window: bool (L, T)."""
    valid = torch.zeros(depths, len(batch.tokens), dtype=torch.bool, device=batch.tokens.device)
    for depth in range(1, depths + 1):
        goal = slice(depth + 1, None)
        same = batch.segment[goal] == batch.segment[: -depth - 1]
        valid[depth - 1, : -depth - 1] = batch.scored[goal] & same
    return valid


class _Scorer:
    """Scores anchors, a few at a time."""

    def __init__(self, drafter: Drafter, batch: DraftBatch, lm_head: Tensor | None, rates: Tensor | None) -> None:
        """``rates`` (L,): the factor of each depth in the gradient; None: no gradient."""
        self._drafter = drafter
        self._batch = batch
        self._rates = rates
        place, weight = batch.tokens.device.type, drafter.output.weight
        self._dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else weight.dtype
        self._matrix = weight.detach().to(self._dtype)
        self._lm_head = None if lm_head is None else lm_head.to(self._dtype)
        self._rows = max(1, (_IN_CACHE if place == "cpu" else _ON_DEVICE) // weight.shape[0])

    def add(self, anchors: Tensor, valid: Tensor) -> Tensor:
        """Summed loss, top-1 and top-5 hits of anchors (A,) at the depths where ``valid`` (L, A): (3, L)."""
        depths, last = len(valid), len(self._batch.tokens) - 1
        # (L + 1, A): the tokens to feed, then (from the second on) those to predict; past the end nothing is valid.
        seen = (anchors + torch.arange(1, depths + 2, device=anchors.device)[:, None]).clamp_max(last)
        with torch.set_grad_enabled(self._rates is not None):
            features = self._features(anchors, seen[:-1])
        logits = F.linear(features.detach(), self._matrix)
        goal = self._batch.tokens[seen[1:]].view(-1, 1)
        teacher = None
        if self._lm_head is not None:
            teacher = F.linear(self._batch.hidden[seen[:-1].flatten()].to(self._dtype), self._lm_head)
        rates = None if self._rates is None else (self._rates[:, None] * valid).view(-1, 1)
        pieces = []
        for start in range(0, len(goal), self._rows):
            piece = slice(start, start + self._rows)
            pieces.append(
                _scored(
                    logits[piece],
                    goal[piece],
                    None if teacher is None else teacher[piece],
                    None if rates is None else rates[piece],
                )
            )
        if rates is not None:
            self._go_back(features, slope=logits)
        return (torch.cat(pieces, dim=1).view(3, depths, -1) * valid).sum(dim=2)

    def _features(self, anchors: Tensor, fed: Tensor) -> Tensor:
        """What the output layer reads at every depth, (P, E), depth by depth; ``fed`` (L, A): the tokens to feed."""
        context = self._batch.hidden[anchors].to(self._dtype)
        state, states = torch.zeros_like(context), []
        for tokens in fed:
            state = self._drafter.next_state(state, self._batch.embeddings[tokens].to(self._dtype))
            states.append(state)
        return self._drafter.features(context.repeat(len(fed), 1), torch.cat(states))

    def _go_back(self, features: Tensor, slope: Tensor) -> None:
        """From the logits' gradient (P, V) to that of the parameters."""
        weight = self._drafter.output.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        for start in range(0, len(weight), _VOCAB_BLOCK):
            block = slice(start, start + _VOCAB_BLOCK)
            weight.grad[block] += slope[:, block].T @ features.detach()
        if features.requires_grad:  # of a head without blocks and recurrence the output layer is all there is
            torch.autograd.backward(features, slope @ self._matrix)


def _scored(logits: Tensor, goal: Tensor, teacher: Tensor | None, rates: Tensor | None) -> Tensor:
    """Losses, top-1 and top-5 hits of predictions: (3, P).

    logits and ``teacher``'s (P, V), goal (P, 1). With ``rates`` (P, 1) the logits are replaced by the gradient with
    respect to them, rate * (softmax(logits) - goal).
    """
    wide = logits.float()
    rank = (wide > wide.gather(1, goal)).sum(dim=1)
    wide = wide.sub_(wide.amax(dim=1, keepdim=True))
    target = None if teacher is None else teacher.float().softmax(dim=1)
    wanted = wide.gather(1, goal)[:, 0] if target is None else (target * wide).sum(dim=1)
    total = wide.exp_().sum(dim=1)
    if rates is not None:
        wide *= rates / total[:, None]
        if target is None:
            wide.scatter_add_(1, goal, -rates)
        else:
            wide -= target.mul_(rates)
        logits.copy_(wide)
    return torch.stack([total.log() - wanted, (rank == 0).float(), (rank < 5).float()])
