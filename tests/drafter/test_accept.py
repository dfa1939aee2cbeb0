"""The acceptance rule at its edges; against loops it stands in test_tree.py."""

from __future__ import annotations

import torch

from drafter.accept import follow
from drafter.tree import TokenTree, build_tree


def test_without_drafts_the_draw_at_the_root_is_all() -> None:
    zero = torch.zeros(2, 1, dtype=torch.int64)
    tree = TokenTree(
        tokens=zero + 9, parent=zero - 1, depth=zero, mask=torch.ones(2, 1, 1, dtype=torch.bool), levels=0, chain=True
    )
    path = follow(tree, torch.tensor([[4], [5]]))
    assert (path.nodes.tolist(), path.length.tolist(), path.tokens.tolist()) == ([[0], [0]], [1, 1], [[4], [5]])


def test_a_path_is_padded_with_its_last_node_in_a_chain_and_in_a_tree() -> None:
    root, beam = torch.tensor([9, 9, 9]), torch.tensor([[4, 5, 6]] * 3)
    picks = torch.tensor([[4, 5, 6, 7], [4, 2, 6, 7], [2, 5, 6, 7]])
    other = torch.tensor([[8, 8, 8]] * 3)
    chain = build_tree(root, beam[:, None])
    fork = build_tree(root, torch.stack([beam, other], dim=1))
    assert (chain.chain, fork.chain) == (True, False)
    for path in (follow(chain, picks), follow(fork, torch.cat([picks, torch.zeros_like(beam)], dim=1))):
        assert path.length.tolist() == [4, 2, 1]
        assert path.nodes.tolist() == [[0, 1, 2, 3], [0, 1, 1, 1], [0, 0, 0, 0]]
        assert path.tokens.tolist() == [[4, 5, 6, 7], [4, 2, 2, 2], [2, 2, 2, 2]]


def test_room_for_all_nodes_changes_no_path() -> None:
    root, beams = torch.tensor([9]), torch.tensor([[[4, 7], [4, 2], [5, 7]]])
    tight, roomy = build_tree(root, beams), build_tree(root, beams, fixed=True)
    assert (tight.tokens.shape, roomy.tokens.shape) == ((1, 6), (1, 7))
    assert roomy.tokens[:, :6].tolist() == tight.tokens.tolist()
    assert roomy.parent.tolist() == [[*tight.parent[0].tolist(), -1]]
    picks = torch.tensor([[4, 2, 0, 8, 0, 0, 3]])
    one, other = follow(tight, picks[:, :6]), follow(roomy, picks)
    for name in ("nodes", "length", "tokens"):
        assert torch.equal(getattr(one, name), getattr(other, name))
