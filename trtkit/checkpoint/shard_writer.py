"""Write safetensors front to back: one tensor in memory at a time, hashed while it passes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trtkit.checkpoint.shards import CODES, INDEX, SINGLE, Layout, bytes_of
from trtkit.errors import OutputError
from trtkit.files import write_json

__all__ = ["ShardWriter", "check_space", "layout_bytes"]


_STEP_BYTES = 1 << 24


class ShardWriter:
    """Writes tensors in the order of ``layout`` into shards of about ``shard_bytes``, one tensor at a time.

    Raises :class:`OutputError` at once when the disk cannot hold the whole; other ``OSError`` pass through to
    ``staged_dir``, which cleans up.
    """

    def __init__(
        self, directory: Path, layout: Layout, *, shard_bytes: float = 1_000_000_000, single: str = SINGLE
    ) -> None:
        """``single`` names the file when one is enough; ``shard_bytes`` of infinity makes it enough."""
        self._directory = directory
        self._layout = dict(layout)
        self._plan = _split(layout, shard_bytes)
        count = len(self._plan)
        self._files = (
            [single] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self._order = iter([(shard, name) for shard, names in enumerate(self._plan) for name in names])
        self._stream: BinaryIO | None = None
        self._shard = -1
        self._hash = hashlib.sha256()
        self._sent = 0
        self.digests: dict[str, str] = {}
        """SHA-256 by file name, complete after :meth:`close`."""
        check_space(directory, layout_bytes(layout))

    def write(self, name: str, pieces: Tensor | Iterable[Tensor]) -> None:
        """Write the next tensor, whole or as flat pieces in order."""
        shard, expected = next(self._order)
        assert name == expected, f"{name} out of order, expected {expected}"
        if shard != self._shard:
            self._open(shard)
        dtype, shape = self._layout[name]
        written = 0
        if isinstance(pieces, Tensor):
            assert tuple(pieces.shape) == shape, f"{name}: {tuple(pieces.shape)}, expected {shape}"
            pieces = [pieces]
        for piece in pieces:
            assert piece.dtype == dtype, f"{name}: {piece.dtype}, expected {dtype}"
            raw = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._put(bytes_of(raw))
            written += raw.numel()
        assert written == _nbytes(dtype, shape), f"{name}: {written} bytes"

    def close(self) -> dict[str, str]:
        """Finish the last shard and write the index; returns the digests of all files written."""
        assert next(self._order, None) is None, "not all tensors were written"
        self._finish()
        if len(self._files) > 1:
            total = sum(_nbytes(*entry) for entry in self._layout.values())
            weight_map = {name: self._files[shard] for shard, names in enumerate(self._plan) for name in names}
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return self.digests

    def abandon(self) -> None:
        """Close the open file after a failure."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, shard: int) -> None:
        self._finish()
        self._shard = shard
        self._stream = (self._directory / self._files[shard]).open("wb", buffering=0)
        self._sent = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self._plan[shard]:
            dtype, shape = self._layout[name]
            end = position + _nbytes(dtype, shape)
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def _put(self, data: memoryview) -> None:
        assert self._stream is not None
        for start in range(0, len(data), _STEP_BYTES):
            step = data[start : start + _STEP_BYTES]
            self._hash.update(step)
            while step:
                step = step[self._stream.write(step) :]
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Send what has been written to the disk now, without waiting: the sync at the end then finds little to do."""
        assert self._stream is not None
        end = self._stream.tell()
        if end - self._sent >= _STEP_BYTES and hasattr(os, "posix_fadvise"):
            # "Not needed" makes Linux write dirty pages out; they stay cached, being dirty.
            os.posix_fadvise(self._stream.fileno(), self._sent, end - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = end

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
            self.digests[self._files[self._shard]] = self._hash.hexdigest()
            self._hash = hashlib.sha256()


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of the layout."""
    return sum(_nbytes(*entry) for entry in layout.values())


def check_space(directory: Path, needed: int) -> None:
    """Raise :class:`OutputError` when the disk of ``directory`` cannot hold ``needed`` bytes more."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OutputError(
            f"the disk is too full: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free",
            where=str(directory.parent),
            hint="free some space, or choose another place with --out",
        )


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(layout: Layout, shard_bytes: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _nbytes(*entry) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*entry)
    return shards
