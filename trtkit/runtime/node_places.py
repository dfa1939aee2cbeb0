"""Where the nodes of a verify step go, and where they look: slots, positions and mask, from where each row stands.

Node n of a row goes to the n-th slot after what the row has in the cache, and sees that and its own ancestors.

Letters: R rows, N nodes, B blocks of the widest row, S cache slots of B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafter.tree import TokenTree
from trtkit.runtime.native import kernels

__all__ = ["place_nodes", "place_nodes_plain", "slots_of"]


def slots_of(blocks: Tensor, cached: Tensor, nodes: int, block_size: int) -> Tensor:
    """int64 (R, N): the nodes' slots; blocks (R, B), cached (R,)."""
    places = _places(cached, nodes)
    return blocks.gather(1, places // block_size) * block_size + places % block_size


def place_nodes(
    blocks: Tensor, cached: Tensor, tree: TokenTree, block_size: int, *, native: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots int64 (R, N), positions int64 (R, N), and bool (R, N, S): True where a node must not look."""
    if native:
        return kernels.place_nodes(blocks, cached, tree.depth, tree.mask, block_size)
    return place_nodes_plain(blocks, cached, tree, block_size)


def place_nodes_plain(
    blocks: Tensor, cached: Tensor, tree: TokenTree, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`place_nodes` in plain torch: the definition."""
    nodes = tree.depth.shape[1]
    seen = torch.arange(blocks.shape[1] * block_size, device=blocks.device)
    hidden = (seen >= cached[:, None])[:, None, :].repeat(1, nodes, 1)
    hidden.scatter_(2, _places(cached, nodes)[:, None, :].expand(-1, nodes, -1), ~tree.mask)
    return slots_of(blocks, cached, nodes, block_size), cached[:, None] + tree.depth, hidden


def _places(cached: Tensor, nodes: int) -> Tensor:
    return cached[:, None] + torch.arange(nodes, device=cached.device)
