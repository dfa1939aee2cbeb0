"""Beams to a tree: equal prefixes become one node, so that the target looks at each drafted token once.

Worked example, root token 9, three beams of two tokens::

    beams   [4 7] [4 2] [5 7]
    nodes   0:9  1:4  2:7  3:2  4:5  5:7        (beam by beam, a node where its prefix first appears)
    parent  -1   0    1    1    0    4
    depth   0    1    2    2    1    2

Letters: R rows, B beams, L drafted tokens per beam, N nodes (the same for all rows; shorter trees are padded with nodes
that nobody can reach: those of the batch's largest tree, or all 1 + B * L where shapes must not depend on the data).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenTree", "build_tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTree:
    """Draft trees of R rows. Node 0 is the root: the row's pending token."""

    tokens: Tensor
    """int64 (R, N)."""
    parent: Tensor
    """int64 (R, N): index of the parent node, -1 for the root and for padding."""
    depth: Tensor
    """int64 (R, N): 0 at the root; padding has depth 0."""
    mask: Tensor
    """bool (R, N, N): mask[r, i, j] when j is i or an ancestor of i: what node i may attend to."""
    levels: int
    """Depth of the deepest node: L, known without a look at the tensors."""
    chain: bool = False
    """Node i + 1 is the only child of node i, in every row."""


def build_tree(root: Tensor, beams: Tensor, *, fixed: bool = False) -> TokenTree:
    """root (R,), beams (R, B, L) -> their token trees.

    ``fixed``: keep room for 1 + B * L nodes, however many prefixes are shared; then nothing waits for the device.
    """
    rows, width, length = beams.shape
    if width == 1:
        return _chain(root, beams[:, 0])
    device = beams.device
    # same[r, b, c, j]: beams b and c agree on their first j + 1 tokens; the owner is the first such beam.
    same = (beams[:, :, None, :] == beams[:, None, :, :]).cumprod(dim=3).bool()
    owner = same.int().argmax(dim=2)  # (R, B, L)
    own = owner == torch.arange(width, device=device)[None, :, None]
    flat = own.reshape(rows, -1)
    index = flat.cumsum(dim=1).reshape(rows, width, length)  # 1.. at kept places; the root is 0
    node = index.gather(1, owner)  # (R, B, L): node of the j-th token of beam b
    above = torch.cat([torch.zeros_like(node[:, :, :1]), node[:, :, :-1]], dim=2)
    count = 1 + (width * length if fixed else int(flat.sum(dim=1).max()))

    def scatter(values: Tensor, fill: int) -> Tensor:
        # Beams that share a node write the same there.
        out = torch.full((rows, count), fill, dtype=torch.int64, device=device)
        return out.scatter_(1, node.reshape(rows, -1), values.reshape(rows, -1))

    tokens, parent = scatter(beams, 0), scatter(above, -1)
    depth = scatter(torch.arange(1, length + 1, device=device).expand(rows, width, length), 0)
    tokens[:, 0] = root
    return TokenTree(tokens=tokens, parent=parent, depth=depth, mask=_ancestors(parent, length), levels=length)


def _chain(root: Tensor, beam: Tensor) -> TokenTree:
    rows, length = beam.shape
    # On a GPU they may be made while a graph is captured, whose memory is its own.
    shape = _kept_chain_shape if beam.device.type == "cpu" else _chain_shape
    parent, depth, mask = shape(length, beam.device)
    return TokenTree(
        tokens=torch.cat([root[:, None], beam], dim=1),
        parent=parent.expand(rows, -1),
        depth=depth.expand(rows, -1),
        mask=mask.expand(rows, -1, -1),
        levels=length,
        chain=True,
    )


def _chain_shape(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parent and depth (N,) and mask (N, N) of every chain of that length."""
    line = torch.arange(length + 1, device=device)
    seen = torch.ones(length + 1, length + 1, dtype=torch.bool, device=device).tril()
    return line - 1, line, seen


@functools.cache
def _kept_chain_shape(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return _chain_shape(length, device)


def _ancestors(parent: Tensor, length: int) -> Tensor:
    rows, nodes = parent.shape
    mask = torch.eye(nodes, dtype=torch.bool, device=parent.device).expand(rows, -1, -1).clone()
    at, line = parent, torch.arange(nodes, device=parent.device)
    for _ in range(length):
        mask |= at[:, :, None] == line
        at = torch.where(at >= 0, parent.gather(1, at.clamp_min(0)), -1)
    return mask
