"""Token trees and the acceptance rule, against a table one can check by hand and against loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.accept import follow
from drafter.tree import build_tree
from tests.reference.trees import accepted, tree_nodes


def test_the_worked_example() -> None:
    tree = build_tree(torch.tensor([9]), torch.tensor([[[4, 7], [4, 2], [5, 7]]]))
    assert tree.tokens.tolist() == [[9, 4, 7, 2, 5, 7]]
    assert tree.parent.tolist() == [[-1, 0, 1, 1, 0, 4]]
    assert tree.depth.tolist() == [[0, 1, 2, 2, 1, 2]]
    assert tree.mask[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    # The target draws 4 at the root, 2 at node 1, 8 at node 3: both drafts of the second beam hold, 8 is new.
    path = follow(tree, torch.tensor([[4, 2, 0, 8, 0, 0]]))
    assert path.nodes.tolist() == [[0, 1, 3]]
    assert path.tokens.tolist() == [[4, 2, 8]]
    assert path.length.tolist() == [3]


_trees = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda shape: st.lists(
        st.lists(
            st.lists(st.integers(0, 2), min_size=shape[2], max_size=shape[2]), min_size=shape[1], max_size=shape[1]
        ),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@given(_trees, st.randoms(use_true_random=False))
def test_trees_and_paths_match_the_loops(rows: list[list[list[int]]], random: object) -> None:
    beams = torch.tensor(rows)
    tree = build_tree(torch.full((len(rows),), 1), beams)
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    picks = torch.randint(0, 3, tree.tokens.shape, generator=generator)
    path = follow(tree, picks)
    for r, row_beams in enumerate(rows):
        nodes = tree_nodes(1, row_beams)
        # The walk up the parents spells each node's prefix; the mask holds exactly the nodes on that walk.
        for i, prefix in enumerate(nodes):
            walk = [i]
            while tree.parent[r, walk[-1]] >= 0:
                walk.append(int(tree.parent[r, walk[-1]]))
            assert tuple(int(tree.tokens[r, j]) for j in reversed(walk[:-1])) == prefix
            assert tree.depth[r, i] == len(prefix)
            assert set(tree.mask[r, i].nonzero().flatten().tolist()) == set(walk)
        wanted_path, wanted_tokens = accepted(nodes, picks[r].tolist())
        count = int(path.length[r])
        assert path.nodes[r, :count].tolist() == wanted_path
        assert path.tokens[r, :count].tolist() == wanted_tokens
