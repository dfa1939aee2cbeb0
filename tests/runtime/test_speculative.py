"""Speculative decoding emits what plain decoding emits, token for token, whatever draws the drafts."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import mixed_requests, random_prompts, request, run_all
from tests.examples import THOROUGH, examples
from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.runtime.tree_choice import TreeChooser

VOCAB = 12
"""So small that even a random head is often right."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def model(directory: Path) -> DecoderModel:
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300)


class _Copycat(Drafter):
    """A head as good as a trained one: it continues with the target's own most likely bigram."""

    def __init__(self, target: Any) -> None:
        super().__init__(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=8))
        ids = torch.arange(VOCAB)
        with torch.no_grad():
            self._table = target.model.embed_tokens.weight.clone()
            self._next = target(ids[:, None]).logits[:, -1]

    def step(
        self, context: torch.Tensor, state: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        token = (embedding @ self._table.T - 0.5 * (self._table**2).sum(1)).argmax(-1)
        return self._next[token], state


@pytest.fixture(scope="module")
def heads() -> dict[str, Drafter]:
    torch.manual_seed(5)
    made = {
        "random": Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32)),
        "sum": Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=512, rnn=False)),
        "copycat": _Copycat(tiny_model(vocab_size=VOCAB)),
    }
    return {name: head.eval().requires_grad_(False) for name, head in made.items()}


def _engine(model: DecoderModel, head: Drafter | None, tree: TreeShape | None, **limits: Any) -> TorchEngine:
    drafting = Drafting(head=head, trees=(tree,)) if head is not None and tree is not None else None
    return TorchEngine(model, TorchLimits(**{"rows": 8, "total_tokens": 200, "kv_blocks": 300, **limits}), drafting)


@examples(25)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["random", "sum", "copycat"]),
    tree=st.builds(TreeShape, beams=st.integers(1, 4), length=st.integers(1, 5)),
    rows=st.integers(1, 8),
    blocks=st.sampled_from([16, 300]),
    arrivals=st.sampled_from([1, 4, 100]),
)
def test_the_stream_is_the_plain_stream(
    model: DecoderModel, heads: dict[str, Drafter], seed: int, name: str, tree: TreeShape, rows: int, blocks: int,
    arrivals: int,
) -> None:  # fmt: skip
    """Any seed, temperature, cut, tree shape, batch mix, head; stops and budgets inside an accepted run; preemption."""
    requests = mixed_requests(seed, VOCAB)
    plain = run_all(_engine(model, None, None), requests)
    engine = _engine(model, heads[name], tree, rows=rows, kv_blocks=blocks, block_size=8)
    assert run_all(engine, requests, arrivals_per_step=arrivals) == plain
    assert engine.stats().kv_blocks_free == blocks


def test_drafts_are_accepted_and_save_steps(model: DecoderModel, heads: dict[str, Drafter]) -> None:
    """Without this, the property above could hold because nothing is ever accepted."""
    prompts = random_prompts(1, [20] * 6, vocab=VOCAB)
    requests = [request(str(i), p, temperature=0, max_tokens=60) for i, p in enumerate(prompts)]
    chain = _engine(model, heads["copycat"], TreeShape(beams=1, length=3))
    wide = _engine(model, heads["copycat"], TreeShape(beams=4, length=3))
    run_all(chain, requests)
    run_all(wide, requests)
    assert chain.stats().tokens_per_step > 1.2
    assert wide.stats().tokens_per_step > chain.stats().tokens_per_step
    depths = chain.stats().accepted_by_depth
    assert len(depths) == 3
    assert depths[0] >= depths[1] >= depths[2] > 0


@torch.no_grad()
def test_the_law_is_the_targets_own(model: DecoderModel, heads: dict[str, Drafter]) -> None:
    """Chi-square of two-token continuations, drawn speculatively, against exact enumeration with transformers."""
    prompt, count = (4, 7), 6000 if THOROUGH else 2400
    target = tiny_model(vocab_size=VOCAB)
    first = target(torch.tensor([prompt])).logits[0, -1].softmax(0)
    pairs = torch.tensor([[*prompt, token] for token in range(VOCAB)])
    expected = (first[:, None] * target(pairs).logits[:, -1].softmax(1)).flatten() * count
    engine = _engine(model, heads["copycat"], TreeShape(beams=2, length=2), rows=64, kv_blocks=600)
    tokens, _ = run_all(engine, [request(str(i), prompt, seed=i, max_tokens=2) for i in range(count)])
    seen = Counter(a * VOCAB + b for a, b in tokens.values())
    observed = torch.tensor([float(seen[i]) for i in range(VOCAB**2)])
    often = expected >= 5
    terms = (observed[often] - expected[often]) ** 2 / expected[often]
    rest, rest_seen = expected[~often].sum(), observed[~often].sum()
    statistic = terms.sum() + (rest_seen - rest) ** 2 / rest.clamp_min(1e-9)
    # Wilson-Hilferty: the chi-square quantile at p = 0.0005 for k degrees of freedom.
    freedom = int(often.sum())
    limit = freedom * (1 - 2 / (9 * freedom) + 3.29 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


@torch.no_grad()
def test_a_draft_begins_at_the_state_that_drew_the_last_token(
    model: DecoderModel, heads: dict[str, Drafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the step before drafted or not: from another state the tokens are the same, and fewer are accepted."""
    chain, wide = TreeShape(beams=1, length=3), TreeShape(beams=4, length=3)
    steps = itertools.cycle([None, chain, wide, wide])
    monkeypatch.setattr(TreeChooser, "choose", lambda *_: next(steps))
    engine = TorchEngine(model, TorchLimits(rows=4, total_tokens=200, kv_blocks=300), Drafting(head=heads["copycat"]))
    for i, prompt in enumerate(random_prompts(4, [1, 9, 33], vocab=VOCAB)):
        engine.submit(request(str(i), prompt, seed=i, max_tokens=100))
    target, longest = tiny_model(vocab_size=VOCAB), 0
    for _ in range(16):
        longest = max(longest, *(len(output.tokens) for output in engine.step()))
        for row in engine._scheduler.running:
            states = target.model(torch.tensor([row.tokens])).last_hidden_state[0]
            torch.testing.assert_close(engine._stepper.contexts[row.slot], states[-2], rtol=0, atol=1e-4)
    assert longest > 1, "the last token was never drawn beyond the root"


def test_trees_may_change_from_step_to_step(model: DecoderModel, heads: dict[str, Drafter]) -> None:
    """The engine's own choice of tree, which follows the clock, is invisible in the tokens."""
    requests = mixed_requests(77, VOCAB)
    limits = TorchLimits(rows=8, total_tokens=200, kv_blocks=300)
    automatic = TorchEngine(model, limits, Drafting(head=heads["copycat"]))
    assert run_all(automatic, requests) == run_all(_engine(model, None, None), requests)
    assert automatic.stats().tokens_per_step > 1
