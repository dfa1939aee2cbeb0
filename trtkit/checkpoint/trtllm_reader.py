"""Read a TensorRT-LLM checkpoint: the rank files seen as the native layout.

The result is a ``UnifiedCheckpoint``, so everything that reads native checkpoints (the torch runtime, ``verify``, the
quality report, the exports) reads these too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drafter.checkpoint import public_names
from drafter.model import Drafter
from trtkit.checkpoint.names import (
    KV_SCALE,
    LINEARS,
    NORMS,
    TABLES,
    TENSORS,
    TrtLinear,
    drafter_tensors,
    rank_file,
    tensor_axes,
    trt_layer_prefix,
)
from trtkit.checkpoint.shards import Entry, Shards, raise_damaged, read_header
from trtkit.checkpoint.trtllm_layout import EMBEDDING_TABLE, LM_HEAD_TABLE, rank_layout
from trtkit.checkpoint.trtllm_parse import TrtllmConfig, read_trtllm_config
from trtkit.checkpoint.trtllm_split import merge_part
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified, unified_layout
from trtkit.errors import CheckpointError
from trtkit.model_spec import ModelSpec
from trtkit.quant.tensor import quantize_int8
from trtkit.scheme import QuantScheme

__all__ = ["is_trtllm", "merged_drafter", "open_checkpoint", "open_trtllm", "rank_shards"]


def is_trtllm(directory: Path) -> bool:
    """Whether the directory holds rank files."""
    return (directory / rank_file(0)).is_file()


def open_checkpoint(directory: Path) -> UnifiedCheckpoint:
    """Open a native or a TensorRT-LLM checkpoint, whichever it is; raises what the two openers raise."""
    return open_trtllm(directory) if is_trtllm(directory) else open_unified(directory)


def open_trtllm(directory: Path) -> UnifiedCheckpoint:
    """Open a TensorRT-LLM checkpoint, reading headers only.

    Raises :class:`CheckpointError` listing everything that is missing, misshapen or not part of it,
    :class:`ConfigError` and :class:`UnsupportedError` for its config.json.
    """
    config = read_trtllm_config(directory)
    ranks = rank_shards(directory, config)
    native = unified_layout(config.spec, config.scheme, pre_scale=config.pre_scale)
    path = directory / rank_file(0)
    entries = {
        name: Entry(path=path, dtype=dtype, shape=shape, offset=0, nbytes=torch.Size(shape).numel() * dtype.itemsize)
        for name, (dtype, shape) in native.items()
    }
    return UnifiedCheckpoint(
        directory=directory,
        spec=config.spec,
        scheme=config.scheme,
        shards=_Merged(entries, config.spec, config.scheme, config.options.tensor_parallel, ranks),
    )


def rank_shards(directory: Path, config: TrtllmConfig) -> tuple[Shards, ...]:
    """The rank files by rank. Raises :class:`CheckpointError` with every missing, extra or wrong tensor."""
    ranks: list[Shards] = []
    problems: list[str] = []
    for rank in range(config.options.world_size):
        name = rank_file(rank)
        try:
            entries = read_header(directory / name)
        except CheckpointError as problem:
            problems.append(f"{name}: {problem.message}")
            continue
        layout = rank_layout(
            config.spec, config.scheme, config.options, config.head, stage=rank // config.options.tensor_parallel,
            pre_scale=config.pre_scale,
        )  # fmt: skip
        problems += [f"{name}: {tensor}: not part of this checkpoint" for tensor in entries if tensor not in layout]
        for tensor, (dtype, shape) in layout.items():
            entry = entries.get(tensor)
            if entry is None:
                problems.append(f"{name}: {tensor}: missing")
            elif entry.shape != shape:
                problems.append(f"{name}: {tensor}: shape {list(entry.shape)}, expected {list(shape)}")
            elif entry.dtype != dtype:
                problems.append(f"{name}: {tensor}: dtype {entry.dtype}, expected {dtype}".replace("torch.", ""))
        ranks.append(Shards(entries))
    raise_damaged(directory, problems)
    return tuple(ranks)


@dataclass(frozen=True, slots=True)
class _Merged(Shards):
    """Native names over rank files: shares are put together when a tensor is asked for."""

    spec: ModelSpec
    scheme: QuantScheme
    tensor_parallel: int
    ranks: tuple[Shards, ...]

    def tensor(self, name: str) -> Tensor:
        """One tensor under its native name. Raises :class:`CheckpointError` when a file has shrunk."""
        if name in TABLES.values():
            return torch.cat(list(self.blocks(name))).reshape(self.entries[name].shape)
        _, _, number, part = name.split(".", 3)
        return self._layer_tensor(int(number), part)

    def blocks(
        self, name: str, block_bytes: int = 1 << 26, *, first: int = 0, count: int | None = None
    ) -> Iterator[Tensor]:
        """The tensor's values, flat, in pieces; tables are streamed, other tensors are one piece."""
        if name not in TABLES.values():
            values = self.tensor(name).reshape(-1)
            yield values[first : None if count is None else first + count]
            return
        theirs = next(key for key, ours in TABLES.items() if ours == name)
        stage = 0 if theirs == EMBEDDING_TABLE else -self.tensor_parallel
        holders = self.ranks[stage:][: self.tensor_parallel] if theirs == LM_HEAD_TABLE else self.ranks[stage:][:1]
        size = torch.Size(self.entries[name].shape).numel()
        left = size - first if count is None else min(count, size - first)
        for shards in holders:
            held = torch.Size(shards.entries[theirs].shape).numel()
            take = max(0, min(held - first, left))
            if take:
                yield from shards.blocks(theirs, block_bytes, first=first, count=take)
            first, left = max(0, first - held), left - take

    def _layer_tensor(self, layer: int, part: str) -> Tensor:
        per_stage = self.spec.layers * self.tensor_parallel // len(self.ranks)
        stage, index = divmod(layer, per_stage)
        ranks = self.ranks[stage * self.tensor_parallel :][: self.tensor_parallel]
        prefix = trt_layer_prefix(index)
        for theirs, ours in NORMS.items():
            if part == ours:
                return ranks[0].tensor(prefix + theirs)
        if part.endswith((".k_scale", ".v_scale")):
            return ranks[0].tensor(prefix + KV_SCALE).reshape(())
        member, _, tensor = part.rpartition(".")
        linear = next(linear for linear in LINEARS if member in linear.parts)
        if self.scheme.quant_algo != "W8A16" or tensor == "bias":
            return self._member(ranks, prefix, linear, member, tensor)
        # The file holds rows in the model's dtype; codes and scale come out by the loader's own rule.
        made = quantize_int8(self._member(ranks, prefix, linear, member, "weight"), steps=128)
        assert made.scale is not None
        return made.data if tensor == "weight" else made.scale

    def _member(self, ranks: Sequence[Shards], prefix: str, linear: TrtLinear, member: str, tensor: str) -> Tensor:
        shares = [shards.tensor(f"{prefix}{linear.name}.{TENSORS[tensor]}") for shards in ranks]
        axes = tensor_axes(tensor, self.scheme.weight_format)
        index = linear.parts.index(member)
        made = merge_part(shares, axes, linear.split, index, heads=self.spec.heads, kv_heads=self.spec.kv_heads)
        if tensor == "weight" and self.scheme.weight_format == "int4":
            return made.view(torch.uint8)
        return made.reshape(()) if not axes else made


def merged_drafter(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Drafter | None:
    """The draft head in the rank files, in eval mode; None when there is none."""
    config = read_trtllm_config(directory)
    if config.head is None:
        return None
    ranks = rank_shards(directory, config)
    public = {ours: name for name, ours in public_names(config.head).items()}
    state = {
        public[ours]: torch.cat([shards.tensor(theirs) for shards in ranks]).to(device=device, dtype=dtype)
        for theirs, (ours, _) in drafter_tensors(config.head).items()
    }
    with torch.device("meta"):
        drafter = Drafter(config.head)
    drafter.load_state_dict(state, assign=True)
    return drafter.requires_grad_(False).eval()
