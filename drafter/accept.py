"""The only acceptance rule: follow the tree while the target's own draw agrees with a child.

At each node the target draws one token (with noise that belongs to the position, not to the draft). If a child carries
that token, the child is the next node; otherwise the token ends the run. Every emitted token is thus a fresh draw from
the target given its prefix, whatever the tree: the output is plain decoding's, at any temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.tree import TokenTree

__all__ = ["AcceptedPath", "follow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedPath:
    """The nodes reached in each of R rows, and the token drawn at the last one."""

    nodes: Tensor
    """int64 (R, D): the path from the root, padded with its last node; D = 1 + the deepest draft."""
    length: Tensor
    """int64 (R,): nodes on the path, at least 1 (the root); also the number of emitted tokens."""
    tokens: Tensor
    """int64 (R, D): the token drawn at each node of the path; the first ``length`` are the emitted ones."""


def follow(tree: TokenTree, picks: Tensor) -> AcceptedPath:
    """picks (R, N): the target's draw at every node of ``tree`` (R, N)."""
    if tree.levels == 0:
        root = torch.zeros_like(picks)
        return AcceptedPath(nodes=root, length=root[:, 0] + 1, tokens=picks)
    if tree.chain:
        return _along(tree, picks)
    rows = picks.shape[0]
    row = torch.arange(rows, device=picks.device)
    node = torch.zeros(rows, dtype=torch.int64, device=picks.device)
    length = torch.ones_like(node)
    nodes, tokens = [node], [picks[row, node]]
    for _ in range(tree.levels):
        # A row at its end stays there: its node has had no such child before.
        child = (tree.parent == node[:, None]) & (tree.tokens == tokens[-1][:, None])
        alive = child.any(dim=1)
        node = torch.where(alive, child.int().argmax(dim=1), node)
        length = length + alive
        nodes.append(node)
        tokens.append(picks[row, node])
    return AcceptedPath(nodes=torch.stack(nodes, dim=1), length=length, tokens=torch.stack(tokens, dim=1))


def _along(tree: TokenTree, picks: Tensor) -> AcceptedPath:
    """The same for chains, without a loop: the run ends before the first pick that differs from the next token."""
    right = (picks[:, :-1] == tree.tokens[:, 1:]).cumprod(dim=1)
    length = 1 + right.sum(dim=1)
    nodes = torch.minimum(tree.depth, length[:, None] - 1)
    return AcceptedPath(nodes=nodes, length=length, tokens=picks.gather(1, nodes))
