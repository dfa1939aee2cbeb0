"""Safetensors files, read tensor by tensor and written front to back.

The format is simple (8 bytes header length, a JSON header, raw little-endian bytes) and two needs go beyond the
``safetensors`` package: plain reads instead of a memory map, so that a 28 GB checkpoint never counts as resident
memory, and a writer that holds one tensor at a time and hashes the file while it passes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from trtkit.errors import CheckpointError, OutputError
from trtkit.files import read_json, write_json

__all__ = ["MAX_LISTED", "Layout", "ShardWriter", "Shards", "open_shards", "raise_damaged"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_LISTED = 20
_MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Layout: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> (dtype, shape), in file order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shards:
    """The tensors of a checkpoint directory by name; nothing is read before it is asked for."""

    entries: Mapping[str, Entry]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into fresh memory. Raises :class:`CheckpointError` when the file has shrunk."""
        entry = self.entries[name]
        return _read(entry, entry.offset, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def blocks(self, name: str, block_bytes: int = 1 << 26) -> Iterator[Tensor]:
        """The tensor's values, flat, in pieces of at most ``block_bytes``."""
        entry = self.entries[name]
        for start in range(0, entry.nbytes, block_bytes):
            size = min(block_bytes, entry.nbytes - start)
            yield _read(entry, entry.offset + start, size).view(entry.dtype)


def _read(entry: Entry, offset: int, nbytes: int) -> Tensor:
    raw = torch.empty(nbytes, dtype=torch.uint8)
    view = _bytes(raw)
    with entry.path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < nbytes:
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError("ends too early: the file has changed while it was read", where=str(entry.path))
            done += count
    return raw


def raise_damaged(directory: Path, problems: list[str], what: str = "the checkpoint cannot be used") -> None:
    """Raise one :class:`CheckpointError` that lists the problems (the first 20), if there are any."""
    if not problems:
        return
    shown = problems[:MAX_LISTED]
    if len(problems) > MAX_LISTED:
        shown.append(f"... and {len(problems) - MAX_LISTED} more")
    raise CheckpointError(
        f"{what}: {len(problems)} problem(s)",
        where=str(directory),
        offenders=shown,
        hint="download the checkpoint again, or copy it again from where it is whole",
    )


def open_shards(directory: Path) -> tuple[Shards, list[str]]:
    """The headers of all weight files, and every problem found in them (files missing, truncated, unreadable).

    Raises :class:`CheckpointError` when the directory holds no safetensors checkpoint at all.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError("has no usable weight_map", where=str(index))
    elif (directory / SINGLE).is_file():
        weight_map = None
    else:
        _raise_no_weights(directory)
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
        try:
            entries.update(read_header(directory / file))
        except CheckpointError as problem:
            problems.append(f"{file}: {problem.message}")
            weight_map = weight_map and {name: shard for name, shard in weight_map.items() if shard != file}
    for name, file in (weight_map or {}).items():
        if name not in entries or entries[name].path.name != Path(file).name:
            problems.append(f"{name}: the index says {file}, but it is not there")
    return Shards(entries), problems


def _raise_no_weights(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError("no such directory", where=str(directory))
    pickled = any(directory.glob("pytorch_model*.bin"))
    raise CheckpointError(
        f"no weights found (expected {SINGLE} or {INDEX})",
        where=str(directory),
        hint="pickled weights are not read; save the model with save_pretrained(safe_serialization=True)"
        if pickled
        else "pass a Hugging Face checkpoint directory, a hub id, or 'practice'",
    )


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises :class:`CheckpointError` when it is missing, truncated or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"truncated or not a safetensors file ({size} bytes)", where=str(path))
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError("file is missing", where=str(path)) from None
    except OSError as problem:
        raise CheckpointError(f"cannot be read: {problem.strerror}", where=str(path)) from None
    except (ValueError, RecursionError):
        raise CheckpointError("its header is damaged (not JSON)", where=str(path)) from None
    start = 8 + length
    entries: dict[str, Entry] = {}
    for name, item in header.items() if isinstance(header, dict) else ():
        if name != "__metadata__":
            entries[name] = _entry(path, name, item, start)
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=start)
    if end != size:
        kind = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{kind}: {size} bytes, the header promises {end}", where=str(path))
    return entries


def _entry(path: Path, name: str, item: Any, start: int) -> Entry:
    try:
        begin, end = item["data_offsets"]
        shape = tuple(int(length) for length in item["shape"])
        code = item["dtype"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"its header is damaged at {name!r}", where=str(path)) from None
    if code not in _DTYPES:
        raise CheckpointError(f"{name}: unknown dtype {code!r}", where=str(path))
    nbytes = math.prod(shape) * _DTYPES[code].itemsize
    if not isinstance(begin, int) or begin < 0 or end != begin + nbytes:
        raise CheckpointError(f"{name}: offsets {begin}..{end} do not fit shape {shape} of {code}", where=str(path))
    return Entry(path=path, dtype=_DTYPES[code], shape=shape, offset=start + begin, nbytes=nbytes)


class ShardWriter:
    """Writes tensors in the order of ``layout`` into shards of about ``shard_bytes``, one tensor at a time.

    Raises :class:`OutputError` at once when the disk cannot hold the whole; other ``OSError`` pass through to
    ``staged_dir``, which cleans up.
    """

    def __init__(self, directory: Path, layout: Layout, *, shard_bytes: int = 1_000_000_000) -> None:
        self._directory = directory
        self._layout = dict(layout)
        self._plan = _split(layout, shard_bytes)
        count = len(self._plan)
        self._files = (
            [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        )
        self._order = iter([(shard, name) for shard, names in enumerate(self._plan) for name in names])
        self._stream: BinaryIO | None = None
        self._shard = -1
        self._hash = hashlib.sha256()
        self.digests: dict[str, str] = {}
        """SHA-256 by file name, complete after :meth:`close`."""
        needed = sum(_nbytes(*entry) for entry in layout.values())
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise OutputError(
                f"the disk is too full: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                where=str(directory.parent),
                hint="free some space, or choose another place with --out",
            )

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
            self._put(_bytes(raw))
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
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self._plan[shard]:
            dtype, shape = self._layout[name]
            end = position + _nbytes(dtype, shape)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._put(memoryview(len(text).to_bytes(8, "little") + text))

    def _put(self, data: memoryview) -> None:
        assert self._stream is not None
        self._hash.update(data)
        while data:
            data = data[self._stream.write(data) :]

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None
            self.digests[self._files[self._shard]] = self._hash.hexdigest()
            self._hash = hashlib.sha256()


def _bytes(raw: Tensor) -> memoryview:
    buffer: Any = raw.numpy()  # numpy's stubs do not call arrays buffers
    return memoryview(buffer)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _split(layout: Layout, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _nbytes(*entry) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(*entry)
    return shards
