"""The head's arithmetic against loops over scalars, and beam search against exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from drafter.beam import beam_search
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _affine(linear: torch.nn.Linear, x: list[float]) -> list[float]:
    bias = [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
    rows = zip(linear.weight.tolist(), bias, strict=True)
    return [b + sum(w * value for w, value in zip(row, x, strict=True)) for row, b in rows]


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("exit_dim", [8, 6])
@torch.no_grad()
def test_step_is_the_published_formula(rnn: bool, exit_dim: int) -> None:
    config = DrafterConfig(hidden_size=4, vocab_size=7, exit_dim=exit_dim, num_draft_layers=2, rnn=rnn)
    drafter = Drafter(config).double()
    assert sum(p.numel() for p in drafter.parameters()) == config.parameters
    context, state, embedding = torch.randn(3, 4, dtype=torch.float64)
    logits, after = drafter.step(context, state, embedding)

    if drafter.rnn_w is not None and drafter.rnn_u is not None:
        summed = zip(_affine(drafter.rnn_w, embedding.tolist()), _affine(drafter.rnn_u, state.tolist()), strict=True)
        s = [_silu(a + b) for a, b in summed]
    else:
        s = [a + b for a, b in zip(state.tolist(), embedding.tolist(), strict=True)]
    z = context.tolist() + s
    if drafter.input_proj is not None:
        z = _affine(drafter.input_proj, z)
    for block in drafter.blocks:
        assert isinstance(block, torch.nn.Linear)
        z = [value + _silu(add) for value, add in zip(z, _affine(block, z), strict=True)]
    torch.testing.assert_close(after.tolist(), s)
    torch.testing.assert_close(logits.tolist(), _affine(drafter.output, z))


@torch.no_grad()
def test_wide_beam_search_finds_the_best_sequences() -> None:
    """With as many beams as there are prefixes, beam search is exhaustive search."""
    vocab, length = 4, 3
    drafter = Drafter(DrafterConfig(hidden_size=6, vocab_size=vocab, exit_dim=12)).double()
    table = torch.randn(vocab, 6, dtype=torch.float64)
    context = torch.randn(2, 6, dtype=torch.float64)
    token = torch.tensor([1, 3])
    shape = TreeShape(beams=vocab**2, length=length)
    beams = beam_search(drafter, lambda ids: table[ids], context, token, shape)
    for row in range(2):
        scored = []
        for sequence in itertools.product(range(vocab), repeat=length):
            state, newest, score = torch.zeros(6, dtype=torch.float64), int(token[row]), 0.0
            for choice in sequence:
                logits, state = drafter.step(context[row], state, table[newest])
                score += float(logits.log_softmax(0)[choice])
                newest = choice
            scored.append((-score, list(sequence)))
        assert beams[row].tolist() == [sequence for _, sequence in sorted(scored)[: shape.beams]]


@torch.no_grad()
def test_one_beam_is_greedy() -> None:
    drafter = Drafter(DrafterConfig(hidden_size=6, vocab_size=9, exit_dim=12))
    table = torch.randn(9, 6)
    context, token = torch.randn(3, 6), torch.tensor([0, 5, 8])
    beams = beam_search(drafter, lambda ids: table[ids], context, token, TreeShape(beams=1, length=4))
    state, newest = torch.zeros(3, 6), token
    for position in range(4):
        logits, state = drafter.step(context, state, table[newest])
        newest = logits.argmax(dim=1)
        assert torch.equal(beams[:, 0, position], newest)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_trimmed_head_drafts_the_best_of_the_tokens_that_it_kept(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.tensor([6, 1, 3, 4])
    drafter = Drafter(DrafterConfig(hidden_size=4, vocab_size=7, exit_dim=6))
    table, context, token = torch.randn(7, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 6])
    drafter.output.weight.mul_(4)
    step = drafter.step

    def others_never(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, state = step(*given)
        lost = torch.ones(7, dtype=torch.bool).index_fill(0, kept, False)
        return logits.masked_fill(lost, -torch.inf), state

    shape = TreeShape(beams=beams, length=3)
    with monkeypatch.context() as patch:
        patch.setattr(drafter, "step", others_never)
        wanted = beam_search(drafter, table.__getitem__, context, token, shape)
    assert not torch.equal(beam_search(drafter, table.__getitem__, context, token, shape), wanted)
    drafter.trim(kept)
    assert torch.equal(beam_search(drafter, table.__getitem__, context, token, shape), wanted)
    assert {*wanted.flatten().tolist()} <= {*kept.tolist()}
    assert drafter.output.weight.shape == (4, 6)
