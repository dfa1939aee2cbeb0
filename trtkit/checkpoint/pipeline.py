"""Stages that run side by side: a thread that produces ahead of the caller, and one that consumes behind it.

The caller's own thread is the middle stage, so that Ctrl-C reaches it at once. Items keep their order. What waits
between two stages is bounded in bytes. An error in a thread is raised in the caller, as itself, at the place in the
order where it happened; whatever ends the ``with`` block also ends the thread before the block is left.

    with produced(read(), size=nbytes, limit=1 << 29) as items, consumed(write, size=nbytes, limit=1 << 28) as put:
        for item in items:
            put(work(item))
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["consumed", "produced"]

T = TypeVar("T")


class _LeftError(Exception):
    """The other side has gone: stop without a word."""


class _Channel(Generic[T]):
    """A first-in, first-out line of items between two threads, bounded by the sum of their sizes."""

    def __init__(self, size: Callable[[T], int], limit: int) -> None:
        self._size = size
        self._limit = limit
        self._waiting: deque[tuple[T, int]] = deque()
        self._held = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._change = threading.Condition()

    def put(self, item: T) -> None:
        """Add an item as soon as it fits; one larger than the limit fits when nothing else waits.

        Raises what the receiver failed with, or :class:`_LeftError` when it has left for no error.
        """
        size = self._size(item)
        with self._change:
            self._change.wait_for(lambda: self._closed or not self._held or self._held + size <= self._limit)
            if self._closed:
                raise self._error or _LeftError
            self._waiting.append((item, size))
            self._held += size
            self._change.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """The sender's last word: what still waits is delivered first, then ``error``."""
        with self._change:
            self._ended, self._error = True, self._error or error
            self._change.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """The receiver leaves: what still waits is dropped, and the sender is told at its next item."""
        with self._change:
            self._closed, self._error = True, self._error or error
            self._waiting.clear()
            self._held = 0
            self._change.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._ended or self._closed)
                if self._closed:
                    raise _LeftError
                if not self._waiting:
                    if self._error is not None:
                        raise self._error
                    return
                item, size = self._waiting.popleft()
                self._held -= size
                self._change.notify_all()
            yield item
            del item


@contextlib.contextmanager
def produced(items: Iterable[T], *, size: Callable[[T], int], limit: int) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in a thread of its own, up to ``limit`` bytes (of ``size`` each) ahead of the caller.

    Beside these the producer may hold one item in its hand. Raises in the caller what ``items`` raises, behind the
    items that came before.
    """
    channel: _Channel[T] = _Channel(size, limit)

    def run() -> None:
        try:
            for item in items:
                channel.put(item)
                del item  # it must not live on here while the next one is made
            channel.end()
        except _LeftError:
            pass
        except BaseException as error:
            channel.end(error)

    with _thread(run, channel.close):
        yield iter(channel)


@contextlib.contextmanager
def consumed(
    consume: Callable[[Iterator[T]], None], *, size: Callable[[T], int], limit: int
) -> Iterator[Callable[[T], None]]:
    """A function that hands an item to ``consume``, which iterates over them in a thread of its own.

    At most ``limit`` bytes (of ``size`` each) wait; then the function blocks. An error of ``consume`` is raised by the
    next call, or at the end of the block, which waits until everything is consumed. A block that ends in an error drops
    what waits instead.
    """
    channel: _Channel[T] = _Channel(size, limit)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            consume(iter(channel))
            channel.close()
        except _LeftError:
            pass
        except BaseException as error:
            failed.append(error)
            channel.close(error)

    with _thread(run, channel.close) as thread:
        yield channel.put
        channel.end()
        thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _thread(run: Callable[[], None], stop: Callable[[], None]) -> Iterator[threading.Thread]:
    """``run`` in a thread that is over when the block is left, however that happens."""
    thread = threading.Thread(target=run, name="trtkit pipeline", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop()
        thread.join()
