"""Ranks as threads of this process: :class:`Ranks` that meet at a barrier, for tests without other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["ThreadRanks", "on_ranks"]

T = TypeVar("T")


@dataclass(eq=False)
class _Table:
    """Where the ranks put down what the others are to see."""

    size: int
    items: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)


@dataclass(frozen=True, eq=False)
class ThreadRanks:
    """One rank; as strict as a device that is told what to expect: dtypes and shapes must agree."""

    rank: int
    size: int
    table: _Table

    def _all(self, item: Any) -> list[Any]:
        self.table.items[self.rank] = item
        self.table.barrier.wait()
        found = [self.table.items[rank] for rank in range(self.size)]
        self.table.barrier.wait()
        return found

    def gather(self, x: Tensor) -> list[Tensor]:
        found = self._all(x.clone())
        assert {(part.shape, part.dtype) for part in found} == {(x.shape, x.dtype)}
        return found

    def sum(self, x: Tensor) -> Tensor:
        first, *others = self.gather(x)
        total = first.clone()
        for other in others:
            total += other
        return x.copy_(total)

    def first(self, x: Tensor) -> Tensor:
        return self.gather(x)[0].clone()

    def agree(self, number: int) -> int:
        return int(self._all(number)[0])

    def least(self, number: int) -> int:
        return int(min(self._all(number)))


def on_ranks(size: int, work: Callable[[ThreadRanks], T]) -> list[T]:
    """What ``work`` returns on each of ``size`` ranks."""
    table = _Table(size)

    def one(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, size, table))
        except BaseException:
            table.barrier.abort()  # the others wait for nobody
            raise

    with ThreadPoolExecutor(size) as pool:
        found = [pool.submit(one, rank) for rank in range(size)]
    failures = [future.exception() for future in found if future.exception() is not None]
    real = [problem for problem in failures if not isinstance(problem, threading.BrokenBarrierError)]
    for problem in (*real, *failures):
        assert problem is not None
        raise problem
    return [future.result() for future in found]
