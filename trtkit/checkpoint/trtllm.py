"""Write a TensorRT-LLM checkpoint, config.json and rank{N}.safetensors, from a native one.

The native codes and scales are copied, never computed anew, so both runtimes hold the same numbers but for what
``docs/formats.md`` lists. All ranks of a pipeline stage are written side by side while the source is read once; memory
holds one product of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from trtkit.checkpoint.hf import EMBEDDING, LM_HEAD, MODEL_DTYPES, layer_prefix, narrow
from trtkit.checkpoint.names import (
    KV_SCALE,
    LINEARS,
    TENSORS,
    TrtLinear,
    drafter_tensors,
    layer_norms,
    rank_file,
    stored_tensors,
    tensor_axes,
    trt_layer_prefix,
)
from trtkit.checkpoint.shard_writer import ShardWriter, check_space, layout_bytes
from trtkit.checkpoint.shards import Layout, Shards
from trtkit.checkpoint.trtllm_check import check_trtllm, trtllm_notes
from trtkit.checkpoint.trtllm_config import TrtllmOptions, trtllm_config, trtllm_dtype
from trtkit.checkpoint.trtllm_layout import (
    EMBEDDING_TABLE,
    FINAL_NORM_TABLE,
    LM_HEAD_TABLE,
    padded_vocab,
    rank_layout,
)
from trtkit.checkpoint.trtllm_source import Head, check_extremes, check_scales, has_pre_scales, open_head
from trtkit.checkpoint.trtllm_split import held_scale, share, weight_only_rows
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.decoder import LINEAR_PARTS
from trtkit.errors import UsageError
from trtkit.files import digest_file, write_json
from trtkit.log import Progress
from trtkit.quant.tensor import LinearWeights
from trtkit.staging import staged_dir

__all__ = ["TrtllmOptions", "check_trtllm", "trtllm_notes", "write_trtllm_checkpoint"]

CONFIG_FILE = "config.json"

RankPieces: TypeAlias = Callable[[int], Tensor | Iterable[Tensor]]
"""Tensor-parallel rank -> its tensor, whole or in flat pieces."""


def write_trtllm_checkpoint(
    engine_dir: Path, out: Path, options: TrtllmOptions, *, replace: bool = False
) -> dict[str, str]:
    """Write the native checkpoint in ``engine_dir`` as a TensorRT-LLM one.

    ``out`` appears whole or not at all. Returns SHA-256 by file name.

    Raises, before anything is written, :class:`UnsupportedError` with every reason why TensorRT-LLM cannot hold it and
    :class:`CheckpointError` for damaged sources; :class:`OutputError` when the disk is or becomes full.
    """
    source = open_unified(engine_dir)
    check_trtllm(source.spec, source.scheme, options)
    if out.resolve() == engine_dir.resolve() or out.resolve() in engine_dir.resolve().parents:
        raise UsageError("the output would replace the checkpoint it is made from", where=str(out))
    pre_scale = has_pre_scales(source)
    check_scales(source, pre_scale=pre_scale)
    head = None if options.drafter is None else open_head(options.drafter, options)
    job = _Job(source=source, options=options, head=head, pre_scale=pre_scale)
    with staged_dir(out, replace=replace) as stage:
        check_space(stage, options.tensor_parallel * sum(
            layout_bytes(job.layout(index)) for index in range(options.pipeline_parallel)
        ))  # fmt: skip
        digests: dict[str, str] = {}
        with Progress("export", total=source.spec.layers, unit="layers") as progress:
            for index in range(options.pipeline_parallel):
                digests |= _write_stage(job, index, stage, progress)
        config = trtllm_config(source.spec, source.scheme, options, head.config if head else None, pre_scale=pre_scale)
        write_json(stage / CONFIG_FILE, config)
        digests[CONFIG_FILE] = digest_file(stage / CONFIG_FILE)
    return digests


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    source: UnifiedCheckpoint
    options: TrtllmOptions
    head: Head | None
    pre_scale: bool

    @property
    def ranks(self) -> int:
        return self.options.tensor_parallel

    @property
    def dtype(self) -> torch.dtype:
        return MODEL_DTYPES[trtllm_dtype(self.source.spec, self.options)]

    def rows_of(self, shards: Shards, name: str, total: int) -> RankPieces:
        """Shares of ``total`` rows of a stored tensor."""
        return partial(_rows, shards, name, self.dtype, total // self.ranks)

    def layout(self, stage: int) -> Layout:
        return rank_layout(
            self.source.spec, self.source.scheme, self.options, self.head.config if self.head else None, stage=stage,
            pre_scale=self.pre_scale,
        )  # fmt: skip


def _write_stage(job: _Job, stage: int, out: Path, progress: Progress) -> dict[str, str]:
    """Write the rank files of one pipeline stage; their digests."""
    layout = job.layout(stage)
    writers: list[ShardWriter] = []
    digests: dict[str, str] = {}
    try:
        for rank in range(job.ranks):
            name = rank_file(stage * job.ranks + rank)
            writers.append(ShardWriter(out, layout, shard_bytes=math.inf, single=name))
        for name, pieces in _tensors(job, stage, progress):
            for rank, writer in enumerate(writers):
                writer.write(name, pieces(rank))
        for writer in writers:
            digests |= writer.close()
    finally:
        for writer in writers:
            writer.abandon()
    return digests


def _tensors(job: _Job, stage: int, progress: Progress) -> Iterator[tuple[str, RankPieces]]:
    """The stage's tensors in the order of :func:`rank_layout`."""
    source, spec = job.source, job.source.spec
    count = spec.layers // job.options.pipeline_parallel
    if stage == 0:
        yield EMBEDDING_TABLE, lambda rank: _rows(source.shards, EMBEDDING, job.dtype, spec.vocab, 0)
    for index in range(count):
        yield from _layer(job, stage * count + index, trt_layer_prefix(index))
        progress.advance()
    if stage == job.options.pipeline_parallel - 1:
        yield FINAL_NORM_TABLE, _same(narrow(source.final_norm(), job.dtype, FINAL_NORM_TABLE))
        name = EMBEDDING if spec.tied else LM_HEAD
        yield LM_HEAD_TABLE, job.rows_of(source.shards, name, padded_vocab(spec.vocab, job.ranks))
    if job.head is not None:
        for theirs, (public, (size, *_)) in drafter_tensors(job.head.config).items():
            yield theirs, job.rows_of(job.head.shards, public, size)


def _layer(job: _Job, layer: int, prefix: str) -> Iterator[tuple[str, RankPieces]]:
    source = job.source
    for name, (ours, _) in layer_norms(source.spec).items():
        yield f"{prefix}{name}", _same(narrow(source.shards.tensor(f"{layer_prefix(layer)}{ours}"), job.dtype, ours))
    for linear in LINEARS:
        members = dict(zip(LINEAR_PARTS[linear.product], source.parts(layer, linear.product), strict=True))
        stored = _stored(job, [members[part] for part in linear.parts], where=f"{layer_prefix(layer)}{linear.parts[0]}")
        bias = bool(stored["bias"])
        for tensor in stored_tensors(source.scheme, bias=bias, pre_scale=job.pre_scale):
            yield f"{prefix}{linear.name}.{TENSORS[tensor]}", partial(_linear_share, job, linear, stored, tensor)
    if source.scheme.kv_dtype != "model":
        scales = source.kv_scales(layer)
        yield f"{prefix}{KV_SCALE}", _same(torch.tensor([max(scales or (1.0, 1.0))]))


def _stored(job: _Job, members: Sequence[LinearWeights], *, where: str) -> dict[str, list[Tensor]]:
    """The parts' tensors by our suffix, in the dtypes of the rank files; empty where the parts have none."""
    found: dict[str, Sequence[Tensor | None]] = {
        "weight": [member.weight.data for member in members],
        "weight_scale": [member.weight.scale for member in members],
        "input_scale": [member.input_scale for member in members],
        "pre_quant_scale": [member.pre_scale for member in members],
        "bias": [member.bias for member in members],
    }
    stored = {name: [value for value in values if value is not None] for name, values in found.items()}
    scheme = job.source.scheme
    if scheme.quant_algo == "W8A16":
        check_extremes(stored["weight"], where)
    for name, values in stored.items():
        if name in ("pre_quant_scale", "bias") or (name == "weight" and scheme.weight_format == "bf16"):
            stored[name] = [narrow(value, job.dtype, f"{where}.{name}") for value in values]
    return stored


def _linear_share(
    job: _Job, linear: TrtLinear, stored: Mapping[str, Sequence[Tensor]], tensor: str, rank: int
) -> Tensor:
    """One rank's tensor of a linear."""
    scheme = job.source.scheme

    def mine(name: str) -> Tensor:
        axes = tensor_axes(name, scheme.weight_format)
        return share(stored[name], axes, linear.split, rank=rank, ranks=job.ranks, kv_heads=job.source.spec.kv_heads)

    made = mine(tensor)
    if tensor == "weight" and scheme.quant_algo == "W8A16":
        return weight_only_rows(made, mine("weight_scale"), job.dtype, where=linear.name)
    if tensor == "weight" and scheme.weight_format == "int4":
        return made.view(torch.int8)
    if tensor == "input_scale" and scheme.quant_algo == "FP8":
        return held_scale(made, job.dtype, where=linear.name).reshape(1)
    if tensor in ("weight_scale", "input_scale"):
        return made.float().reshape(1) if made.ndim == 0 else made.float()
    return made


def _same(tensor: Tensor) -> RankPieces:
    """The same on every rank."""
    return lambda rank: tensor


def _rows(shards: Shards, name: str, dtype: torch.dtype, rows: int, rank: int) -> Iterator[Tensor]:
    """Rows ``rank * rows`` and on of a stored tensor, flat; rows beyond its end are zero."""
    total, *rest = shards.entries[name].shape
    width = math.prod(rest)
    there = max(0, min(rows, total - rank * rows))
    for block in shards.blocks(name, first=rank * rows * width, count=there * width):
        yield narrow(block, dtype, name)
    yield torch.zeros((rows - there) * width, dtype=dtype)
