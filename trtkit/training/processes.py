"""Several processes on one training, as ``torchrun`` starts them: one per GPU, or several on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from trtkit.errors import TrtkitError, UsageError

__all__ = ["Processes", "processes"]

_PATIENCE = timedelta(days=3)
"""The others wait while the first process lets the target write its answers."""

_LOST = ("gloo/transport", "remote process exiting")
"""In what gloo and NCCL say when a connection breaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """This process among the others; ``device`` is its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Writes the files and talks to the user."""
        return self.rank == 0

    def meet(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: torch.device, parts: int) -> Iterator[Processes]:
    """The process group of ``torchrun``, or this process alone.

    Raises :class:`UsageError` when an update of ``parts`` batches cannot be shared out evenly, and
    :class:`TrtkitError` when another process is lost.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(rank=0, world=1, device=device)
        return
    if parts % world:
        raise UsageError(
            f"{parts} batch(es) per update cannot be shared out over {world} processes",
            hint=f"pass --parts {world}, or a multiple of it",
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank=dist.get_rank(), world=world, device=device)
    except RuntimeError as problem:
        if not any(sign in str(problem) for sign in _LOST):
            raise
        raise TrtkitError(
            "another process of this training ended, or cannot be reached",
            hint="what it said, or torchrun's summary, tells why; the same command goes on from the saved state",
        ) from problem
    finally:
        dist.destroy_process_group()
