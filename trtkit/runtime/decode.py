"""The phases of a step over plain tensors: *prefill*, *verify*, *accept*.

Prefill computes keys and values of known tokens. Verify runs every row's pending token (with a drafter: the nodes of
its draft tree, the pending token at the root) and gives logits at each node. Accept draws one token at each node that
is reached, with noise that depends on (seed, position) alone, and follows the tree while it agrees.

Letters: R rows, N nodes, T tokens, S cache slots, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.decoder import Attend
from trtkit.runtime.attention import Span, VerifyBatch, attend_prefill, attend_verify
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.sampling import SamplingRows, pick
from trtkit.runtime.scheduler import Row

__all__ = ["Stretch", "accept", "prefill", "verify"]

PREFILL_TOKENS = 2048
"""Most tokens in one prefill pass: bounds the activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Known tokens to compute: ``tokens`` stand at positions ``cached``, ``cached + 1``, ... in ``blocks``."""

    tokens: Sequence[int]
    cached: int
    blocks: Sequence[int]


def prefill(model: DecoderModel, cache: KvCache, stretches: Sequence[Stretch]) -> None:
    """Fill the cache with the keys and values of all stretches, in passes of at most ``PREFILL_TOKENS`` tokens."""
    batch: list[Stretch] = []
    room = PREFILL_TOKENS
    for stretch in stretches:
        done = 0
        while done < len(stretch.tokens):
            part = stretch.tokens[done : done + room]
            batch.append(Stretch(tokens=part, cached=stretch.cached + done, blocks=stretch.blocks))
            done += len(part)
            room -= len(part)
            if room == 0:
                _prefill_pass(model, cache, batch)
                batch, room = [], PREFILL_TOKENS
    if batch:
        _prefill_pass(model, cache, batch)


def _prefill_pass(model: DecoderModel, cache: KvCache, batch: Sequence[Stretch]) -> None:
    device, size = model.device, cache.block_size
    spans: list[Span] = []
    slots: list[Tensor] = []
    positions: list[Tensor] = []
    start = 0
    for stretch in batch:
        count = len(stretch.tokens)
        end = stretch.cached + count
        blocks = torch.tensor(stretch.blocks[: -(-end // size)], device=device)
        at = torch.arange(stretch.cached, end, device=device)
        spans.append(Span(start=start, tokens=count, cached=stretch.cached, blocks=blocks))
        positions.append(at)
        slots.append(blocks[at // size] * size + at % size)
        start += count
    tokens = torch.tensor([token for stretch in batch for token in stretch.tokens], device=device)
    flat_slots = torch.cat(slots)

    def attend(layer: int) -> Attend:
        return lambda q, k, v: attend_prefill(cache, layer, spans, flat_slots, q, k, v)

    model.forward(tokens, torch.cat(positions), attend)


def verify(model: DecoderModel, cache: KvCache, rows: Sequence[Row]) -> Tensor:
    """Run the pending token of each row; its keys and values go to slot ``row.cached``. Logits (R, V)."""
    device, size = model.device, cache.block_size
    cached_list = [row.cached for row in rows]
    longest = max(cached_list) + 1
    table = cache.block_table(rows, longest)
    cached = torch.tensor(cached_list, device=device)
    seen = torch.arange(table.shape[1] * size, device=device)
    batch = VerifyBatch(
        rows=len(rows),
        nodes=1,
        blocks=table.flatten(),
        slots=table.gather(1, (cached // size)[:, None]).squeeze(1) * size + cached % size,
        hidden_slots=(seen[None, :] > cached[:, None])[:, None, :],
    )
    tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)

    def attend(layer: int) -> Attend:
        return lambda q, k, v: attend_verify(cache, layer, batch, q, k, v)

    return model.logits(model.forward(tokens, cached, attend))


def accept(logits: Tensor, sampling: SamplingRows, rows: Sequence[Row]) -> list[int]:
    """The next token of each row, drawn at its position."""
    positions = torch.tensor([len(row.tokens) for row in rows], device=logits.device)
    picked: list[int] = pick(logits, sampling, positions).tolist()
    return picked
