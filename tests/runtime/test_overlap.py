"""Steps launched before the one in flight is read: the same tokens and ends, and no block written that is another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all
from tests.examples import examples, paired
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.api import FinishReason, Request, StepOutput, SwitchPenalty
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.cuda.graphs import Launched, StepGraphs
from trtkit.runtime.cuda.step_input import StepKey
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.scheduler import Schedule, Scheduler
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)
TREES: list[tuple[TreeShape | None, ...]] = [(None,), (CHAIN,), (TREE,), (None, CHAIN, TREE)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=150)


@pytest.fixture(scope="module")
def head() -> Drafter:
    torch.manual_seed(5)
    made = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32))
    return made.eval().requires_grad_(False)


class _Watched(StepGraphs):
    """Checks each launch when the device runs it: at once, or (``late``) as late as a stream may, when it is read.

    Both ends of what a GPU may do. A late launch also reads the host's buffers late, as a copy on a stream does.
    """

    late = False
    engine: _WatchedEngine
    running: Launched
    followed = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.stream: list[tuple[Launched, slice]] = []

    def follow(self, earlier: Launched, shape: TreeShape | None) -> Launched:
        self.followed += 1
        return super().follow(earlier, shape)

    def _start(self, launched: Launched, words: slice) -> None:
        self.stream.append((launched, words))
        if not self.late:
            self._run()

    def _wait(self, launched: Launched) -> None:
        while any(waiting is launched for waiting, _ in self.stream):
            self._run()

    def _run(self) -> None:
        self.running, words = self.stream.pop(0)
        super()._start(self.running, words)

    def step(self, key: StepKey) -> Tensor:
        at, _ = self.inputs(key)
        size, allocator = self._on.cache.block_size, self.engine._allocator
        nodes = 1 if key.shape is None else key.shape.max_nodes
        for index, cached in enumerate(at.cached.tolist()):
            slots = range(cached, cached + nodes)
            blocks = {int(at.blocks[index, slot // size]) for slot in slots}
            if index >= len(self.running.rows):
                assert (cached, blocks) == (0, {self._on.cache.spare_block}), "a row of padding"
                continue
            row = self.running.rows[index]
            end = self.engine._end(row) if row.slot >= 0 else self.engine.max_total_tokens
            assert cached + 1 < end, "beyond the positions and blocks that a row may use"
            for block in blocks:
                owned = block in row.blocks
                assert allocator.holders(block) == (1 if owned else 0), "the block is another row's too"
                assert owned or row.slot < 0, "a running row writes into a block that it does not hold"
            if self.late and row.slot >= 0:
                assert (int(at.tokens[index]), cached) == (row.tokens[-1], row.cached), "what the host came to know"
        return super().step(key)


class _WatchedEngine(TorchEngine):
    late = False

    def _fixed_steps(self) -> StepGraphs:
        graphs = _Watched(self._stepper, max_rows=self._limits.rows, max_path=1 + self._chooser.max_length)
        graphs.engine, graphs.late = self, self.late
        return graphs

    def _prefill(self, plan: Schedule) -> None:
        assert self.graphs.stream == [], "blocks change hands while a step is in flight"
        super()._prefill(plan)

    @property
    def graphs(self) -> _Watched:
        assert isinstance(self._graphs, _Watched)
        return self._graphs


class _LateEngine(_WatchedEngine):
    late = True


def _engine(
    model: DecoderModel, head: Drafter, trees: tuple[TreeShape | None, ...] = (None,), *,
    kind: type[TorchEngine] = _LateEngine, **limits: Any,
) -> Any:  # fmt: skip
    drafting = None if trees == (None,) else Drafting(head=head, trees=trees)
    changed = {"rows": 8, "total_tokens": 120, "kv_blocks": 300, "block_size": 4, **limits}
    return kind(model, TorchLimits(**{"fixed_shapes": True, "overlap": True, **changed}), drafting)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A request and what happens to it."""

    request: Request
    joins: int
    """Before which step it is submitted."""
    cancel_at: int | None = None
    """Tokens after which it is cancelled."""
    pause_at: int | None = None
    extra: tuple[tuple[int, ...], int, int] | None = None
    """Once it has ended: (tokens to append, tokens to drop, tokens to generate)."""


@dataclass(kw_only=True)
class _Told:
    """What an engine said of one request."""

    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ends: list[FinishReason] = field(default_factory=list)
    paused: bool = False


def _play(engine: TorchEngine, parts: Sequence[_Part]) -> dict[str, _Told]:
    """Run to the end. What happens to a request depends on its own tokens, so that engines can be compared."""
    told = {part.request.id: _Told() for part in parts}
    queue, step, resume = sorted(parts, key=lambda part: part.joins), 0, dict[str, int]()
    by_id = {part.request.id: part for part in parts}
    while queue or resume or engine.has_work:
        while queue and queue[0].joins <= step:
            engine.submit(queue.pop(0).request)
        for name in [name for name, when in resume.items() if when <= step]:
            del resume[name]
            engine.extend(name, (), max_tokens=by_id[name].request.max_tokens - len(told[name].tokens))
        for output in engine.step():
            _hear(engine, by_id[output.request_id], told[output.request_id], output)
        for name, part in by_id.items():
            said, count = told[name], len(told[name].tokens)
            if said.ends or not count or name in resume:
                continue
            if part.cancel_at is not None and count >= part.cancel_at:
                engine.cancel(name)
            elif part.pause_at is not None and count >= part.pause_at and not said.paused:
                engine.pause(name)
                said.paused, resume[name] = True, step + 3
        step += 1
        assert step < 2000
    return told


def _hear(engine: TorchEngine, part: _Part, said: _Told, output: StepOutput) -> None:
    assert not said.ends or (part.extra and len(said.ends) < 2), "output after the end"
    said.tokens += output.tokens
    said.scores += output.logprobs
    if output.finish is None:
        return
    said.ends.append(output.finish)
    if output.finish is not FinishReason.CANCELLED and part.request.hold:
        if part.extra and len(said.ends) == 1:
            tokens, drop, count = part.extra
            engine.extend(part.request.id, tokens, max_tokens=count, drop=min(drop, len(said.tokens)))
        else:
            engine.cancel(part.request.id)


_KINDS: list[dict[str, Any]] = [
    {"temperature": 1.0}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 6},
    {"switch": SwitchPenalty(alpha=3.0, beta=9, tokens=(2, 3))},
]  # fmt: skip


@st.composite
def _scripts(draw: st.DrawFn) -> list[_Part]:
    prompts = random_prompts(draw(st.integers(0, 99)), [1, 6, 13], vocab=VOCAB)
    few, optional = st.integers(0, 3), st.none() | st.integers(1, 12)
    parts = []
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([0, 0, 1, 1, 2, 2, 3]))
        hold = draw(st.booleans())
        made = request(
            str(index), prompts[draw(st.integers(0, 2))], seed=draw(st.integers(0, 999)),
            max_tokens=draw(st.sampled_from([1, 7, 20, 45, 45])),
            stop_ids=draw(st.sampled_from([(), (), (4,), (4, 7)])), **_KINDS[kind],
        )  # fmt: skip
        made = dataclasses.replace(made, hold=hold, logprobs=draw(st.integers(0, 3)) == 0)
        extra = None
        if hold and draw(st.booleans()):
            extra = (tuple(draw(st.lists(st.integers(0, 11), max_size=5))), draw(few), draw(st.integers(1, 9)))
        parts.append(
            _Part(
                request=made, joins=draw(st.sampled_from([0, 0, 1, 4, 11])), extra=extra,
                cancel_at=draw(optional) if draw(few) == 0 else None, pause_at=draw(optional) if hold else None,
            )
        )  # fmt: skip
    return parts


@examples(40)
@given(
    parts=_scripts(), trees=st.sampled_from(TREES), rows=st.sampled_from([1, 3, 6, 6]),
    spare=st.sampled_from([0, 5, 9, 300]), kind=st.sampled_from([_WatchedEngine, _LateEngine]),
)  # fmt: skip
def test_tokens_and_ends_are_those_of_steps_one_by_one(
    model: DecoderModel, head: Drafter, parts: list[_Part], trees: tuple[TreeShape | None, ...], rows: int, spare: int,
    kind: type[TorchEngine],
) -> None:  # fmt: skip
    """Joins, stops, cancels, pauses, extensions, preemption, penalised rows, other trees: overlap is invisible."""
    longest = max(len(part.request.prompt) + part.request.max_tokens + 14 for part in parts)
    blocks = 2 + (longest + max(1 if tree is None else tree.max_nodes for tree in trees)) // 4 + spare
    with _engine(model, head, trees, kind=TorchEngine, rows=rows, kv_blocks=blocks, overlap=False) as one_by_one:
        expected = _play(one_by_one, parts)
    engine = _engine(model, head, trees, kind=kind, rows=rows, kv_blocks=blocks)
    found = _play(engine, parts)
    for part in parts:
        said, wanted = found[part.request.id], expected[part.request.id]
        if part.cancel_at is not None and trees != (None,):  # a step may go past the token that it is cancelled at
            short = min(len(said.tokens), len(wanted.tokens))
            if FinishReason.CANCELLED in said.ends + wanted.ends:
                assert said.tokens[:short] == wanted.tokens[:short]
                continue
        assert (said.tokens, said.ends) == (wanted.tokens, wanted.ends)
        assert said.scores == pytest.approx(wanted.scores, abs=1e-4)
    assert engine.stats().kv_blocks_free == blocks
    engine.close()
    assert engine.stats().new_tokens == sum(len(said.tokens) for said in found.values())


@pytest.mark.parametrize("trees", TREES, ids=str)
def test_all_steps_but_the_first_are_launched_ahead(
    model: DecoderModel, head: Drafter, trees: tuple[TreeShape | None, ...]
) -> None:
    """While nothing happens; and rows that end by their length cost nothing."""
    prompts = random_prompts(1, [5, 9, 2], vocab=VOCAB)
    requests = [request(str(i), prompt, seed=i, max_tokens=90) for i, prompt in enumerate(prompts)]
    engine = _engine(model, head, trees)
    plain = _engine(model, head, kind=TorchEngine, overlap=False)
    assert run_all(engine, requests) == run_all(plain, requests)
    stats = engine.stats()
    # The table grows 4, 8, ... blocks wide; and near its limit a drafting row might end in the step in flight.
    assert engine.graphs.followed >= (stats.steps - 5 if trees == (None,) else 0.7 * stats.steps)
    assert engine.graphs.followed < stats.steps
    assert stats.discarded_row_steps == 0
    if trees == (None,):
        assert (stats.steps, stats.row_steps, stats.peak_rows) == (90, 270, 3)
        assert plain.stats() == dataclasses.replace(stats, seconds=plain.stats().seconds)


@pytest.mark.parametrize(("trees", "kind"), paired(TREES[:3], [_WatchedEngine, _LateEngine]), ids=str)
def test_preemption_happens_and_changes_nothing(
    model: DecoderModel, head: Drafter, trees: tuple[TreeShape | None, ...], kind: type[TorchEngine]
) -> None:
    prompts = random_prompts(5, [20] * 6, vocab=VOCAB)
    requests = [
        request(str(i), prompt, seed=i, max_tokens=60, stop_ids=(7,) * (i % 2)) for i, prompt in enumerate(prompts)
    ]
    roomy = run_all(_engine(model, head, kind=TorchEngine, overlap=False), requests)
    tight = _engine(model, head, trees, kind=kind, kv_blocks=32)
    assert run_all(tight, requests) == roomy
    assert tight.stats().preemptions > 0
    assert tight.graphs.followed > tight.stats().steps // 3


def test_a_stop_costs_one_discarded_row_step(model: DecoderModel, head: Drafter) -> None:
    first, second = random_prompts(7, [10, 10], vocab=VOCAB)
    free, _ = run_all(_engine(model, head), [request("a", first, seed=3, max_tokens=40)])
    stop = free["a"][5]
    kept = free["a"].index(stop) + 1
    requests = [
        request("a", first, seed=3, max_tokens=40, stop_ids=(stop,)), request("b", second, seed=1, max_tokens=40),
    ]  # fmt: skip
    engine = _engine(model, head)
    tokens, ends = run_all(engine, requests)
    assert (len(tokens["a"]), ends["a"]) == (kept, FinishReason.STOP)
    stats = engine.stats()
    assert (stats.discarded_row_steps, stats.row_steps, stats.steps) == (1, kept + 40, 40)
    assert stats.new_tokens == stats.row_steps


def test_a_cancelled_row_gives_way_in_the_same_step(model: DecoderModel, head: Drafter) -> None:
    engine = _engine(model, head, rows=1)
    first, second = random_prompts(8, [10, 10], vocab=VOCAB)
    engine.submit(request("a", first, max_tokens=30))
    engine.submit(request("b", second, max_tokens=3))
    engine.step()
    engine.step()
    engine.cancel("a")
    outputs = engine.step()
    assert [(o.request_id, o.finish) for o in outputs if o.finish] == [("a", FinishReason.CANCELLED)]
    assert [o.request_id for o in outputs if o.tokens] == ["b"]
    engine.cancel("b")
    engine.step()
    assert not engine.has_work
    assert engine.stats().kv_blocks_free == 300
    engine.submit(request("c", first, max_tokens=3))
    assert [o.request_id for o in engine.step()] == ["c"], "what was left in flight does not cost a step"


def test_a_new_request_joins_one_step_later(model: DecoderModel, head: Drafter) -> None:
    engine = _engine(model, head)
    first, second = random_prompts(8, [10, 10], vocab=VOCAB)
    engine.submit(request("a", first, max_tokens=30))
    engine.step()
    engine.submit(request("b", second, max_tokens=3))
    assert [[o.request_id for o in engine.step()] for _ in range(2)] == [["a"], ["a", "b"]]


def test_closing_waits_for_the_launch_in_flight(model: DecoderModel, head: Drafter) -> None:
    engine = _engine(model, head)
    engine.submit(request("a", (1, 2, 3), max_tokens=30))
    engine.step()
    graphs = engine.graphs
    assert len(graphs.stream) == 1
    engine.close()
    assert graphs.stream == []


def test_it_is_off_on_a_cpu(model: DecoderModel, head: Drafter) -> None:
    engine = _engine(model, head, overlap=None)
    run_all(engine, [request("a", (1, 2, 3), max_tokens=9)])
    assert engine.graphs.followed == 0


def test_looking_ahead_takes_free_blocks_only() -> None:
    scheduler = Scheduler(BlockAllocator(9), block_size=2, max_rows=2)
    held = dataclasses.replace(request("held", (1, 2, 3), max_tokens=9), hold=True)
    for each in (held, request("a", (4, 5, 6), max_tokens=9)):
        scheduler.submit(each)
    scheduler.schedule(nodes=1)
    scheduler.rest("held")
    (row,) = scheduler.running
    assert not scheduler.look_ahead(40, 1)
    before = scheduler.allocator.free
    assert scheduler.allocator.holders(row.blocks[-1]) == 1
    assert scheduler.look_ahead(5, 1)
    assert len(row.blocks) * 2 >= row.cached + 5
    assert scheduler.allocator.free < before
    scheduler.submit(request("b", (7, 8), max_tokens=2))
    assert not scheduler.look_ahead(1, 1), "it is the turn of the row that waits"
