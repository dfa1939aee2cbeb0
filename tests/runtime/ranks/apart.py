"""What ranks open that do not get on. By itself, as the other rank's process imports it: it needs no transformers."""

from __future__ import annotations

from pathlib import Path

from trtkit.runtime.load import OpenOptions, open_rank
from trtkit.runtime.ranks.group import Ranks
from trtkit.runtime.torch_engine import TorchEngine


def open_apart(first: Path | None, other: Path | None, ranks: Ranks) -> TorchEngine:
    """The first rank opens one engine, the other another; None is more than its memory holds."""
    directory = first if ranks.rank == 0 else other
    if directory is None:
        raise MemoryError("here")
    return open_rank(directory, OpenOptions(device="cpu", dtype="float32", threads=1), ranks)
