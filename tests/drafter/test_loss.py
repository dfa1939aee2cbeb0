"""The chunked loss against ``Drafter.step`` unrolled by hand at every anchor."""

from __future__ import annotations

import pytest
import torch

from drafter.config import DrafterConfig
from drafter.loss import DraftBatch, Objective, draft_loss
from drafter.model import Drafter

VOCAB, HIDDEN = 11, 6


def _batch(lengths: list[int], prompt: int) -> DraftBatch:
    count = sum(lengths)
    return DraftBatch(
        tokens=torch.randint(0, VOCAB, (count,)),
        hidden=torch.randn(count, HIDDEN),
        embeddings=torch.randn(count, HIDDEN),
        segment=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]),
        scored=torch.cat([torch.arange(n) >= prompt for n in lengths]),
    )


def _by_hand(
    head: Drafter, batch: DraftBatch, depths: int, objective: Objective, lm_head: torch.Tensor
) -> tuple[list[torch.Tensor], list[int]]:
    losses, counts = [], []
    for depth in range(1, depths + 1):
        terms = []
        for anchor in range(len(batch.tokens) - depth - 1):
            goal = anchor + depth + 1
            if batch.segment[goal] != batch.segment[anchor] or not batch.scored[goal]:
                continue
            state, logits = torch.zeros(HIDDEN), torch.zeros(VOCAB)
            for j in range(1, depth + 1):
                logits, state = head.step(batch.hidden[anchor], state, batch.embeddings[anchor + j])
            log_probs = logits.log_softmax(0)
            if objective == "ce":
                terms.append(-log_probs[batch.tokens[goal]])
            else:
                teacher = (lm_head @ batch.hidden[goal - 1]).softmax(0)
                terms.append(-(teacher * log_probs).sum())
        losses.append(torch.stack(terms).mean())
        counts.append(len(terms))
    return losses, counts


@pytest.mark.parametrize("objective", ["ce", "kd"])
@pytest.mark.parametrize("rnn", [True, False])
def test_loss_and_gradients_match_the_unrolled_step(objective: Objective, rnn: bool) -> None:
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=8, rnn=rnn))
    lm_head = torch.randn(VOCAB, HIDDEN)
    batch = _batch([9, 4, 7], prompt=2)
    weights = [1.0, 0.5, 0.25]
    ours = draft_loss(head, batch, depth_weights=weights, objective=objective, lm_head=lm_head, chunk=4)
    ours.total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}

    head.zero_grad(set_to_none=True)
    losses, counts = _by_hand(head, batch, 3, objective, lm_head)
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert isinstance(total, torch.Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.total, total)
    torch.testing.assert_close(ours.by_depth, torch.stack(losses).detach())
    assert ours.count.tolist() == counts
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_hits_are_counted() -> None:
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=8))
    with torch.no_grad():
        head.output.weight.zero_()
        for parameter in head.blocks.parameters():
            parameter.zero_()
        assert head.input_proj is not None
        head.input_proj.weight.zero_()
        head.input_proj.bias.fill_(1.0)
        head.output.weight[3] = 1.0  # always says 3, then ties
    batch = _batch([12], prompt=0)
    result = draft_loss(head, batch, depth_weights=[1.0])
    assert result.top1[0] == (batch.tokens[2:] == 3).float().mean()
