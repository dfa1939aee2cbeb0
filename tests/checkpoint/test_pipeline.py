"""Ordered, bounded, and over when the block is left: whatever happens, no thread stays behind."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from trtkit.checkpoint.pipeline import consumed, produced

Put = Callable[[int], None]


def itself(item: int) -> int:
    return item


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true within ten seconds; a thread that does nothing more cannot be told from a slow one."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def never(condition: Callable[[], bool]) -> bool:
    """Whether it stays untrue for a while."""
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        if condition():
            return False
        time.sleep(0.001)
    return True


@pytest.mark.parametrize("limit", [1, 7, 10**9])
def test_items_pass_in_order_through_all_stages(limit: int) -> None:
    out: list[int] = []
    with (
        produced(range(1, 200), size=itself, limit=limit) as items,
        consumed(out.extend, size=itself, limit=limit) as put,
    ):
        for item in items:
            put(10 * item)
    assert out == [10 * item for item in range(1, 200)]


def test_the_stages_run_in_threads_of_their_own() -> None:
    seen: dict[str, threading.Thread] = {}

    def source() -> Iterator[int]:
        seen["source"] = threading.current_thread()
        yield 1

    def sink(items: Iterator[int]) -> None:
        seen["sink"] = threading.current_thread()
        assert list(items) == [1]

    with produced(source(), size=itself, limit=1) as items, consumed(sink, size=itself, limit=1) as put:
        for item in items:
            put(item)
    assert len({threading.current_thread(), *seen.values()}) == 3


def test_the_producer_stays_within_its_limit() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for size in (4, 4, 4, 4, 100, 4):
            made.append(size)
            yield size

    with produced(source(), size=itself, limit=10) as items:
        # Two fit, the third is in the producer's hand.
        assert eventually(lambda: len(made) == 3)
        assert never(lambda: len(made) > 3)
        assert next(items) == 4
        assert eventually(lambda: len(made) == 4)
        assert [next(items) for _ in range(3)] == [4, 4, 4]
        # One item larger than the limit passes alone.
        assert eventually(lambda: made == [4, 4, 4, 4, 100, 4])
        assert list(items) == [100, 4]


def test_the_consumer_holds_the_caller_at_its_limit() -> None:
    gate, taken, given = threading.Event(), [], []

    def sink(items: Iterator[int]) -> None:
        for item in items:
            taken.append(item)
            gate.wait(10)

    def watch() -> None:
        # One in the consumer's hand, two that fit; the fourth call must wait.
        full.append(eventually(lambda: given == [4, 4, 4]) and never(lambda: len(given) > 3))
        gate.set()

    full: list[bool] = []
    watcher = threading.Thread(target=watch)
    with consumed(sink, size=itself, limit=8) as put:
        watcher.start()
        for _ in range(6):
            put(4)
            given.append(4)
    watcher.join()
    assert full == [True]
    assert taken == [4] * 6


def test_the_end_of_the_block_waits_for_the_last_item() -> None:
    out: list[int] = []

    def slow(items: Iterator[int]) -> None:
        for item in items:
            time.sleep(0.005)
            out.append(item)

    with consumed(slow, size=itself, limit=100) as put:
        for item in range(8):
            put(item)
    assert out == list(range(8))


def test_an_error_of_the_producer_comes_behind_its_items() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("bad sector")

    seen: list[int] = []
    with pytest.raises(OSError, match="bad sector"), produced(source(), size=itself, limit=100) as items:
        seen.extend(items)
    assert seen == [1, 2]


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_error_of_the_consumer_stops_the_caller(fails_at: int) -> None:
    def sink(items: Iterator[int]) -> None:
        for item in items:
            if item == fails_at:
                raise OSError("disk full")

    given: list[int] = []

    def give(put: Put) -> None:
        for item in range(1, 1_000_000):
            put(item)
            given.append(item)

    with pytest.raises(OSError, match="disk full"), consumed(sink, size=itself, limit=1) as put:
        give(put)
    assert len(given) <= fails_at + 2


def test_an_error_of_the_consumer_at_its_very_end_is_raised_too() -> None:
    def sink(items: Iterator[int]) -> None:
        assert list(items) == [1]
        raise OSError("cannot sync")

    with pytest.raises(OSError, match="cannot sync"), consumed(sink, size=itself, limit=10) as put:
        put(1)


def test_an_error_of_the_caller_ends_both_threads_and_is_the_one_raised() -> None:
    made: list[int] = []
    out: list[int] = []

    def source() -> Iterator[int]:
        for item in range(1, 1_000_000):
            made.append(item)
            yield item

    def fail() -> None:
        with (
            produced(source(), size=itself, limit=10) as items,
            consumed(out.extend, size=itself, limit=10) as put,
        ):
            for item in items:
                put(item)
                if item == 5:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(made) < 30
    assert out == list(range(1, len(out) + 1))


def test_a_caller_that_stops_early_ends_the_producer() -> None:
    with produced(iter(int, 1), size=itself, limit=0) as items:
        assert next(items) == 0


@pytest.mark.parametrize("stage", ["source", "sink"])
def test_ctrl_c_reaches_a_caller_that_waits(stage: str) -> None:
    gate = threading.Event()

    def interrupt() -> None:
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        gate.set()

    def source() -> Iterator[int]:
        yield 1
        gate.wait(10)
        yield 2

    def sink(items: Iterator[int]) -> None:
        for _ in items:
            gate.wait(10)

    def wait() -> None:
        if stage == "source":
            with produced(source(), size=itself, limit=1) as items:
                list(items)
        else:
            with consumed(sink, size=itself, limit=1) as put:
                for _ in range(10):
                    put(1)

    helper = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    helper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        helper.join()
        signal.signal(signal.SIGINT, before)
    assert gate.is_set()


def test_no_item_is_kept_once_its_user_has_dropped_it() -> None:
    class Item:
        pass

    first: list[weakref.ref[Item]] = []
    gone: list[bool] = []

    def source() -> Iterator[Item]:
        item = Item()
        first.append(weakref.ref(item))
        yield item
        del item
        # The caller waits for the second meanwhile.
        gone.append(eventually(lambda: first[0]() is None))
        yield Item()

    with produced(source(), size=lambda _: 1, limit=1) as items:
        for item in items:
            del item
    assert gone == [True]
