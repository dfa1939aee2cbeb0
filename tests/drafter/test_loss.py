"""The chunked loss against ``Drafter.step`` unrolled by hand at every anchor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drafter import loss
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
) -> tuple[list[torch.Tensor], list[int], list[list[float]]]:
    """By depth: mean loss, predictions, and the shares whose 1 or 5 most likely tokens hold the right one."""
    losses, counts, shares = [], [], []
    for depth in range(1, depths + 1):
        terms, hits = [], [0, 0]
        for anchor in range(len(batch.tokens) - depth - 1):
            goal = anchor + depth + 1
            if batch.segment[goal] != batch.segment[anchor] or not batch.scored[goal]:
                continue
            state, logits = torch.zeros(HIDDEN), torch.zeros(VOCAB)
            for j in range(1, depth + 1):
                logits, state = head.step(batch.hidden[anchor], state, batch.embeddings[anchor + j])
            for place, size in enumerate((1, 5)):
                hits[place] += int(batch.tokens[goal]) in logits.topk(size).indices.tolist()
            log_probs = logits.log_softmax(0)
            if objective == "ce":
                terms.append(-log_probs[batch.tokens[goal]])
            else:
                teacher = (lm_head @ batch.hidden[goal - 1]).softmax(0)
                terms.append(-(teacher * log_probs).sum())
        losses.append(torch.stack(terms).mean())
        counts.append(len(terms))
        shares.append([hit / len(terms) for hit in hits])
    return losses, counts, shares


@pytest.mark.parametrize("objective", ["ce", "kd"])
@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize(("chunk", "logits", "block"), [(4, 1 << 19, 2048), (1024, 1 << 19, 2048), (1024, 50, 3)])
def test_loss_and_gradients_match_the_unrolled_step(
    objective: Objective, rnn: bool, chunk: int, logits: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the work is cut: in ``chunk`` predictions, ``logits`` numbers, ``block`` rows of the output layer."""
    monkeypatch.setattr(loss, "_IN_CACHE", logits)
    monkeypatch.setattr(loss, "_VOCAB_BLOCK", block)
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=8, rnn=rnn))
    lm_head = torch.randn(VOCAB, HIDDEN)
    batch = _batch([9, 4, 7], prompt=2)
    weights = [1.0, 0.5, 0.25]
    ours = draft_loss(
        head, batch, depth_weights=weights, objective=objective, lm_head=lm_head, chunk=chunk, backward=True
    )
    gradients = {name: parameter.grad / ours.weight for name, parameter in head.named_parameters()}

    head.zero_grad(set_to_none=True)
    losses, counts, hits = _by_hand(head, batch, 3, objective, lm_head)
    shares = torch.tensor(weights) * torch.tensor(counts)
    total = (torch.stack(losses) * shares).sum() / shares.sum()
    total.backward()
    torch.testing.assert_close(ours.total, total)
    torch.testing.assert_close(ours.by_depth, torch.stack(losses).detach())
    assert ours.count.tolist() == counts
    torch.testing.assert_close(torch.stack([ours.top1, ours.top5], dim=1), torch.tensor(hits))
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("objective", ["ce", "kd"])
def test_a_head_that_is_an_output_layer_alone_is_trained(objective: Objective) -> None:
    """No blocks, no recurrence, the published width: nothing but the output layer has a gradient."""
    head = Drafter(
        DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=2 * HIDDEN, num_draft_layers=0, rnn=False)
    )
    batch, lm_head = _batch([9, 6], prompt=2), torch.randn(VOCAB, HIDDEN)
    ours = draft_loss(head, batch, depth_weights=[1.0], objective=objective, lm_head=lm_head, backward=True)
    (parameter,) = head.parameters()
    assert parameter.grad is not None
    gradient = parameter.grad / ours.weight
    head.zero_grad(set_to_none=True)
    (loss,), _, _ = _by_hand(head, batch, 1, objective, lm_head)
    loss.backward()
    torch.testing.assert_close(gradient, parameter.grad)


def test_arithmetic_in_bfloat16_keeps_gradients_in_float32() -> None:
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=8))
    batch, found = _batch([40, 20], prompt=2), []
    for reduced in (False, True):
        head.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            result = draft_loss(head, batch, depth_weights=[1.0, 0.5], backward=True)
        found.append([result.total, *(parameter.grad for parameter in head.parameters())])
    for exact, rough in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        assert not torch.equal(rough, exact)
        assert (rough - exact).norm() < 0.02 * exact.norm()


def _gradients(head: Drafter, batches: list[DraftBatch]) -> dict[str, torch.Tensor]:
    head.zero_grad(set_to_none=True)
    weight = sum(draft_loss(head, batch, depth_weights=[1.0, 0.5], backward=True).weight for batch in batches)
    return {name: parameter.grad / weight for name, parameter in head.named_parameters() if parameter.grad is not None}


def _join(batches: list[DraftBatch]) -> DraftBatch:
    return DraftBatch(
        **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "hidden", "embeddings")},
        segment=torch.cat([batch.segment + 100 * index for index, batch in enumerate(batches)]),
        scored=torch.cat([batch.scored for batch in batches]),
    )


def test_batches_of_different_sizes_add_up_to_one_with_all_their_windows() -> None:
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=12))
    nothing = _batch([2], prompt=2)  # a window with nothing to predict
    parts = [_batch([30, 8], prompt=3), nothing, _batch([5], prompt=1)]
    apart, together = _gradients(head, parts), _gradients(head, [_join(parts)])
    assert apart.keys() == together.keys() == dict(head.named_parameters()).keys()
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


class _Products(TorchDispatchMode):
    """Notes the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.shapes.add(tuple(arg.shape for arg in args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["ce", "kd"])
def test_every_batch_multiplies_matrices_of_the_same_shapes(objective: Objective) -> None:
    """oneDNN keeps code and buffers for each shape: with new shapes in every batch, memory grows with every update."""
    head = Drafter(DrafterConfig(hidden_size=HIDDEN, vocab_size=VOCAB, exit_dim=8))
    seen = []
    for lengths in ([40], [3, 17, 9], [61, 12]):
        with _Products() as products:
            draft_loss(head, _batch(lengths, 2), depth_weights=[1.0, 1.0], objective=objective, chunk=16, backward=True,
                       lm_head=torch.randn(VOCAB, HIDDEN))  # fmt: skip
        seen.append(products.shapes)
    assert seen[0]
    assert seen[0] == seen[1] == seen[2]


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
