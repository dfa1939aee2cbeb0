"""Safetensors files, read tensor by tensor.

The format is simple: 8 bytes header length, a JSON header, raw little-endian bytes. We read it with plain reads instead
of a memory map, so that a 28 GB checkpoint never counts as resident memory, and check every length before the first
tensor is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from trtkit.errors import CheckpointError
from trtkit.files import read_json
from trtkit.log import logger

__all__ = ["CODES", "INDEX", "SINGLE", "Layout", "Shards", "bytes_of", "open_shards", "raise_damaged"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_LISTED = 20
_MAX_HEADER_BYTES = 100_000_000
_HUGE_BYTES = 1 << 23
_LFS_POINTER, _LFS_POINTER_BYTES = b"version ", 1024
"""How what `git clone` leaves without Git LFS begins, and what it is smaller than."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""The format's names of the dtypes."""

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

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into fresh memory. Raises :class:`CheckpointError` when the file has shrunk."""
        entry = self.entries[name]
        return _read(entry, entry.offset, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def blocks(
        self, name: str, block_bytes: int = 1 << 26, *, first: int = 0, count: int | None = None
    ) -> Iterator[Tensor]:
        """The tensor's values, flat, in pieces of at most ``block_bytes``; only ``count`` of them from ``first`` on."""
        entry = self.entries[name]
        begin = first * entry.dtype.itemsize
        end = entry.nbytes if count is None else min(entry.nbytes, begin + count * entry.dtype.itemsize)
        for start in range(begin, end, block_bytes):
            size = min(block_bytes, end - start)
            yield _read(entry, entry.offset + start, size).view(entry.dtype)


def _read(entry: Entry, offset: int, nbytes: int) -> Tensor:
    raw = _fresh(nbytes)
    view = bytes_of(raw)
    done = 0
    try:
        with entry.path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while done < nbytes and (count := stream.readinto(view[done:])):
                done += count
    except OSError as problem:
        raise CheckpointError(f"cannot be read: {problem.strerror or problem}", where=str(entry.path)) from None
    if done < nbytes:
        raise CheckpointError("ends too early: the file has changed while it was read", where=str(entry.path))
    return raw


def _fresh(nbytes: int) -> Tensor:
    """Memory for a tensor, in huge pages where it is large: small pages take longer to map than a warm file to read."""
    if nbytes < _HUGE_BYTES or sys.platform != "linux":
        return torch.empty(nbytes, dtype=torch.uint8)
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def bytes_of(raw: Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    buffer: Any = raw.numpy()  # numpy's stubs do not call arrays buffers
    return memoryview(buffer)


def raise_damaged(directory: Path, problems: list[str], what: str = "the checkpoint cannot be used") -> None:
    """Raise one :class:`CheckpointError` that lists the problems (the first 20), if there are any."""
    if not problems:
        return
    shown = problems[:_MAX_LISTED]
    if len(problems) > _MAX_LISTED:
        shown.append(f"... and {len(problems) - _MAX_LISTED} more")
    raise CheckpointError(
        f"{what}: {len(problems)} problem(s)",
        where=str(directory),
        offenders=shown,
        hint="download the checkpoint again, or copy it again from where it is whole",
    )


def open_shards(directory: Path) -> tuple[Shards, list[str]]:
    """The headers of all weight files, and every problem found in them (files missing, truncated, unreadable).

    Where ``model.safetensors`` lies beside an index that does not name it, one of them was left over by another save.
    The file is read, as transformers does, and that is told.

    Raises :class:`CheckpointError` when the directory holds no safetensors checkpoint at all.
    """
    index, single = directory / INDEX, (directory / SINGLE).is_file()
    weight_map = None
    if index.is_file():
        weight_map = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError("has no usable weight_map", where=str(index))
        if single and SINGLE not in weight_map.values():
            logger.warning("%s: %s is read, and the shards of %s beside it are not", directory, SINGLE, INDEX)
            weight_map = None
    elif not single:
        _raise_no_weights(directory)
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
        try:
            found = read_header(directory / file)
            # Of a tensor that lies in several files, the one that the index names counts.
            entries |= {name: entry for name, entry in found.items() if (weight_map or {}).get(name, file) == file}
        except CheckpointError as problem:
            problems.append(f"{file}: {problem.message}")
            weight_map = weight_map and {name: shard for name, shard in weight_map.items() if shard != file}
    for name, file in (weight_map or {}).items():
        if name not in entries:
            problems.append(f"{name}: the index says {file}, but it is not there")
    return Shards(entries), problems


def _raise_no_weights(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError("no such directory", where=str(directory))
    hint = "pass a Hugging Face checkpoint directory, a hub id, or 'practice'"
    if any(directory.glob("pytorch_model*.bin")):
        hint = "pickled weights are not read; save the model with save_pretrained(safe_serialization=True)"
    elif any(directory.glob("model-*.safetensors")):
        hint = f"its weights are in several files: download {INDEX} too, which says what belongs where"
    raise CheckpointError(f"no weights found (expected {SINGLE} or {INDEX})", where=str(directory), hint=hint)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file. Raises :class:`CheckpointError` when it is missing, truncated or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == _LFS_POINTER and size < _LFS_POINTER_BYTES:
                raise CheckpointError("a Git LFS pointer, not the weights: run `git lfs pull`", where=str(path))
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
    except (TypeError, KeyError, ValueError, OverflowError):
        raise CheckpointError(f"its header is damaged at {name!r}", where=str(path)) from None
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{name}: unknown dtype {code!r}", where=str(path))
    nbytes = math.prod(shape) * _DTYPES[code].itemsize
    if not isinstance(begin, int) or begin < 0 or end != begin + nbytes:
        raise CheckpointError(f"{name}: offsets {begin}..{end} do not fit shape {shape} of {code}", where=str(path))
    return Entry(path=path, dtype=_DTYPES[code], shape=shape, offset=start + begin, nbytes=nbytes)
