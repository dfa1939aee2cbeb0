"""The phases of a decode step over plain tensors: *draft*, *verify*, *accept* (*prefill* has a room of its own).

Draft grows a tree on each row's pending token: from a draft head's beams, or from those that the host looked up;
without either the tree is that token alone. Verify runs the tree's nodes through the model and gives logits at each.
Accept draws one token at each node, with noise that depends on (seed, position) alone, follows the tree while it
agrees, and keeps the keys and values of the nodes on the way.

``decode_step`` is the three in a row. It works on tensors alone and, with ``fixed`` shapes, waits for nothing: a
CUDA graph can replay it.

Letters: R rows, N nodes, T tokens, B blocks of the widest row, S cache slots, H hidden, V vocab, D nodes of the longest
path, W beams, L drafted tokens per beam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter.accept import AcceptedPath, follow
from drafter.beam import beam_search
from drafter.config import TreeShape
from drafter.model import Drafter
from drafter.tree import TokenTree, build_tree
from trtkit.runtime.attention import VerifyBatch, attend_verify
from trtkit.runtime.cuda.batch import CudaVerifyBatch
from trtkit.runtime.cuda.kernels import attend_fits
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.native.kernels import attend_fits as native_fits
from trtkit.runtime.node_places import place_nodes, slots_of
from trtkit.runtime.processors import SwitchRows, penalised
from trtkit.runtime.sampling import SamplingRows, pick
from trtkit.runtime.scheduler import Row

__all__ = [
    "Pending",
    "Stepper",
    "Verified",
    "accept",
    "after",
    "decode_step",
    "draft",
    "emitted",
    "fill_pending",
    "forward_nodes",
    "log_probabilities",
    "pending",
    "pending_from",
    "root_only",
    "stand_words",
    "verify",
]

Redraw: TypeAlias = "Callable[[TokenTree, Pending, Tensor], Tensor]"
"""(trees, rows, tokens drawn at the nodes (R, N)) -> other tokens (R, N)."""
Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Times the phase of that name."""


def _untimed(_name: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """Where R rows stand: their last tokens, and what is in the cache."""

    tokens: Tensor
    """int64 (R,): the pending tokens."""
    cached: Tensor
    """int64 (R,): tokens in the cache; the pending token's position."""
    lines: Tensor
    """int64 (R,): the rows' lines in the contexts."""
    blocks: Tensor
    """int64 (R, B): the block table."""
    drafts: Tensor | None = None
    """int64 (R, W, L): those of the tree's beams that the host looked up; None for none."""


def pending(
    cache: KvCache, rows: Sequence[Row], nodes: int, drafts: npt.NDArray[np.int64] | None = None
) -> Pending:  # fmt: skip
    """The rows' state as tensors, for a step that adds up to ``nodes`` nodes to each: one copy to the device."""
    width = cache.blocks_for(max(row.cached for row in rows) + nodes)
    beams = () if drafts is None else drafts.shape[1:]
    words = np.empty(len(rows) * stand_words(width, beams), dtype=np.int64)
    fill_pending(words, cache, rows, size=len(rows), width=width, drafts=drafts)
    return pending_from(torch.from_numpy(words).to(cache.device), len(rows), width, beams)


def stand_words(width: int, beams: Sequence[int] = ()) -> int:
    """int64 words that say where one row stands; ``beams``: (W, L) where the host looked up drafts."""
    return 3 + width + (math.prod(beams) if beams else 0)


def fill_pending(
    words: npt.NDArray[np.int64], cache: KvCache, rows: Sequence[Row], *, size: int, width: int, pad_line: int = 0,
    drafts: npt.NDArray[np.int64] | None = None,
) -> None:  # fmt: skip
    """Write what :func:`pending_from` reads, padded to ``size`` rows.

    Rows that pad the batch hold nothing, and leave their keys and values in the spare block.
    """
    count = len(rows)
    columns = words[: 3 * size].reshape(3, size)
    columns[:, :count] = (
        [row.tokens[-1] for row in rows], [row.cached for row in rows], [row.slot for row in rows],
    )  # fmt: skip
    table = words[3 * size : (3 + width) * size].reshape(size, width)
    table[:count] = cache.block_table(rows, width)
    if count < size:
        columns[:, count:] = [[0], [0], [pad_line]]
        table[count:] = cache.spare_block
    if drafts is not None:
        beams = words[(3 + width) * size :].reshape(size, -1)
        beams[:count] = drafts.reshape(count, -1)
        beams[count:] = 0


def pending_from(words: Tensor, rows: int, width: int, beams: Sequence[int] = ()) -> Pending:
    """Views of int64 (R * stand_words,): tokens, cached, lines, block table, and drafts where there are some."""
    tokens, cached, lines = words[: 3 * rows].view(3, rows).unbind()
    table, drafts = words[3 * rows : (3 + width) * rows], words[(3 + width) * rows :]
    return Pending(
        tokens=tokens, cached=cached, lines=lines, blocks=table.view(rows, width),
        drafts=drafts.view(rows, *beams) if beams else None,
    )  # fmt: skip


def root_only(at: Pending) -> TokenTree:
    """The tree of plain decoding: the pending token."""
    zero = torch.zeros_like(at.tokens)[:, None]
    seen = torch.ones(1, 1, 1, dtype=torch.bool, device=zero.device).expand(zero.shape[0], 1, 1)
    return TokenTree(tokens=at.tokens[:, None], parent=zero - 1, depth=zero, mask=seen, levels=0, chain=True)


def draft(
    drafter: Drafter, model: DecoderModel, contexts: Tensor, at: Pending, shape: TreeShape, *, fixed: bool = False
) -> TokenTree:
    """Trees on the pending tokens; contexts (R, H) are the hidden states that drew them. ``fixed`` as in build_tree.

    Beams that were looked up are among the tree's; the head draws the others.
    """
    found = 0 if at.drafts is None else at.drafts.shape[1]
    own = TreeShape(beams=shape.beams - found, length=shape.length)
    beams = beam_search(drafter, model.embed, contexts, at.tokens, own)
    if model.ranks is not None:  # all ranks verify one tree, whatever the last bit of a score is on their own
        beams = model.ranks.first(beams)
    if at.drafts is not None:
        beams = torch.cat([beams, at.drafts], dim=1)
    return build_tree(at.tokens, beams, fixed=fixed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What the model says at every node."""

    logits: Tensor
    """(R, N, V)"""
    hidden: Tensor
    """(R, N, H): after the final norm; the next draft's context."""
    slots: Tensor
    """int64 (R, N): cache slots of the nodes' keys and values."""


def verify(model: DecoderModel, cache: KvCache, at: Pending, tree: TokenTree) -> Verified:
    """Run all nodes, and leave their keys and values in the cache."""
    count, nodes = tree.tokens.shape
    tokens, size = tree.tokens.flatten(), cache.block_size
    if model.triton and attend_fits(model.device, cache.kv_dtype):
        slots = slots_of(at.blocks, at.cached, nodes, size)
        hidden = _forward_triton(model, cache, at, tree, slots.flatten())
    else:
        slots, positions, dark = place_nodes(at.blocks, at.cached, tree, size, native=model.native)
        batch = VerifyBatch(
            rows=count, nodes=nodes, blocks=at.blocks.flatten(), slots=slots.flatten(), hidden_slots=dark,
            native=model.native and native_fits(cache.stored[0], model.spec.head_dim, size, model.dtype),
        )  # fmt: skip
        hidden = forward_nodes(model, cache, batch, tokens, positions.flatten())
    return Verified(
        logits=model.logits(hidden).view(count, nodes, -1), hidden=hidden.view(count, nodes, -1), slots=slots
    )


def forward_nodes(
    model: DecoderModel, cache: KvCache, batch: VerifyBatch, tokens: Tensor, positions: Tensor
) -> Tensor:  # fmt: skip
    """Hidden states (R * N, H) of tokens at positions (R * N,)."""
    if batch.native and model.native_layers is not None:
        return model.native_layers.run(
            model.embed(tokens), model.rope(positions), cache.stored, batch.blocks, batch.slots, batch.hidden_slots
        )
    return model.forward(tokens, positions, lambda layer: lambda q, k, v: attend_verify(cache, layer, batch, q, k, v))


def _forward_triton(model: DecoderModel, cache: KvCache, at: Pending, tree: TokenTree, slots: Tensor) -> Tensor:
    """The same of a tree's nodes, which attend by themselves; ``slots`` (R * N,)."""
    from trtkit.runtime.cuda.attention import attend_verify_triton

    count, nodes = tree.tokens.shape
    batch = CudaVerifyBatch(
        rows=count, nodes=nodes, blocks=at.blocks, cached=at.cached, mask=tree.mask.int(), slots=slots
    )
    positions = (at.cached[:, None] + tree.depth).flatten()
    return model.forward(
        tree.tokens.flatten(), positions,
        lambda layer: lambda q, k, v: attend_verify_triton(cache, layer, batch, q, k, v),
    )  # fmt: skip


def accept(
    cache: KvCache,
    verified: Verified,
    tree: TokenTree,
    sampling: SamplingRows,
    at: Pending,
    switch: Sequence[SwitchRows] = (),
    redraw: Redraw | None = None,
) -> AcceptedPath:
    """Draw at every node, follow the tree, and move the path's keys and values next to what the row had.

    ``switch`` changes the logits while they are drawn from. ``redraw`` as in :class:`Stepper`.
    """
    count, nodes = tree.tokens.shape
    positions = at.cached[:, None] + 1 + tree.depth
    with penalised(verified.logits, tree, switch):
        picks = pick(verified.logits.flatten(0, 1), sampling, positions.flatten()).view(count, nodes)
    if redraw is not None:
        picks = redraw(tree, at, picks)
    path = follow(tree, picks)
    if tree.chain:  # the accepted nodes already lie next to what the row had
        return path
    # Beyond the path, its last node is copied to slots that hold nothing anyone will read. The root stays.
    moved = path.nodes[:, 1:]
    cache.move(verified.slots.gather(1, moved).flatten(), verified.slots[:, 1 : 1 + moved.shape[1]].flatten())
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepper:
    """What every decode step of an engine works on."""

    model: DecoderModel
    cache: KvCache
    contexts: Tensor
    """(slots + 1, H): the hidden state that drew each row's pending token; the last line is for rows that pad a batch.
    A fresh row has none yet: its first draft is a poor one, which costs a little speed and nothing else."""
    head: Drafter | None = None
    redraw: Redraw | None = None
    """For benchmarks that force an acceptance: replaces what was drawn at the nodes."""


def decode_step(
    on: Stepper, at: Pending, shape: TreeShape | None, sampling: SamplingRows, *,
    switch: Sequence[SwitchRows] = (), fixed: bool = False, phase: Phase = _untimed,
) -> tuple[AcceptedPath, Verified]:  # fmt: skip
    """Draft, verify, accept: a pure function of tensors, apart from the cache and the contexts that it updates.

    ``shape`` None is plain decoding; drafts that were looked up have their own. With ``fixed``, no shape depends on the
    data and nothing waits for the device (pad the rows and the block table as you like: the rows' tokens are the same).
    A second call with the same input draws the same tokens, though from another draft.
    """
    with phase("draft"):
        found = 0 if at.drafts is None else at.drafts.shape[1]
        if on.head is not None and shape is not None and found < shape.beams:
            tree = draft(on.head, on.model, on.contexts.index_select(0, at.lines), at, shape, fixed=fixed)
        elif at.drafts is not None:
            tree = build_tree(at.tokens, at.drafts, fixed=fixed)
        else:
            tree = root_only(at)
    with phase("verify"):
        verified = verify(on.model, on.cache, at, tree)
    with phase("accept"):
        path = accept(on.cache, verified, tree, sampling, at, switch, on.redraw)
        if on.head is not None:
            last = path.nodes.gather(1, path.length[:, None] - 1)
            hidden = verified.hidden.gather(1, last[:, :, None].expand(-1, -1, verified.hidden.shape[2]))
            on.contexts.index_copy_(0, at.lines, hidden[:, 0])
    return path, verified


def emitted(path: AcceptedPath) -> Tensor:
    """What the host reads of a step: int64 (R, 1 + D), number of emitted tokens, then the tokens drawn on the path."""
    return torch.cat([path.length[:, None], path.tokens], dim=1)


def after(at: Pending, path: AcceptedPath, pad_line: int) -> Tensor:
    """Where a step leaves the rows: int64 (2, R), pending tokens and cached lengths, as :func:`fill_pending` has them
    once the host has read the step. Rows on ``pad_line`` hold nothing, however often they run."""
    last = path.tokens.gather(1, path.length[:, None] - 1)[:, 0]
    return torch.stack([last, at.cached + path.length * (at.lines != pad_line)])


def log_probabilities(logits: Tensor, path: AcceptedPath) -> Tensor:
    """float32 (R, D): log softmax(logits) of ``path.tokens`` at the nodes that drew them; logits (R, N, V)."""
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
    at_nodes = logits[rows, path.nodes].float()
    return at_nodes.gather(2, path.tokens[..., None]).squeeze(2) - at_nodes.logsumexp(dim=2)
