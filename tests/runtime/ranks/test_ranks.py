"""An engine over several ranks emits what one engine does, and all ranks do the same."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all
from tests.examples import paired
from tests.runtime.ranks.threads import ThreadRanks, on_ranks
from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.rank_share import RankShare
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import causal_attention
from trtkit.runtime.api import EngineStats, FinishReason, Request, SamplingParams, SwitchPenalty
from trtkit.runtime.draft_head import DraftPrecision, with_kernels
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12
"""So small that a random head is often right; and no multiple of any number of ranks."""
CPU = torch.device("cpu")
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def head() -> Drafter:
    torch.manual_seed(5)
    made = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32))
    return made.eval().requires_grad_(False)


def _model(directory: Path, ranks: ThreadRanks | None = None) -> DecoderModel:
    whole = open_unified(directory)
    source = whole if ranks is None else RankShare(whole=whole, rank=ranks.rank, ranks=ranks.size)
    return DecoderModel(source, device=CPU, dtype=torch.float32, max_tokens=300, ranks=ranks)


def _engine(
    directory: Path, ranks: ThreadRanks | None = None, head: Drafter | None = None,
    trees: tuple[TreeShape | None, ...] = (None,), **limits: Any,
) -> TorchEngine:  # fmt: skip
    drafting = None
    if head is not None and trees != (None,):
        shared = with_kernels(copy.deepcopy(head), device=CPU, dtype=torch.float32, ranks=ranks)
        drafting = Drafting(head=shared, trees=trees)
    settled = TorchLimits(**{"rows": 8, "total_tokens": 200, "kv_blocks": 300, **limits})
    return TorchEngine(_model(directory, ranks), settled, drafting)


def _requests(seed: int = 0) -> list[Request]:
    sampling: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5, "min_p": 0.05},
    ]
    prompts = random_prompts(seed, [1, 9, 33, 40], vocab=VOCAB)
    return [
        request(f"{i}/{j}", prompt, seed=10 * i + j, max_tokens=25, stop_ids=(3,) if j == 1 else (), **params)
        for i, prompt in enumerate(prompts)
        for j, params in enumerate(sampling[: 1 + i])
    ]


def _outcome(engine: TorchEngine, requests: list[Request]) -> tuple[Any, EngineStats]:
    with engine:
        found = run_all(engine, requests, arrivals_per_step=3)
        return found, dataclasses.replace(engine.stats(), seconds={})


@pytest.mark.parametrize(("family", "ranks"), [("qwen2", 2), ("qwen2", 4), ("qwen3", 2), ("llama", 2)])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str, ranks: int) -> None:
    """Four ranks of two KV heads: each is there twice."""
    save_tiny(tmp_path, family, seed=3)
    tokens = torch.tensor(random_prompts(1, [23])[0])
    with torch.inference_mode():
        expected = tiny_model(family, seed=3)(tokens[None]).logits[0]

    @torch.inference_mode()
    def logits(ranks: ThreadRanks) -> torch.Tensor:
        model = _model(tmp_path, ranks)
        hidden = model.forward(tokens, torch.arange(len(tokens)), lambda _layer: causal_attention)
        return model.logits(hidden)

    first, *others = on_ranks(ranks, logits)
    torch.testing.assert_close(first, expected, atol=2e-4, rtol=2e-4)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("ranks", "trees", "fixed"),
    paired([2, 4], [(None,), (CHAIN,), (TREE,), (None, CHAIN, TREE)], [False, True]),
    ids=str,
)
def test_all_ranks_emit_what_one_engine_does(
    directory: Path, head: Drafter, trees: tuple[TreeShape | None, ...], ranks: int, fixed: bool
) -> None:
    """With several trees each rank measures other times, and only the first one's count."""
    plain, _ = _outcome(_engine(directory), _requests())

    def rank(ranks: ThreadRanks) -> tuple[Any, EngineStats]:
        return _outcome(_engine(directory, ranks, head, trees, fixed_shapes=fixed, overlap=fixed), _requests())

    (first, stats), *others = on_ranks(ranks, rank)
    assert first == plain
    assert all(found == first and told == stats for found, told in others)
    if trees != (None,):
        assert stats.accepted_by_depth[0] > 0


@pytest.mark.parametrize(("fixed", "beside"), paired([False, True], [False, True]))
def test_all_ranks_look_up_the_same(directory: Path, head: Drafter, fixed: bool, beside: bool) -> None:
    """Nobody sends drafts around: they follow from the tokens, which are the same everywhere."""
    trees = (None, CHAIN, TREE)
    plain, _ = _outcome(_engine(directory), _requests())

    def rank(ranks: ThreadRanks) -> tuple[Any, EngineStats]:
        limits = TorchLimits(rows=8, total_tokens=200, kv_blocks=300, fixed_shapes=fixed)
        shared = with_kernels(copy.deepcopy(head), device=CPU, dtype=torch.float32, ranks=ranks)
        drafting = Drafting(head=shared if beside else None, lookup=True, trees=trees)
        return _outcome(TorchEngine(_model(directory, ranks), limits, drafting), _requests())

    (first, stats), (other, told) = on_ranks(2, rank)
    assert first == other == plain
    assert stats == told
    assert stats.accepted_by_depth[0] > 0


def test_a_tight_cache_and_calls_between_steps(directory: Path, head: Drafter) -> None:
    """Preemption, cancel, pause and extend fall on the same steps everywhere."""

    def play(engine: TorchEngine) -> tuple[Any, EngineStats]:
        prompts = random_prompts(4, [20] * 5, vocab=VOCAB)
        tokens: dict[str, list[int]] = {str(i): [] for i in range(5)}
        ends: dict[str, FinishReason] = {}
        for i, prompt in enumerate(prompts):
            engine.submit(
                Request(id=str(i), prompt=prompt, sampling=SamplingParams(), max_tokens=60, seed=i, hold=i == 1)
            )
        steps = 0
        with engine:
            while engine.has_work:
                steps += 1
                for output in engine.step():
                    tokens[output.request_id] += output.tokens
                    if output.finish is not None:
                        ends[output.request_id] = output.finish
                if steps == 4:
                    engine.pause("1")
                    engine.extend("1", (2, 5), max_tokens=20, drop=2)
                    engine.cancel("2")
            return (tokens, ends), dataclasses.replace(engine.stats(), seconds={})

    limits: dict[str, Any] = {"kv_blocks": 13, "rows": 5}
    one, _ = play(_engine(directory, None, head, (CHAIN,), **limits))
    (first, stats), other = on_ranks(2, lambda ranks: play(_engine(directory, ranks, head, (CHAIN,), **limits)))
    assert first == one
    assert other == (first, stats)
    assert stats.preemptions > 0
    assert first[1]["2"] is FinishReason.CANCELLED


def test_log_probabilities_and_penalties_see_the_whole_vocabulary(directory: Path) -> None:
    asked = [
        Request(
            id=str(i), prompt=prompt, max_tokens=30, seed=i, logprobs=True,
            sampling=SamplingParams(switch=SwitchPenalty(alpha=3.0, beta=6, tokens=(4, 9))),
        )
        for i, prompt in enumerate(random_prompts(8, [5, 17], vocab=VOCAB))
    ]  # fmt: skip

    def scored(engine: TorchEngine) -> list[tuple[str, tuple[int, ...], tuple[float, ...]]]:
        with engine:
            for one in asked:
                engine.submit(one)
            return [
                (out.request_id, out.tokens, out.logprobs)
                for step in iter(lambda: engine.step() if engine.has_work else None, None)
                for out in step
            ]

    expected = scored(_engine(directory))
    for found in on_ranks(2, lambda ranks: scored(_engine(directory, ranks))):
        assert [line[:2] for line in found] == [line[:2] for line in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[2] == pytest.approx(theirs[2], abs=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["model", "int8"])
@pytest.mark.parametrize("exit_dim", [512, 48])  # without and with an input projection
def test_a_shared_head_is_the_whole_one(precision: DraftPrecision, exit_dim: int) -> None:
    """150 lines over two ranks of 64 and more; with a trimmed vocabulary the ids are those of the whole."""
    torch.manual_seed(6)
    config = DrafterConfig(hidden_size=256, vocab_size=320, exit_dim=exit_dim)
    head = Drafter(config).eval().requires_grad_(False)
    head.trim(torch.randperm(320)[:150])
    context, state, embedding = torch.randn(3, 5, 256).unbind()
    expected, next_state = head.step(context, state, embedding)

    @torch.inference_mode()
    def shared(ranks: ThreadRanks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mine = with_kernels(copy.deepcopy(head), precision, device=CPU, dtype=torch.float32, ranks=ranks)
        return *mine.step(context, state, embedding), mine.ids(torch.arange(150))

    for logits, state_after, ids in on_ranks(2, shared):
        torch.testing.assert_close(logits, expected, atol=0.02 if precision == "int8" else 1e-4, rtol=1e-4)
        torch.testing.assert_close(state_after, next_state, atol=1e-4, rtol=1e-4)
        assert torch.equal(ids, head.ids(torch.arange(150)))


def test_a_draft_is_the_first_ranks(directory: Path, head: Drafter) -> None:
    """Whatever a rank makes of the head's scores itself."""
    other = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32)).eval().requires_grad_(False)
    plain, _ = _outcome(_engine(directory), _requests())
    both = (head, other)
    for tree in (CHAIN, TREE):
        found = on_ranks(2, lambda ranks, tree=tree: _outcome(_apart(directory, ranks, both, tree), _requests()))
        assert [outcome for outcome, _ in found] == [plain, plain]


def _apart(directory: Path, ranks: ThreadRanks, heads: tuple[Drafter, ...], tree: TreeShape) -> TorchEngine:
    """Each rank with a whole head of its own, which no two ranks have in common."""
    limits = TorchLimits(rows=8, total_tokens=200, kv_blocks=300)
    return TorchEngine(_model(directory, ranks), limits, Drafting(head=heads[ranks.rank], trees=(tree,)))


def test_on_ranks_raises_what_happened() -> None:
    def work(ranks: ThreadRanks) -> None:
        if ranks.rank == 1:
            raise ValueError("mine")
        ranks.agree(1)

    with pytest.raises(ValueError, match="mine"):
        on_ranks(2, work)
