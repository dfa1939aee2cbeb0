"""Scheduling as bookkeeping: no block is lost or used twice, everyone finishes, prompts are shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.scheduler import Row, Scheduler


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


def test_equal_prompts_are_prefilled_once_and_share_blocks() -> None:
    scheduler = Scheduler(BlockAllocator(64), block_size=4, max_rows=8)
    for i in range(5):
        scheduler.submit(_request(str(i), tuple(range(11)), 8))
    plan = scheduler.schedule(nodes=1)
    assert [len(prefix.tokens) for prefix in plan.prefills] == [10]
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


def test_cancelling_frees_waiting_and_running_rows() -> None:
    scheduler = Scheduler(BlockAllocator(16), block_size=4, max_rows=1)
    for i in range(3):
        scheduler.submit(_request(str(i), (1, 2, 3, 4, 5), 4))
    scheduler.schedule(nodes=1)
    for i in (0, 1, 2):
        scheduler.finish(str(i))
    assert not scheduler.has_work
    assert scheduler.allocator.free == 16
