"""Drafts that are looked up: what is found, against a search through everything written; tokens that do not change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.beam import beam_search
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from drafter.tree import TokenTree
from tests.engines import mixed_requests, random_prompts, request, run_all
from tests.examples import examples
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.cli.options import tree_named
from trtkit.runtime.api import Request, SwitchPenalty
from trtkit.runtime.lookup import GUESS, LOOKUP_TREES, Lookup, SharedText
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.scheduler import Prefix, Row
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12
CHAIN = TreeShape(beams=1, length=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300)


@pytest.fixture(scope="module")
def head() -> Drafter:
    torch.manual_seed(5)
    return Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32)).eval().requires_grad_(False)


def _engine(
    model: DecoderModel, *trees: TreeShape | None, head: Drafter | None = None, **limits: Any
) -> TorchEngine:  # fmt: skip
    """Without trees, a plain one."""
    drafting = Drafting(head=head, lookup=True, trees=trees) if trees else None
    return TorchEngine(model, TorchLimits(**{"rows": 8, "total_tokens": 200, "kv_blocks": 300, **limits}), drafting)


class _Written:
    """The slow way: every continuation that was ever written, in the order of writing, searched from the end."""

    def __init__(self, prompt: list[int]) -> None:
        self._prompt = prompt
        self.texts: list[list[int]] = []
        self._places: list[tuple[list[int], int]] = [(prompt, at) for at in range(1, len(prompt))]

    def begin(self) -> int:
        self.texts.append(self._prompt[-16:])
        return len(self.texts) - 1

    def write(self, number: int, tokens: list[int]) -> None:
        text = self.texts[number]
        for token in tokens:
            text.append(token)
            self._places.append((text, len(text) - 1))

    def draft(self, number: int, beams: int, length: int) -> list[list[int]]:
        mine = self.texts[number]
        recent = [(text, at) for text, at in reversed(self._places) if at >= 1]
        pairs = [place for place in recent if place[1] >= 2 and len(mine) >= 2 and self._same(mine, place) >= 2][:16]
        pairs.sort(key=lambda place: -self._same(mine, place))  # stable: the most recent first
        single = [place for place in recent if mine and self._same(mine, place) >= 1][:1]
        found: list[list[int]] = []
        for text, at in pairs + single:
            tokens = text[at : at + length]
            while len(tokens) < length:
                tokens.append(tokens[len(tokens) - len(text) + at])
            if tokens not in found:
                found.append(tokens)
        return found[:beams]

    @staticmethod
    def _same(mine: list[int], place: tuple[list[int], int]) -> int:
        text, at = place
        count = 0
        while count < min(16, at, len(mine)) and text[at - 1 - count] == mine[-1 - count]:
            count += 1
        return count


@given(
    prompt=st.lists(st.integers(0, 3), max_size=30),
    turns=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), max_size=8)), max_size=20),
    beams=st.integers(1, 4),
    length=st.integers(1, 6),
)
def test_drafts_are_those_of_a_search_through_everything(
    prompt: list[int], turns: list[tuple[int, list[int]]], beams: int, length: int
) -> None:
    text, written = SharedText(prompt), _Written(prompt)
    for _ in range(3):
        assert text.begin() - 1 == written.begin()
    for number, tokens in turns:
        text.write(number + 1, tokens)
        written.write(number, tokens)
        assert text.draft(number + 1, beams, length) == written.draft(number, beams, length)


@examples(30)
@given(
    seed=st.integers(0, 10_000),
    tree=st.sampled_from([LOOKUP_TREES, *((tree,) for tree in LOOKUP_TREES if tree is not None)]),
    rows=st.integers(1, 8),
    blocks=st.sampled_from([18, 300]),
    arrivals=st.sampled_from([1, 4, 100]),
    fixed=st.booleans(),
    beside=st.booleans(),
)
def test_the_stream_is_the_plain_stream(
    model: DecoderModel, head: Drafter, seed: int, tree: tuple[TreeShape | None, ...], rows: int, blocks: int,
    arrivals: int, fixed: bool, beside: bool,
) -> None:  # fmt: skip
    """Any seed, temperature, cut, tree, batch mix; with and without a head; preemption; steps of fixed shapes, as CUDA
    graphs replay them."""
    requests = mixed_requests(seed, VOCAB)
    plain = run_all(_engine(model), requests)
    engine = _engine(
        model, *tree, head=head if beside else None, rows=rows, kv_blocks=blocks, block_size=8, fixed_shapes=fixed,
        overlap=fixed,
    )  # fmt: skip
    assert run_all(engine, requests, arrivals_per_step=arrivals) == plain
    assert engine.stats().kv_blocks_free == blocks


@pytest.mark.parametrize("rows", [1, 2])
def test_steps_are_saved_as_the_text_allows(model: DecoderModel, rows: int) -> None:
    """Beside the slow search, which says how many steps each sample takes: samples of one prompt one after the other,
    or two at a time that have nothing to do with each other."""
    first, other = random_prompts(4, [20, 20], vocab=VOCAB)
    prompts = (first, first, other, first) if rows == 1 else (first, other)
    asked = [request(str(i), prompt, seed=i % 2, max_tokens=60) for i, prompt in enumerate(prompts)]
    plain, _ = run_all(_engine(model), asked)
    steps, drafted = 0, 0
    siblings = {prompt: _Written(list(prompt)) for prompt in prompts}
    for one in asked:
        written, tokens = siblings[one.prompt], plain[one.id]
        number = written.begin()
        while tokens:
            drafts = written.draft(number, 1, CHAIN.length)
            right = [k for k in range(CHAIN.length + 1) for draft in drafts if draft[:k] == tokens[:k]]
            count = 1 + min(max(right, default=0), len(tokens) - 1)
            written.write(number, tokens[:count])
            steps, drafted, tokens = steps + 1, drafted + bool(drafts), tokens[count:]
    engine = _engine(model, CHAIN, rows=rows)
    assert run_all(engine, asked)[0] == plain
    stats = engine.stats()
    assert stats.row_steps == steps
    assert stats.drafted_row_steps == drafted if rows == 1 else stats.drafted_row_steps >= drafted
    assert steps < 0.95 * stats.new_tokens, "or the comparison above says little"
    assert stats.accepted_by_depth[0] > 0
    assert stats.seconds["draft"] > 0


def test_a_sample_is_the_next_ones_draft(model: DecoderModel) -> None:
    """The same seed says the same: the second one takes a fifth of the steps."""
    (prompt,) = random_prompts(4, [20], vocab=VOCAB)
    engine = _engine(model, CHAIN, rows=1)
    run_all(engine, [request(name, prompt, max_tokens=60) for name in "ab"])
    alone = _engine(model, CHAIN, rows=1)
    run_all(alone, [request("a", prompt, max_tokens=60)])
    assert engine.stats().row_steps - alone.stats().row_steps <= 60 / 5 + 3


@pytest.mark.parametrize("fixed", [False, True])
def test_beside_a_head_a_tree_holds_the_beams_of_both(model: DecoderModel, head: Drafter, fixed: bool) -> None:
    """A tree of two beams: one is the head's own chain, the other is looked up; nothing found, both are the head's."""
    drawn: list[TokenTree] = []
    tree = TreeShape(beams=2, length=4)
    engine = _engine(model, tree, head=head, rows=1, fixed_shapes=fixed)
    engine._stepper = dataclasses.replace(engine._stepper, redraw=lambda tree, _at, picks: drawn.append(tree) or picks)
    if engine._graphs is not None:
        engine._graphs._on = engine._stepper
    (prompt,) = random_prompts(6, [20], vocab=VOCAB)
    written = _Written(list(prompt))
    number, done = written.begin(), 0
    engine.submit(request("a", prompt, max_tokens=40))
    found = 0
    while engine.has_work:
        row = engine._scheduler.running[0] if engine._scheduler.running else None
        context = None if row is None else engine._stepper.contexts[row.slot].clone()
        written.write(number, [] if row is None else row.tokens[len(prompt) + done :])
        done = 0 if row is None else len(row.tokens) - len(prompt)
        looked_up = written.draft(number, 1, tree.length)
        engine.step()
        if row is None or context is None or not drawn:
            drawn.clear()
            continue
        paths = _paths(drawn.pop())
        chain = beam_search(head, model.embed, context[None], torch.tensor([written.texts[number][-1]]), CHAIN)
        assert tuple(chain[0, 0].tolist()) in paths
        assert not looked_up or tuple(looked_up[0]) in paths
        found += bool(looked_up)
    assert found > 10


def _paths(tree: TokenTree) -> set[tuple[int, ...]]:
    """The beams of a tree of one row: the tokens from below the root to each of its deepest nodes."""
    paths = set()
    for node in range(tree.tokens.shape[1]):
        path = []
        while node > 0 and tree.parent[0, node] >= 0:
            path.append(int(tree.tokens[0, node]))
            node = int(tree.parent[0, node])
        if len(path) == tree.levels:
            paths.add(tuple(reversed(path)))
    return paths


def test_a_long_chain_beside_a_head_is_looked_up(model: DecoderModel, head: Drafter) -> None:
    """The engine may choose what costs no run of the head: then it takes the steps that it takes without one."""
    chain = TreeShape(beams=1, length=8)
    (prompt,) = random_prompts(4, [20], vocab=VOCAB)
    asked = [request(str(i), prompt, seed=i % 2, max_tokens=60) for i in range(4)]
    stats = []
    for drafter in (None, head):
        engine = _engine(model, chain, head=drafter, rows=1)
        run_all(engine, asked)
        stats.append(dataclasses.replace(engine.stats(), seconds={}))
    assert stats[0] == stats[1]


def test_trees_learn_from_their_own_kind(head: Drafter) -> None:
    """How often the head's chains are right says nothing about chains that are looked up, or about shared trees."""
    measured = {TreeShape(beams=1, length=3): (0.9, 0.8, 0.7), TreeShape(beams=4, length=4): (0.95, 0.9, 0.8, 0.7)}
    both = Drafting(head=head, lookup=True, expected=measured)
    kinds = {tree: both.kind(tree_named(tree)) for tree in ("1x2", "1x4", "1x8", "2x4", "4x4", "3x2")}
    assert kinds == {"1x2": "1+0", "1x4": "1+0", "1x8": "0+1", "2x4": "1+1", "4x4": "2+2", "3x2": "2+1"}
    assert both.first_shares().keys() == {"1+0", "0+1"}
    assert both.first_shares()["1+0"] == (0.9, 0.8, 0.7)
    assert Drafting(head=head, expected=measured).first_shares().keys() == {"1", "4"}
    assert Drafting(lookup=True).first_shares().keys() == {"0+1", "0+2", "0+4"}


@examples(30)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=80),
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=80),
)
def test_guesses_are_compared_with_what_came(tokens: list[int], pieces: list[int]) -> None:
    """A row that grows by pieces: each guess is the draft of its moment, and is judged eight tokens later."""
    prompt = (1, 2, 0, 1)
    row = Row(request=request("a", prompt), order=0, prefix=Prefix(tokens=prompt[:-1], requests=1), tokens=[*prompt])
    lookup, written = Lookup(), _Written(list(prompt))
    written.begin()
    made: tuple[int, list[int]] | None = None
    for piece in pieces:
        grown = len(row.tokens) - len(prompt)
        expected = []
        if made is None or len(row.tokens) >= made[0] + GUESS.length:
            if made is not None:
                came = row.tokens[made[0] : made[0] + GUESS.length]
                expected = [max(n for n in range(GUESS.length + 1) if made[1][:n] == came[:n] and n <= len(made[1]))]
            made = (len(row.tokens), (written.draft(0, 1, GUESS.length) or [[]])[0])
        assert lookup.check([row]) == expected
        row.tokens += tokens[grown : grown + piece]
        written.write(0, tokens[grown : grown + piece])


def test_the_choice_knows_what_lookups_would_bring(model: DecoderModel) -> None:
    """While all steps are plain: tokens per step that the chain would have, beside an engine that takes it."""
    (prompt,) = random_prompts(4, [20], vocab=VOCAB)
    asked = [request(str(i), prompt, max_tokens=100) for i in range(4)]
    idle, taken = _engine(model, None, GUESS, rows=1), _engine(model, GUESS, rows=1)
    idle._chooser.choose = lambda _rows: None  # never taken
    run_all(idle, asked)
    run_all(taken, asked)
    assert idle.stats().drafted_row_steps == 0
    assert idle._chooser.tokens(GUESS) == pytest.approx(taken.stats().tokens_per_step, rel=0.25)


def test_a_problem_that_is_over_is_forgotten(model: DecoderModel) -> None:
    engine = _engine(model, CHAIN)
    for number, prompt in enumerate(random_prompts(5, [9] * 20, vocab=VOCAB)):
        run_all(engine, [request(str(number), prompt, max_tokens=5)])
    assert engine._lookup is not None
    assert len(engine._lookup._siblings) == 1


def test_the_text_of_a_prompt_does_not_grow_for_ever(model: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may be asked one thing again and again, so that it is never over."""
    monkeypatch.setattr("trtkit.runtime.lookup._MOST_TOKENS", 200)
    (prompt,) = random_prompts(4, [20], vocab=VOCAB)
    asked = [request(str(i), prompt, seed=i, max_tokens=30) for i in range(20)]
    engine = _engine(model, CHAIN, rows=2)
    assert run_all(engine, asked) == run_all(_engine(model), asked)
    assert engine._lookup is not None
    (siblings,) = engine._lookup._siblings.values()
    assert siblings.text.size <= 200 + 2 * (30 + CHAIN.length + 1)


def test_samples_that_hold_more_than_is_kept_are_not_read_again_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 samples of 33,000 tokens, say: to read them all takes ten seconds."""
    monkeypatch.setattr("trtkit.runtime.lookup._MOST_TOKENS", 400)
    read: list[int] = []
    write = SharedText.write

    def noted(text: SharedText, number: int, tokens: list[int]) -> None:
        read.append(len(tokens))
        write(text, number, tokens)

    monkeypatch.setattr(SharedText, "write", noted)
    prefix = Prefix(tokens=(1, 2, 3), requests=8)
    rows = [
        Row(request=request(str(order), (1, 2, 3, 4)), order=order, prefix=prefix, tokens=[1, 2, 3, 4] * 30)
        for order in range(8)
    ]
    lookup, steps = Lookup(), 100
    for step in range(steps):
        assert lookup.draft(rows, CHAIN) is not None
        for row in rows:
            row.tokens.append(1 + step % 4)
    assert sum(read) <= 2 * steps * len(rows)
    (siblings,) = lookup._siblings.values()
    assert siblings.text.size <= 400 + len(rows)


def test_what_was_taken_back_is_not_built_upon(model: DecoderModel) -> None:
    """A sample that is extended after some of its tokens were dropped drafts from what it says now."""
    (prompt,) = random_prompts(6, [20], vocab=VOCAB)
    engine = _engine(model, CHAIN)
    held = Request(id="a", prompt=prompt, sampling=request("a", prompt, temperature=0.0).sampling, max_tokens=30,
                   stop_ids=(), seed=0, hold=True)  # fmt: skip
    run_all(engine, [held])
    engine.extend("a", (1, 2, 1, 2, 1, 2, 1), max_tokens=1, drop=20)
    engine.step()
    assert engine._lookup is not None
    (siblings,) = engine._lookup._siblings.values()
    (number, count) = siblings.written[0]
    assert count == len(prompt) + 10 + 7
    assert siblings.text._texts[number].tokens[-7:].tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert siblings.text.draft(number, 1, 4) == [[2, 1, 2, 1]]


def test_a_step_of_rows_that_have_nothing_to_look_up_is_a_plain_one(model: DecoderModel) -> None:
    engine = _engine(model, CHAIN)
    engine.submit(request("a", (5,), max_tokens=4))
    engine.step()
    assert engine.stats().drafted_row_steps == 0


def test_penalties_on_a_path_work_on_looked_up_trees(model: DecoderModel) -> None:
    """Logits that depend on the path to a node: with fixed shapes such steps run one by one."""
    switch = SwitchPenalty(tokens=(4, 7), alpha=3.0, beta=6)
    asked = [request(str(i), prompt, seed=i, max_tokens=40, temperature=1.0, switch=switch)
             for i, prompt in enumerate(random_prompts(7, [9, 9, 14], vocab=VOCAB))]  # fmt: skip
    plain = run_all(_engine(model), asked)
    for fixed in (False, True):
        assert run_all(_engine(model, TreeShape(beams=2, length=4), fixed_shapes=fixed), asked) == plain
