"""What a head is trained and measured on: the target's text, who is held out, and the figures, counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drafter.checkpoint import load_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.data import Sample, Window
from drafter.loss import DraftBatch
from drafter.model import Drafter
from tests.chat_files import save_problems
from tests.engines import random_prompts, request, run_all
from tests.fakes import EOS_ID, FakeChat, FakeEngine
from tests.tiny import save_tiny, tiny_model
from tests.training.small import small_training
from trtkit.chat import VARIANTS
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime import load
from trtkit.runtime.api import EngineStats
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.thread_choice import ThreadChooser
from trtkit.runtime.torch_options import Drafting
from trtkit.training import run
from trtkit.training.evaluate import DepthHits, TreeResult, hits_by_depth, measure_tree
from trtkit.training.rows import Row, read_rows
from trtkit.training.target import target_engine, written_answers

CPU = torch.device("cpu")
TWO = (VARIANTS["solve"], VARIANTS["reason"])


class WritingChat(FakeChat):
    """With worked solutions."""

    def completion(self, prompt: Sequence[int], solution: str) -> tuple[int, ...]:
        return (*solution.encode(), EOS_ID)


def _rows() -> list[Row]:
    return [Row(problem=problem, solution=problem * 3) for problem in ("1+1", "x" * 60, "2+2", "3+3")]


def test_worked_solutions_are_cut_and_need_room_behind_the_prompt() -> None:
    made = written_answers(_rows(), WritingChat(), TWO, max_tokens=14)
    assert [bytes(sample.tokens) for sample in made] == [b"solve|1+11+11+", b"solve|2+22+22+", b"reason|3+33+33"]
    assert [sample.prompt for sample in made] == [9, 9, 10]
    whole = written_answers(_rows()[:1], WritingChat(), TWO, max_tokens=99)
    assert whole[0].tokens == (*b"solve|1+11+11+11+1", EOS_ID)


def test_answers_take_as_few_threads_as_are_fastest_and_give_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    model = DecoderModel(open_unified(tmp_path), device=CPU, dtype=torch.float32, max_tokens=160)
    monkeypatch.setattr(ThreadChooser, "threads", property(lambda chooser: chooser.counts[0]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with target_engine(model, None, 64) as engine:
            engine.submit(request("a", (5, 6, 7), max_tokens=3))
            engine.step()
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("free", "blocks"), [(0, 6), (10, 10), (10**6, 32 * 6)])
def test_keys_and_values_take_the_room_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, blocks: int
) -> None:
    """32 rows of 16,384 tokens of a 14B model take 100 GB: more than the GPU has, after hours of training."""
    save_tiny(tmp_path)
    model = DecoderModel(open_unified(tmp_path), device=CPU, dtype=torch.float32, max_tokens=160)
    block = kv_block_bytes(model.spec, "model", torch.float32, 16)
    monkeypatch.setattr(load, "free_bytes", lambda _: 4 * free * block)  # of which a CPU takes a quarter
    head = Drafter(DrafterConfig(hidden_size=model.spec.hidden, vocab_size=320, exit_dim=32)).eval()
    drafting = Drafting(head=head, trees=(TreeShape(beams=4, length=4),))
    asked = [request(str(n), prompt, max_tokens=50) for n, prompt in enumerate(random_prompts(1, [14] * 5))]
    with target_engine(model, drafting, 60) as engine:
        assert engine.stats().kv_blocks == blocks
        tokens, _ = run_all(engine, asked)
    assert all(len(line) == 46 for line in tokens.values())


def test_no_more_rows_are_taken_than_asked(tmp_path: Path) -> None:
    assert [row.problem for row in read_rows(str(save_problems(tmp_path / "rows.jsonl", 9)), count=3)] == [
        f"What is {n} + {n}?" for n in range(3)
    ]


def test_hits_are_those_of_the_head_at_every_place(tmp_path: Path) -> None:
    """By hand: the states of transformers, ``Drafter.step`` from every anchor, every prediction counted once."""
    save_tiny(tmp_path, max_position_embeddings=160)
    model = DecoderModel(open_unified(tmp_path), device=CPU, dtype=torch.float32, max_tokens=160)
    target = tiny_model(max_position_embeddings=160)
    torch.manual_seed(0)
    head = Drafter(DrafterConfig(hidden_size=model.spec.hidden, vocab_size=320, exit_dim=32)).eval()
    head.output.weight.data[6:] = 0  # of the tokens below, many are among its first five
    texts = random_prompts(3, [40, 9, 31], vocab=6)
    samples = [
        Sample(problem=str(n), tokens=t, prompt=p) for n, (t, p) in enumerate(zip(texts, (9, 6, 4), strict=True))
    ]
    found = hits_by_depth(head, model, samples, depths=2, tokens=64)
    assert [hits.part for hits in found] == ["all", "early", "middle", "late"]
    for part, hits in enumerate(found):
        counts = torch.zeros(2, 3)
        for sample in samples:
            completion = range(sample.prompt, len(sample.tokens))
            first = sample.prompt - 1
            if part > 0:
                edges = [len(completion) * third // 3 for third in range(4)]
                completion = completion[edges[part - 1] : edges[part]]
                first = completion.start
            if completion.stop - first <= 3:
                continue  # too short to say something of every depth
            with torch.no_grad():
                states = target.model(torch.tensor([sample.tokens])).last_hidden_state[0]
                for anchor in range(first, completion.stop):
                    state = torch.zeros(model.spec.hidden)
                    for depth in range(min(2, completion.stop - anchor - 2)):
                        fed = torch.tensor(sample.tokens[anchor + depth + 1])
                        logits, state = head.step(states[anchor], state, target.model.embed_tokens(fed))
                        best = logits.topk(5).indices.tolist()
                        goal = sample.tokens[anchor + depth + 2]
                        counts[depth] += torch.tensor([goal == best[0], goal in best, 1])
        assert hits.top1 == pytest.approx((counts[:, 0] / counts[:, 2]).tolist())
        assert hits.top5 == pytest.approx((counts[:, 1] / counts[:, 2]).tolist())
    assert all(0 < one < five < 1 for one, five in zip(found[0].top1, found[0].top5, strict=True))


def test_a_trees_worth_is_counted_over_the_steps_that_drafted() -> None:
    class Counting(FakeEngine):
        def stats(self) -> EngineStats:
            return EngineStats(steps=9, row_steps=50, drafted_row_steps=40, new_tokens=100, accepted_by_depth=(30, 10))

    engine = Counting(lambda request: [1, 2, EOS_ID, 3])
    result = measure_tree(
        engine, [(1,), (2,)], tree=TreeShape(beams=1, length=2), temperature=0.5, stop_ids=(EOS_ID,), max_tokens=8
    )
    assert result == TreeResult(
        tree="1x2", temperature=0.5, tokens_per_step=2.0, all_accepted=0.25, accepted_by_depth=(0.75, 0.25)
    )
    assert [request.prompt for request in engine.submitted] == [(1,), (2,)]
    assert {request.sampling.temperature for request in engine.submitted} == {0.5}
    assert engine.steps == 3, "a sample ends where the model's turn does"


class Watched:
    """What :func:`run.train_head` trains and measures on, by problem."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[Window] = []
        self.ranked: set[str] = set()
        self.judged: set[str] = set()
        self.decoded: set[tuple[int, ...]] = set()
        batch, order = run.draft_batch, run.token_order

        def draft_batch(model: DecoderModel, windows: Sequence[Window]) -> DraftBatch:
            self.windows += windows
            return batch(model, windows)

        def token_order(samples: Sequence[Sample], vocab: int) -> torch.Tensor:
            self.ranked |= {sample.problem for sample in samples}
            return order(samples, vocab)

        def hits_by_depth(_: Drafter, __: DecoderModel, samples: Sequence[Sample], **___: Any) -> list[DepthHits]:
            self.judged |= {sample.problem for sample in samples}
            return []

        def measure_tree(_: Any, prompts: Sequence[tuple[int, ...]], **__: Any) -> TreeResult:
            self.decoded |= set(prompts)
            return TreeResult(
                tree="1x2", temperature=0.0, tokens_per_step=1.0, all_accepted=0.0, accepted_by_depth=(0.0, 0.0)
            )

        for fake in (draft_batch, token_order, hits_by_depth, measure_tree):
            monkeypatch.setattr(run, fake.__name__, fake)


def test_an_epoch_sees_every_training_problem_once_and_no_held_out_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    rows, plan = small_training(
        tmp_path, 14, own=False, window=16, tokens_per_part=1, parts=2, epochs=2, max_tokens=150, rate=0.0
    )
    run.train_head(plan, tmp_path / "out", device=CPU)
    problems = {json.loads(line)["problem"] for line in rows.read_text().splitlines()}
    trained = {window.sample.problem for window in watched.windows}
    assert watched.judged | trained == problems
    assert watched.judged & trained == set()
    assert watched.ranked == trained, "which tokens are frequent is learned from the same"
    held = {window.sample.tokens[: window.sample.prompt] for window in watched.windows}
    assert len(watched.decoded) == len(watched.judged)
    assert watched.decoded.isdisjoint(held)
    # Each batch is one window here, and an update has two: this many epochs, whole ones, each in an order of its own.
    first, second = (watched.windows[i * len(trained) : (i + 1) * len(trained)] for i in range(2))
    for epoch in (first, second):
        assert Counter(window.sample.problem for window in epoch) == Counter(trained)
    assert [window.sample for window in first] != [window.sample for window in second]
    assert len(watched.windows) == 2 * (2 * len(trained) // 2)
    # A rate of 0 leaves what it began with: the model's own output layer, as far as it fits.
    head = load_drafter(tmp_path / "out", dtype=torch.bfloat16, device=CPU)
    matrix = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head.output.weight, matrix[:, :8].to(torch.bfloat16))
