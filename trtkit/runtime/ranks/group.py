"""What the ranks of one engine exchange within a step. All of them make the same calls in the same order.

Letters: R rows, B beams, L drafted tokens, T tokens, H hidden, V vocab.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trtkit.errors import EngineError

__all__ = ["LostRankError", "Place", "ProcessRanks", "Ranks", "claim", "gather_columns", "joined", "refuse_a_second"]

_PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others within a step or while weights are read: kernels may be compiled or tuned."""

_MEETING = timedelta(minutes=2)
"""How long it waits to find them, all of which are ready for it."""

_ENVIRONMENT = {
    # NCCL's watchdog would end the whole process when a rank is gone. The crew sees that, too, and makes it an error.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    # Else gloo looks up the host's name, which may fail or lead outside.
    **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
}


class LostRankError(Exception):
    """Another rank is gone: this one cannot go on either."""


class Ranks(Protocol):
    """One rank among all. ``sum``, ``gather`` and ``first`` take tensors of the engine's device, work in place where
    they can, and may be captured in a CUDA graph; ``agree`` and ``least`` are the host's."""

    @property
    def rank(self) -> int:
        """0 is the one that is asked, and that decides."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``: of products (T, H) over shares of the inputs."""

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' ``x``, by rank: logits (T, V / size)."""

    def first(self, x: Tensor) -> Tensor:
        """The first rank's ``x``: drafted tokens (R, B, L)."""

    def agree(self, number: int) -> int:
        """The first rank's ``number``, on the host."""

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers, on the host."""


def gather_columns(ranks: Ranks, x: Tensor, width: int) -> Tensor:
    """All ranks' columns (T, width / size), which may be rounded up, side by side: (T, width)."""
    shares, each = ranks.gather(x), x.shape[1]
    return torch.cat([share[:, : max(0, width - rank * each)] for rank, share in enumerate(shares)], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRanks:
    """:class:`Ranks` over torch.distributed's default group: NCCL between GPUs, gloo between CPU processes."""

    rank: int
    size: int
    instructed: Callable[[int], int]
    """``agree``: it goes the way of the calls, which a rank may wait for as long as nobody asks for anything."""

    def sum(self, x: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        with _lost():
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """See :class:`Ranks`."""
        whole = torch.empty(self.size * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
        with _lost():
            _all_gather()(whole, x.contiguous())
        return list(whole.chunk(self.size))

    def first(self, x: Tensor) -> Tensor:
        """See :class:`Ranks`."""
        x = x.contiguous()
        with _lost():
            dist.broadcast(x, 0)
        return x

    def agree(self, number: int) -> int:
        """See :class:`Ranks`."""
        return self.instructed(number)

    def least(self, number: int) -> int:
        """See :class:`Ranks`."""
        word = torch.tensor(number)
        with _lost():
            dist.all_reduce(word, dist.ReduceOp.MIN)
        return int(word)


def _all_gather() -> Any:
    """It was renamed in torch 2.13. Looked up when it is needed: there are torches without distributed."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise LostRankError(str(problem).strip()) from problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank meets the others."""

    rank: int
    size: int
    device: str
    """cpu or cuda: there each rank has the device of its number."""
    store: Path
    """File through which torch.distributed finds its processes."""


def claim(place: Place) -> None:
    """Take this rank's device. NCCL waits for ever for a rank that fails where they meet, so it is to fail before."""
    if place.device == "cuda":
        torch.cuda.set_device(place.rank)
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


def refuse_a_second() -> None:
    """Raise :class:`EngineError` when torch.distributed is in use in this process: it holds one group."""
    if dist.is_initialized():
        raise EngineError(
            "torch.distributed is in use in this process", hint="one engine over several processes at a time"
        )


@contextmanager
def joined(place: Place, agree: Callable[[int], int]) -> Iterator[ProcessRanks]:
    """This process as one of the ranks. ``agree`` as in :class:`ProcessRanks`.

    Raises :class:`EngineError` when torch.distributed is in use already, :class:`LostRankError` when another rank does
    not come.
    """
    refuse_a_second()
    backend = "cpu:gloo,cuda:nccl" if place.device == "cuda" else "gloo"
    with _environment(), _own_hook(), _lost():
        # Not by a file:// address, which torch takes literally, %20 and all.
        store = dist.FileStore(str(place.store), place.size)  # type: ignore[attr-defined]  # not in its stub
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=_MEETING)
    try:
        dist.distributed_c10d._set_pg_timeout(_PATIENCE)  # there is no public way
        if place.device == "cuda":
            # NCCL takes its memory at the first exchange: before the rest is given to keys and values.
            with _lost():
                dist.all_reduce(torch.zeros(1, device=f"cuda:{place.rank}"))
        yield ProcessRanks(rank=place.rank, size=place.size, instructed=agree)
    finally:
        dist.destroy_process_group()


@contextmanager
def _own_hook() -> Iterator[None]:
    """torch has every traceback of the process begin with a rank from here on, once more with each engine."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


@contextmanager
def _environment() -> Iterator[None]:
    """What the backends read when they are made, unless it is set already."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
