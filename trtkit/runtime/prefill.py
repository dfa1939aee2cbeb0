"""The *prefill* phase: keys and values of known tokens, many at a time.

The C++ kernels compute them as decode steps do: a stretch of tokens is a chain of nodes, cut into rows of a few. Their
keys and values have the same bits then, whether they were computed with a prompt, in parts, token by token, or anew. On
AVX512 with BF16 that attention is two to three times as fast as torch's (``docs/cpu.md``).

Letters: T tokens, R rows, N nodes of a row, B blocks of the longest stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.decoder import Attend
from trtkit.runtime.attention import Span, VerifyBatch, attend_prefill
from trtkit.runtime.decode import forward_nodes
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.native import kernels

__all__ = ["PART_TOKENS", "PREFILL_TOKENS", "Stretch", "prefill"]

PREFILL_TOKENS = 2048
"""Most tokens in one prefill pass: bounds the activations."""
PART_TOKENS = {"cuda": 1024, "cpu": 256}
"""Prompt tokens that rows wait for at a time: a few steps' time, and enough for the products to be fast."""

_NODES = 8
"""Of a row: enough queries for each key that is read, and at most 7 nodes of padding."""


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
    if model.native and kernels.attend_fits(cache.stored[0], model.spec.head_dim, cache.block_size, model.dtype):
        _prefill_chains(model, cache, batch)
    else:
        _prefill_spans(model, cache, batch)


def _prefill_chains(model: DecoderModel, cache: KvCache, batch: Sequence[Stretch]) -> None:
    counts = [len(stretch.tokens) for stretch in batch]
    rows = [-(-count // _NODES) for count in counts]
    width = max(cache.blocks_for(s.cached + r * _NODES) for s, r in zip(batch, rows, strict=True))
    tables = [[*s.blocks, *[cache.spare_block] * width][:width] for s in batch]
    blocks = torch.tensor(tables).repeat_interleave(torch.tensor(rows), dim=0)
    first = [s.cached + _NODES * row for s, count in zip(batch, rows, strict=True) for row in range(count)]
    line = torch.arange(_NODES)
    seen = torch.ones(_NODES, _NODES, dtype=torch.bool).tril()
    slots, positions, hidden = kernels.place_nodes(
        blocks, torch.tensor(first), line.expand(len(first), -1), seen.expand(len(first), -1, -1), cache.block_size
    )
    tokens = torch.zeros(len(first) * _NODES, dtype=torch.int64)
    real = torch.cat([torch.arange(r * _NODES) < count for r, count in zip(rows, counts, strict=True)])
    tokens[real] = torch.tensor([token for stretch in batch for token in stretch.tokens])
    # What pads a row holds nothing: its keys and values go where nobody looks.
    slots, positions = slots.flatten(), positions.flatten()
    slots[~real], positions[~real] = cache.spare_block * cache.block_size, 0
    nodes = VerifyBatch(
        rows=len(first), nodes=_NODES, blocks=blocks.flatten(), slots=slots, hidden_slots=hidden, native=True
    )
    forward_nodes(model, cache, nodes, tokens, positions)


def _prefill_spans(model: DecoderModel, cache: KvCache, batch: Sequence[Stretch]) -> None:
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
