"""Small pieces of a decode step in C++: a chain of drafts, the places of nodes, the noise of picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafter.config import DrafterConfig
from drafter.model import Drafter
from drafter.tree import build_tree
from tests.runtime.native_here import need_kernels
from trtkit.runtime.draft_head import DraftPrecision, with_kernels
from trtkit.runtime.native import kernels
from trtkit.runtime.node_places import place_nodes, place_nodes_plain
from trtkit.runtime.sampling import uniforms

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    monkeypatch.setattr(kernels, "_loaded", True)


def _head(table: Tensor, precision: DraftPrecision = "model", kept: int | None = None, **config: Any) -> Drafter:
    head = Drafter(DrafterConfig(**{"hidden_size": 128, "vocab_size": 90, "exit_dim": 256, **config}))
    head = head.to(BF16).requires_grad_(False)
    if kept is not None:
        head.trim(torch.randperm(90)[:kept])
    return with_kernels(head, precision, device=CPU, dtype=BF16, embedding=table)


def _table(hidden: int = 128) -> Tensor:
    return torch.randn(90, hidden).to(BF16)


@pytest.mark.parametrize("exit_dim", [256, 48], ids=["as published", "projected"])
@pytest.mark.parametrize(("rows", "kept", "precision"), [(1, None, "model"), (7, 45, "model"), (40, 45, "int8")])
def test_a_chain_is_drafted_as_the_head_says(
    exit_dim: int, rows: int, kept: int | None, precision: DraftPrecision
) -> None:
    """At each place the token that one step of the head, and its products, finds most likely; the first of equals."""
    torch.manual_seed(rows)
    table = _table()
    head = _head(table, precision, kept, exit_dim=exit_dim)
    assert head.chain is not None
    context, token = torch.randn(rows, 128).to(BF16), torch.arange(rows)
    drafted = head.chain(context, token, 5)
    assert drafted.shape == (rows, 5)
    state = torch.zeros_like(context)
    for place in range(5):
        logits, state = head.step(context, state, table[token])
        token = drafted[:, place]
        assert token.equal(head.ids((logits == logits.amax(dim=1, keepdim=True)).int().argmax(dim=1))), place


def test_the_first_of_equal_lines_is_drafted() -> None:
    torch.manual_seed(1)
    table = _table()
    head = Drafter(DrafterConfig(hidden_size=128, vocab_size=90, exit_dim=256)).to(BF16).requires_grad_(False)
    head.output.weight[30:60] = head.output.weight[:30]
    head.output.weight[60:] = head.output.weight[:30]
    head = with_kernels(head, device=CPU, dtype=BF16, embedding=table)
    assert head.chain is not None
    assert int(head.chain(torch.randn(20, 128).to(BF16), torch.arange(20), 4).max()) < 30


@pytest.mark.parametrize("kept", [None, 45])
def test_a_state_that_is_no_number_drafts_tokens_all_the_same(kept: int | None) -> None:
    """Of a target that overflowed for one row: the others' drafts are theirs, and none lies beyond the vocabulary."""
    torch.manual_seed(2)
    head = _head(_table(), kept=kept)
    context, tokens = torch.randn(3, 128).to(BF16), torch.arange(3)
    assert head.chain is not None
    wanted = head.chain(context, tokens, 4)
    context[1] = torch.nan
    found = head.chain(context, tokens, 4)
    assert found[[0, 2]].equal(wanted[[0, 2]])
    assert found[1].tolist() == [int(head.ids(torch.tensor(0)))] * 4


def test_pending_tokens_may_lie_apart() -> None:
    torch.manual_seed(0)
    head = _head(_table())
    context, tokens = torch.randn(3, 128).to(BF16), torch.arange(6).view(3, 2)
    assert head.chain is not None
    assert head.chain(context, tokens[:, 1], 3).equal(head.chain(context, tokens[:, 1].clone(), 3))


@pytest.mark.parametrize("config", [{"rnn": False}, {"hidden_size": 120}, {"exit_dim": 250}])
def test_a_head_that_does_not_fit_stays_with_torch(config: dict[str, Any]) -> None:
    assert _head(_table(config.get("hidden_size", 128)), **config).chain is None


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5), beams=st.integers(1, 3), length=st.integers(1, 4), block=st.sampled_from([16, 32]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_nodes_are_placed_as_in_torch(rows: int, beams: int, length: int, block: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    drafts = torch.randint(0, 3, (rows, beams, length), generator=random)
    tree = build_tree(torch.zeros(rows, dtype=torch.int64), drafts)
    nodes, width = tree.tokens.shape[1], 4
    cached = torch.randint(0, width * block - nodes + 1, (rows,), generator=random)
    blocks = torch.randperm(rows * width, generator=random).view(rows, width)
    found = place_nodes(blocks, cached, tree, block, native=True)
    for ours, theirs in zip(found, place_nodes_plain(blocks, cached, tree, block), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_nodes_beyond_the_block_table_are_refused() -> None:
    tree = build_tree(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="beyond the block table"):
        place_nodes(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([13]), tree, 16, native=True)


@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), nodes=st.integers(1, 5))
def test_noise_is_that_of_the_definition(seeds: list[int], nodes: int) -> None:
    seed = torch.tensor(seeds)
    positions = torch.arange(len(seeds) * nodes) * 7919 + 2**31
    assert kernels.noise(seed, positions).equal(uniforms(seed.repeat_interleave(nodes), positions))
