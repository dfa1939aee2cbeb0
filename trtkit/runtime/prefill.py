"""The *prefill* phase: keys and values of known tokens, many at a time. Letters: T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.decoder import Attend
from trtkit.runtime.attention import Span, attend_prefill
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel

__all__ = ["PART_TOKENS", "PREFILL_TOKENS", "Stretch", "prefill"]

PREFILL_TOKENS = 2048
"""Most tokens in one prefill pass: bounds the activations."""
PART_TOKENS = {"cuda": 1024, "cpu": 256}
"""Prompt tokens that rows wait for at a time: a few steps' time, and enough for the products to be fast."""


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
