"""Deterministic beam search on ``Drafter.step``.

Letters: R rows, B beams, L drafted tokens, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drafter.config import TreeShape
from drafter.model import Drafter

__all__ = ["beam_search"]


def beam_search(
    drafter: Drafter, embed: Callable[[Tensor], Tensor], context: Tensor, token: Tensor, shape: TreeShape
) -> Tensor:
    """The ``shape.beams`` most likely continuations under beam search: int64 (R, B, L), best beam first.

    context (R, H) is the hidden state that drew ``token`` (R,); ``embed`` maps ids to embeddings (..., H).
    Draws no random number, so the tree cannot know the noise that the target will use.
    """
    if shape.beams == 1:
        return _chain(drafter, embed, context, token, shape.length)[:, None]
    line = torch.arange(token.shape[0], device=token.device)[:, None]
    logits, state = drafter.step(context, torch.zeros_like(context), embed(token))
    scores, best = logits.float().log_softmax(dim=-1).topk(min(shape.beams, logits.shape[-1]), dim=-1)
    beams = drafter.ids(best)[:, :, None]
    state = state[:, None].expand(-1, best.shape[1], -1)
    for _ in range(shape.length - 1):
        logits, state = drafter.step(context[:, None].expand_as(state), state, embed(beams[:, :, -1]))
        total = (scores[:, :, None] + logits.float().log_softmax(dim=-1)).flatten(1)
        # A vocabulary smaller than the number of beams fills them within a few tokens.
        scores, flat = total.topk(min(shape.beams, total.shape[1]), dim=-1)
        origin, best = flat // logits.shape[-1], flat % logits.shape[-1]
        beams = torch.cat([beams[line, origin], drafter.ids(best)[:, :, None]], dim=2)
        state = state[line, origin]
    return beams


def _chain(drafter: Drafter, embed: Callable[[Tensor], Tensor], context: Tensor, token: Tensor, length: int) -> Tensor:
    """One beam needs no scores: the most likely token each time, int64 (R, L)."""
    if drafter.chain is not None:
        return drafter.chain(context, token, length)
    state = torch.zeros_like(context)
    drafted = []
    for _ in range(length):
        logits, state = drafter.step(context, state, embed(token))
        token = drafter.ids(logits.argmax(dim=-1))
        drafted.append(token)
    return torch.stack(drafted, dim=1)
