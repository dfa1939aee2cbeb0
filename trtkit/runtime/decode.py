"""The phases of a step over plain tensors: *prefill*, *draft*, *verify*, *accept*.

Prefill computes keys and values of known tokens. Draft grows a tree on each row's pending token (without a drafter the
tree is that token alone). Verify runs the tree's nodes through the model and gives logits at each. Accept draws one
token at each node, with noise that depends on (seed, position) alone, follows the tree while it agrees, and keeps the
keys and values of the nodes on the way.

Letters: R rows, N nodes, T tokens, S cache slots, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.accept import AcceptedPath, follow
from drafter.beam import beam_search
from drafter.config import TreeShape
from drafter.model import Drafter
from drafter.tree import TokenTree, build_tree
from trtkit.decoder import Attend
from trtkit.runtime.attention import Span, VerifyBatch, attend_prefill, attend_verify
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.processors import SwitchRows, penalise
from trtkit.runtime.sampling import SamplingRows, pick
from trtkit.runtime.scheduler import Row

__all__ = [
    "Pending",
    "Stretch",
    "Verified",
    "accept",
    "draft",
    "log_probabilities",
    "pending",
    "prefill",
    "root_only",
    "verify",
]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Where R rows stand: their last tokens, and how much is in the cache."""

    tokens: Tensor
    """int64 (R,): the pending tokens."""
    cached: Tensor
    """int64 (R,): tokens in the cache; the pending token's position."""
    longest: int
    """max(cached), known to the host."""


def pending(rows: Sequence[Row], device: torch.device) -> Pending:
    """The rows' state as tensors."""
    cached = [row.cached for row in rows]
    return Pending(
        tokens=torch.tensor([row.tokens[-1] for row in rows], device=device),
        cached=torch.tensor(cached, device=device),
        longest=max(cached),
    )


def root_only(at: Pending) -> TokenTree:
    """The tree of plain decoding: the pending token."""
    zero = torch.zeros_like(at.tokens)[:, None]
    seen = torch.ones(1, 1, 1, dtype=torch.bool, device=zero.device).expand(zero.shape[0], 1, 1)
    return TokenTree(tokens=at.tokens[:, None], parent=zero - 1, depth=zero, mask=seen, chain=True)


def draft(drafter: Drafter, model: DecoderModel, contexts: Tensor, at: Pending, shape: TreeShape) -> TokenTree:
    """Trees on the pending tokens; contexts (R, H) are the hidden states that drew them."""
    return build_tree(at.tokens, beam_search(drafter, model.embed, contexts, at.tokens, shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What the model says at every node."""

    logits: Tensor
    """(R, N, V)"""
    hidden: Tensor
    """(R, N, H): after the final norm; the next draft's context."""
    slots: Tensor
    """int64 (R, N): cache slots of the nodes' keys and values."""


def verify(model: DecoderModel, cache: KvCache, rows: Sequence[Row], at: Pending, tree: TokenTree) -> Verified:
    """Run all nodes; node n of row r goes to the n-th slot after what the row has in the cache."""
    size, (count, nodes) = cache.block_size, tree.tokens.shape
    table = cache.block_table(rows, at.longest + nodes)
    places = at.cached[:, None] + torch.arange(nodes, device=model.device)
    slots = table.gather(1, places // size) * size + places % size
    seen = torch.arange(table.shape[1] * size, device=model.device)
    hidden_slots = (seen >= at.cached[:, None])[:, None, :].repeat(1, nodes, 1)
    hidden_slots.scatter_(2, places[:, None, :].expand(-1, nodes, -1), ~tree.mask)
    batch = VerifyBatch(
        rows=count, nodes=nodes, blocks=table.flatten(), slots=slots.flatten(), hidden_slots=hidden_slots,
        native=model.native,
    )  # fmt: skip

    def attend(layer: int) -> Attend:
        return lambda q, k, v: attend_verify(cache, layer, batch, q, k, v)

    positions = at.cached[:, None] + tree.depth
    hidden = model.forward(tree.tokens.flatten(), positions.flatten(), attend)
    return Verified(
        logits=model.logits(hidden).view(count, nodes, -1), hidden=hidden.view(count, nodes, -1), slots=slots
    )


def accept(
    cache: KvCache,
    verified: Verified,
    tree: TokenTree,
    sampling: SamplingRows,
    at: Pending,
    switch: Sequence[SwitchRows] = (),
) -> AcceptedPath:
    """Draw at every node, follow the tree, and move the path's keys and values next to what the row had.

    ``switch`` changes the logits in place.
    """
    count, nodes = tree.tokens.shape
    if switch:
        penalise(verified.logits, tree, switch)
    positions = at.cached[:, None] + 1 + tree.depth
    picks = pick(verified.logits.flatten(0, 1), sampling.repeat(nodes), positions.flatten()).view(count, nodes)
    path = follow(tree, picks)
    if tree.chain:  # the accepted nodes already lie next to what the row had
        return path
    step = torch.arange(path.nodes.shape[1], device=picks.device)
    moved = (path.nodes != step) & (step < path.length[:, None])
    if bool(moved.any()):
        cache.move(verified.slots.gather(1, path.nodes)[moved], verified.slots[:, : len(step)][moved])
    return path


def log_probabilities(logits: Tensor, path: AcceptedPath) -> Tensor:
    """float32 (R, D): log softmax(logits) of ``path.tokens`` at the nodes that drew them; logits (R, N, V)."""
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
    at_nodes = logits[rows, path.nodes].float()
    return at_nodes.gather(2, path.tokens[..., None]).squeeze(2) - at_nodes.logsumexp(dim=2)
