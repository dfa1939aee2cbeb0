"""Attention over the block-based cache: ``Attend`` callables for the two shapes of work.

*prefill*: one sequence, many new tokens, causal. *verify*: many rows, N nodes each, every row at its own length.
Letters as in ``kv_cache.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.native.kernels import attend

__all__ = ["Span", "VerifyBatch", "attend_prefill", "attend_verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``tokens`` new tokens of one sequence that already has ``cached`` in the cache."""

    start: int
    """Index of its first token in the flat batch."""
    tokens: int
    cached: int
    blocks: Tensor
    """int64 (B,): the blocks that cover cached + tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyBatch:
    """R rows that each add N nodes."""

    rows: int
    nodes: int
    blocks: Tensor
    """int64 (R * B,): the block table, flat."""
    slots: Tensor
    """int64 (R * N,): where the nodes' keys and values go."""
    hidden_slots: Tensor
    """bool (R, N, S): True where a node must not look."""
    native: bool = False
    """Use the C++ kernel, which the cache fits."""


def attend_prefill(
    cache: KvCache, layer: int, spans: list[Span], slots: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """q (T, heads, D), k and v (T, kv_heads, D) of several spans, flat -> (T, heads * D)."""
    cache.write(layer, slots, k, v)
    out = torch.empty_like(q)
    for span in spans:
        part = slice(span.start, span.start + span.tokens)
        seen = span.cached + span.tokens
        keys, values = cache.read(layer, span.blocks, 1)
        mask = _behind_cache(span, q.device) if span.cached else None
        result = F.scaled_dot_product_attention(
            q[part].transpose(0, 1)[None],
            keys[:, 0, :seen][None],
            values[:, 0, :seen][None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        out[part] = result[0].transpose(0, 1)
    return out.reshape(q.shape[0], -1)


def _behind_cache(span: Span, device: torch.device) -> Tensor:
    """The mask of tokens that see the whole cache before them.

    On CUDA no tensor of booleans: with fewer KV heads than query heads all scores would then be held in float32.
    """
    if device.type != "cuda":
        shape = (span.tokens, span.cached + span.tokens)
        return torch.ones(shape, dtype=torch.bool, device=device).tril(span.cached)
    from torch.nn.attention.bias import causal_lower_right  # loads torch's compiler and Triton

    return causal_lower_right(span.tokens, span.cached + span.tokens)


def attend_verify(cache: KvCache, layer: int, batch: VerifyBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (R * N, heads, D), k and v (R * N, kv_heads, D) -> (R * N, heads * D).

    The g query heads of a KV head are folded into its query rows, so that each key is read once: one batched product
    of (g * N, D) x (D, S) per KV head and row.
    """
    if batch.native:
        return attend((q, k, v), cache.pools(layer), batch.blocks, batch.slots, batch.hidden_slots)
    cache.write(layer, batch.slots, k, v)
    keys, values = cache.read(layer, batch.blocks, batch.rows)
    kv_heads, rows, slots, head_dim = keys.shape
    group = q.shape[1] // kv_heads
    # (R, N, kv, g, D) -> (kv, R, g, N, D)
    folded = q.view(rows, batch.nodes, kv_heads, group, head_dim).permute(2, 0, 3, 1, 4)
    scores = torch.matmul(folded.reshape(kv_heads, rows, group * batch.nodes, head_dim), keys.transpose(2, 3))
    scores = (scores.float() * head_dim**-0.5).view(kv_heads, rows, group, batch.nodes, slots)
    scores.masked_fill_(batch.hidden_slots[None, :, None], float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).view(kv_heads, rows, group * batch.nodes, slots)
    out = torch.matmul(weights, values).view(kv_heads, rows, group, batch.nodes, head_dim)
    return out.permute(1, 3, 0, 2, 4).reshape(rows * batch.nodes, -1)
