"""Scheduling as bookkeeping: no block is lost or used twice, everyone finishes, prompts are shared."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.examples import examples
from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.scheduler import _LEAST_REUSED, Row, Schedule, Scheduler


@pytest.fixture(autouse=True, scope="module")
def _every_block_is_worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtkit.runtime.scheduler._LEAST_REUSED", 1)
        yield


def _request(name: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    return Request(id=name, prompt=prompt, sampling=SamplingParams(), max_tokens=max_tokens, seed=0)


def _check_blocks(scheduler: Scheduler, nodes: int) -> None:
    """Every running row has room, and the block it writes into is its own."""
    writers: dict[int, str] = {}
    for row in scheduler.running:
        assert len(row.blocks) * scheduler.block_size >= row.cached + nodes
        for position in range(row.cached, row.cached + nodes):
            block = row.blocks[position // scheduler.block_size]
            assert writers.setdefault(block, row.request.id) == row.request.id
            assert not scheduler.allocator.is_shared(block)


def _spans(plan: Schedule) -> list[tuple[int, int]]:
    """Where the parts of prompts that are computed begin and end."""
    return [(part.start, part.start + len(part.tokens)) for part in plan.prefills]


def _advance(row: Row) -> None:
    row.tokens.append(1)
    row.cached = len(row.tokens) - 1


_arrivals = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=14
)  # (which prompt, tokens to generate, steps before the next arrives)


@given(_arrivals, st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from([14, 17, 40]), st.data())
def test_everyone_finishes_and_every_block_comes_back(
    arrivals: list[tuple[int, int, int]], max_rows: int, block_size: int, pool: int, data: st.DataObject
) -> None:
    prompts = [tuple(range(n)) for n in (1, 4, 9)]
    total = pool * block_size // 4 * 3
    scheduler = Scheduler(BlockAllocator(pool), block_size=block_size, max_rows=max_rows)
    queue = []
    for i, (which, tokens, gap) in enumerate(arrivals):
        request = _request(str(i), prompts[which], tokens)
        if scheduler.blocks_needed(len(request.prompt) + tokens) <= pool:
            queue.append((gap, request))
    finished = set()
    for _ in range(3000):
        while queue and queue[0][0] <= 0:
            scheduler.submit(queue.pop(0)[1])
        if queue:
            queue[0] = (queue[0][0] - 1, queue[0][1])
        if not scheduler.has_work:
            if not queue:
                break
            continue
        plan = scheduler.schedule(nodes=1)
        assert plan.rows, "work, but nobody runs"
        assert len(plan.rows) <= max_rows
        for row in plan.recomputes:
            row.cached = len(row.tokens) - 1
        _check_blocks(scheduler, 1)
        free = scheduler.allocator.free
        if data.draw(st.booleans()):
            ahead = scheduler.look_ahead(4, 1)
            _check_blocks(scheduler, 4 if ahead else 1)
            assert ahead or scheduler.allocator.free == free
            assert scheduler.running == list(plan.rows)
        for row in plan.rows:
            _advance(row)
            if row.generated >= row.request.max_tokens or data.draw(st.integers(0, 40)) == 0:
                finished.add(row.request.id)
                scheduler.finish(row.request.id)
    assert not scheduler.has_work, f"stuck with {total}"
    assert scheduler.allocator.free == pool


class _Slots:
    """What a device would find in the slots of the blocks: for each the tokens up to the one that was computed there,
    which is what keys and values depend on."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._kept: dict[tuple[int, int], tuple[int, ...]] = {}

    def compute(self, blocks: Sequence[int], start: int, tokens: list[int]) -> None:
        for place in range(start, len(tokens)):
            self._kept[blocks[place // self._size], place % self._size] = tuple(tokens[: place + 1])

    def run(self, plan: Schedule) -> None:
        for part in plan.prefills:
            last = part.start - 1
            seen = self._kept[part.blocks[last // self._size], last % self._size] if part.start else ()
            self.compute(part.blocks, part.start, [*seen, *part.tokens])
        before = dict(self._kept)
        for source, target in plan.copies:
            for offset in range(self._size):
                self._kept[target, offset] = before.get((source, offset), ())
        for row in plan.recomputes:
            self.compute(row.blocks, row.cached, row.tokens[:-1])
            row.cached = len(row.tokens) - 1

    def check(self, row: Row) -> None:
        for place in range(row.cached):
            found = self._kept[row.blocks[place // self._size], place % self._size]
            assert found == tuple(row.tokens[: place + 1]), f"position {place} of request {row.request.id}"


@examples(100)
@given(
    max_rows=st.integers(1, 4), block_size=st.sampled_from([1, 2, 4]), nodes=st.sampled_from([1, 4]),
    spare=st.integers(0, 6), prefix_cache=st.booleans(), draw=st.randoms(use_true_random=True),
)  # fmt: skip
def test_every_row_finds_its_own_tokens_in_its_blocks(
    max_rows: int, block_size: int, nodes: int, spare: int, prefix_cache: bool, draw: random.Random
) -> None:
    """Requests that come, rest, go on with other tokens, are cancelled and asked again with what they have written, in
    little more memory than one takes."""
    longest = 22
    pool = Scheduler(BlockAllocator(0), block_size=block_size, max_rows=1).blocks_needed(longest + nodes) + spare
    allocator, slots = BlockAllocator(pool), _Slots(block_size)
    scheduler = Scheduler(
        allocator, block_size=block_size, max_rows=max_rows, part=draw.choice([5, 100]), prefix_cache=prefix_cache
    )
    prompts = [tuple(range(length)) for length in (1, 4, 9)] + [(0, 1, 2, 3, 7, 7, 7)]
    alive: list[str] = []
    rows: dict[str, Row] = {}
    written: list[tuple[int, ...]] = []
    fresh = itertools.count(100)

    def submit(name: str) -> None:
        prompt = draw.choice(written[-3:] if written and draw.random() < 0.5 else prompts)
        scheduler.submit(replace(_request(name, prompt, draw.randint(1, longest - len(prompt))), hold=True))
        alive.append(name)

    for number in range(60):
        action = draw.choice(["submit", "submit", "rest", "resume", "cancel", "cancel", "step", "step"])
        resting = [row for name in alive if (row := scheduler.resting(name)) is not None]
        if action == "submit":
            submit(str(number))
        elif action == "rest" and (able := [name for name in alive if scheduler.can_rest(name)]):
            scheduler.rest(draw.choice(able))
        elif action == "resume" and resting:
            row = draw.choice(resting)
            kept = len(row.tokens) - draw.randint(0, row.generated)
            added = [next(fresh) for _ in range(draw.randint(0, min(5, longest - 1 - kept)))] if kept < longest else []
            if kept + len(added) < longest:
                limit = draw.randint(kept + len(added) + 1, longest)
                scheduler.resume(row.request.id, added, drop=len(row.tokens) - kept, limit=limit)
        elif action == "cancel" and alive:
            name = draw.choice(alive)
            scheduler.finish(name)
            alive.remove(name)
            if name in rows:
                written.append((*rows.pop(name).tokens, 5)[: longest - 1])
        if not scheduler.has_work:
            continue
        plan = scheduler.schedule(nodes)
        names = [int(row.request.id.partition("+")[0]) for row in plan.rows]
        assert names == sorted(names), "oldest first"
        assert 0 < len({row.slot for row in plan.rows}) == len(plan.rows) <= max_rows
        slots.run(plan)
        reach = nodes
        if draw.random() < 0.2:  # the next step is to be launched before this one is read
            waits = False
            if draw.random() < 0.5:
                submit(f"{number}+")
                waits = len(copy.deepcopy(scheduler).schedule(nodes).rows) > len(plan.rows)
            if scheduler.look_ahead(2 * nodes, nodes):
                assert not waits, "somebody else's turn"
                reach = 2 * nodes
        _check_blocks(scheduler, reach)
        for row in plan.rows:
            rows[row.request.id] = row
            slots.check(row)
            assert row.cached == len(row.tokens) - 1
            drafted = [next(fresh) for _ in range(reach)]
            slots.compute(row.blocks, row.cached, row.tokens + drafted[:-1])  # of which a part is accepted
            row.tokens += drafted[: draw.randint(1, min(nodes, row.limit - len(row.tokens)))]
            row.cached = len(row.tokens) - 1
            if len(row.tokens) == row.limit:
                scheduler.rest(row.request.id)
        for row in rows.values():
            slots.check(row)
    for name in alive:
        scheduler.finish(name)
    assert scheduler.allocator.free == pool


def test_a_request_alone_gets_to_its_end_in_the_blocks_that_it_is_said_to_need() -> None:
    for length, block_size, nodes in itertools.product(range(1, 9), (1, 2, 3, 4), (1, 4)):
        pool = Scheduler(BlockAllocator(0), block_size=block_size, max_rows=1).blocks_needed(length + 9 + nodes)
        scheduler = Scheduler(BlockAllocator(pool), block_size=block_size, max_rows=1)
        scheduler.submit(_request("alone", tuple(range(length)), 9))
        for _ in range(9):
            plan = scheduler.schedule(nodes)
            assert (len(plan.rows), plan.preempted) == (1, 0), (length, block_size, nodes)
            _check_blocks(scheduler, nodes)
            _advance(plan.rows[0])


def test_equal_prompts_are_prefilled_once_and_share_blocks() -> None:
    scheduler = Scheduler(BlockAllocator(64), block_size=4, max_rows=8)
    for i in range(5):
        scheduler.submit(_request(str(i), tuple(range(11)), 8))
    plan = scheduler.schedule(nodes=1)
    assert _spans(plan) == [(0, 10)]
    assert len({row.blocks[0] for row in plan.rows}) == 1
    assert len({row.blocks[2] for row in plan.rows}) == 5, "the partial block is copied before it is written"
    assert len(plan.copies) == 5
    # 3 prompt blocks, and one copy of the partial one for each row
    assert 64 - scheduler.allocator.free == 3 + 5


def test_the_youngest_row_is_preempted_and_comes_back() -> None:
    scheduler = Scheduler(BlockAllocator(8), block_size=2, max_rows=4)
    for i in range(2):
        scheduler.submit(_request(str(i), (10 + i, 1, 2), 9))
    for _ in range(4):
        for row in scheduler.schedule(nodes=1).rows:
            _advance(row)
    seen = []
    for _ in range(30):
        plan = scheduler.schedule(nodes=1)
        for row in plan.recomputes:
            assert row.tokens[:3] == list(row.request.prompt)
            row.cached = len(row.tokens) - 1
        seen.append((plan.preempted, [row.request.id for row in plan.rows]))
        for row in plan.rows:
            _advance(row)
            if row.generated >= 9:
                scheduler.finish(row.request.id)
        if not scheduler.has_work:
            break
    assert any(preempted for preempted, _ in seen)
    assert all("0" in ids for preempted, ids in seen if preempted), "the oldest row always proceeds"
    assert not scheduler.has_work


def test_blocks_that_nobody_runs_in_are_taken_before_a_row_is_preempted() -> None:
    scheduler = Scheduler(BlockAllocator(9), block_size=2, max_rows=4)
    scheduler.submit(_request("old", (1, 2, 3), 20))
    scheduler.submit(_request("young", (4, 5, 6), 20))
    scheduler.submit(replace(_request("resting", (7, 8, 9), 20), hold=True))
    for _ in range(2):
        for row in scheduler.schedule(nodes=1).rows:
            _advance(row)
    scheduler.rest("resting")
    for _ in range(3):  # to eight tokens each: four of the nine blocks
        plan = scheduler.schedule(nodes=1)
        assert (plan.preempted, [row.request.id for row in plan.rows]) == (0, ["old", "young"])
        for row in plan.rows:
            _advance(row)
    rested = scheduler.resting("resting")
    assert rested is not None
    assert rested.blocks == []


def test_cancelling_frees_waiting_and_running_rows() -> None:
    scheduler = Scheduler(BlockAllocator(16), block_size=4, max_rows=1)
    for i in range(3):
        scheduler.submit(_request(str(i), (1, 2, 3, 4, 5), 4))
    scheduler.schedule(nodes=1)
    for i in (0, 1, 2):
        scheduler.finish(str(i))
    assert not scheduler.has_work
    assert scheduler.allocator.free == 16


def test_a_prompt_takes_over_what_was_computed_before_it() -> None:
    """What a sample has written is there for whoever goes on from it; the last block of it, half full, is not."""
    scheduler = Scheduler(BlockAllocator(16), block_size=4, max_rows=4, prefix_cache=True)
    scheduler.submit(_request("a", tuple(range(10)), 20))
    plan = scheduler.schedule(nodes=1)
    assert _spans(plan) == [(0, 9)]
    row = plan.rows[0]
    for _ in range(5):
        _advance(row)
    scheduler.finish("a")
    assert scheduler.allocator.free == 16
    longer, other = (*row.tokens, 7, 8), (*range(8), 70, 71)
    scheduler.submit(_request("b", longer, 1))
    scheduler.submit(_request("c", other, 1))
    plan = scheduler.schedule(nodes=1)
    assert _spans(plan) == [(12, 16), (8, 9)]
    assert plan.rows[0].blocks[:2] == plan.rows[1].blocks[:2]


def test_what_is_kept_goes_before_anything_else_does() -> None:
    """Longest unused first, the end of a text before its beginning."""
    scheduler = Scheduler(BlockAllocator(9), block_size=2, max_rows=2, prefix_cache=True)
    for name, first in (("a", 0), ("b", 100)):
        scheduler.submit(_request(name, tuple(range(first, first + 7)), 1))
        scheduler.schedule(nodes=1)
        scheduler.finish(name)
    scheduler.submit(_request("c", tuple(range(200, 208)), 1))
    assert len(scheduler.schedule(nodes=1).rows) == 1, "nine blocks are free"
    scheduler.finish("c")

    def computed(first: int) -> list[tuple[int, int]]:
        scheduler.submit(_request("d", tuple(range(first, first + 7)), 1))
        plan = scheduler.schedule(nodes=1)
        scheduler.finish("d")
        return _spans(plan)

    assert computed(100) == []
    assert computed(0) == [(2, 6)]


def test_a_few_tokens_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.runtime.scheduler._LEAST_REUSED", _LEAST_REUSED)
    scheduler = Scheduler(BlockAllocator(100), block_size=16, max_rows=4, prefix_cache=True)
    for name, length, computed in (("a", 900, [(0, 899)]), ("b", 512, [(0, 511)]), ("c", 514, [(512, 513)])):
        scheduler.submit(_request(name, tuple(range(length)), 1))
        assert _spans(scheduler.schedule(nodes=1)) == computed
        scheduler.finish(name)
    assert scheduler.allocator.free == 100


def test_rows_do_not_wait_for_all_of_a_long_prompt() -> None:
    scheduler = Scheduler(BlockAllocator(64), block_size=4, max_rows=4, part=8)
    scheduler.submit(_request("a", tuple(range(31)), 20))
    assert _spans(scheduler.schedule(nodes=1)) == [(0, 30)], "nobody waits for it"
    for name, length in (("b", 21), ("c", 4), ("d", 8)):
        scheduler.submit(_request(name, tuple(range(100, 100 + length)), 20))
    seen = []
    while len(scheduler.running) < 4:
        plan = scheduler.schedule(nodes=1)
        names = "".join(row.request.id for row in plan.rows)
        seen.append((names, _spans(plan)))
        _advance(plan.rows[0])
    assert seen == [("a", [(0, 8)]), ("a", [(8, 16)]), ("abc", [(16, 20), (0, 3)]), ("abcd", [(0, 7)])]


def test_a_prompt_half_computed_gives_way_to_rows_that_run() -> None:
    scheduler = Scheduler(BlockAllocator(9), block_size=2, max_rows=2, part=4)
    scheduler.submit(_request("a", (1, 2, 3), 9))
    scheduler.schedule(nodes=1)
    scheduler.submit(_request("b", tuple(range(10)), 2))
    assert _spans(scheduler.schedule(nodes=1)) == [(0, 4)]
    for _ in range(9):
        plan = scheduler.schedule(nodes=4)
        _advance(plan.rows[0])
        assert plan.preempted == 0
        assert plan.rows[0].request.id == "a"
    assert [row.request.id for row in plan.rows] == ["a"]
    scheduler.finish("a")
    assert _spans(scheduler.schedule(nodes=1)) == [(0, 9)]
