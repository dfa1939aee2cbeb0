"""What goes into a TensorRT-LLM checkpoint, checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from drafter.checkpoint import WEIGHTS_FILE, canonical_name
from drafter.config import DrafterConfig
from trtkit.checkpoint.hf import MODEL_DTYPES, layer_prefix
from trtkit.checkpoint.names import drafter_tensors
from trtkit.checkpoint.shards import Shards, read_header
from trtkit.checkpoint.trtllm_check import head_config
from trtkit.checkpoint.trtllm_config import TrtllmOptions
from trtkit.checkpoint.unified import UnifiedCheckpoint, unified_layout
from trtkit.errors import CheckpointError

__all__ = ["Head", "check_extremes", "check_scales", "has_pre_scales", "open_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A draft head, headers only."""

    config: DrafterConfig
    shards: Shards
    """By public names."""


def has_pre_scales(source: UnifiedCheckpoint) -> bool:
    """Whether linears have pre_quant_scale: all or none, because one key in config.json says so for all."""
    linears = [f"{layer_prefix(n)}{part}" for n in range(source.spec.layers) for part in source.spec.linear_shapes]
    without = [name for name in linears if f"{name}.pre_quant_scale" not in source.shards]
    if without and len(without) < len(linears):
        raise CheckpointError(
            "some linears have a pre_quant_scale and some have none, which TensorRT-LLM cannot hold",
            where=str(source.directory),
            offenders=[f"{name}: none" for name in without[:20]],
            hint="build the checkpoint with `trtkit build`",
        )
    return not without


def check_scales(source: UnifiedCheckpoint, *, pre_scale: bool) -> None:
    """Every scale finite and positive: the loader divides by them."""
    wrong = []
    for name in unified_layout(source.spec, source.scheme, pre_scale=pre_scale):
        if name.endswith("_scale"):
            tensor = source.shards.tensor(name).float()
            positive = tensor.isfinite() & (tensor > 0)
            if not bool(positive.all()):
                wrong.append(f"{name}: {int((~positive).sum())} value(s) are zero, negative or not finite")
    if wrong:
        raise CheckpointError(
            "scales that no kernel can use",
            where=str(source.directory),
            offenders=wrong[:20],
            hint="build the checkpoint again",
        )


def open_head(directory: Path, options: TrtllmOptions) -> Head:
    """The head's tensors under their public names, headers only. Raises :class:`CheckpointError`."""
    config = head_config(options)
    assert config is not None
    entries = {canonical_name(name): entry for name, entry in read_header(directory / WEIGHTS_FILE).items()}
    wanted = dict(drafter_tensors(config).values())
    wrong = [f"{name}: missing" for name in wanted if name not in entries]
    wrong += [f"{name}: not part of such a head" for name in entries if name not in wanted]
    for name in wanted.keys() & entries.keys():
        entry = entries[name]
        if entry.shape != wanted[name]:
            wrong.append(f"{name}: shape {list(entry.shape)}, config.json implies {list(wanted[name])}")
        elif entry.dtype not in MODEL_DTYPES.values():
            wrong.append(f"{name}: dtype {entry.dtype}, expected a 16- or 32-bit float".replace("torch.", ""))
    if wrong:
        raise CheckpointError("the draft head cannot be used", where=str(directory), offenders=sorted(wrong))
    return Head(config=config, shards=Shards(entries))


def check_extremes(weights: Sequence[Tensor], where: str) -> None:
    """W8A16 scales are amax / 128 of a row; codes without an extreme one were made by another rule."""
    bad = sum(
        int(((codes != 0).any(dim=1) & ~((codes == -128) | (codes == 127)).any(dim=1)).sum()) for codes in weights
    )
    if bad:
        raise CheckpointError(
            f"{bad} row(s) of int8 codes reach neither -128 nor 127: TensorRT-LLM's loader would make other codes",
            where=where,
            hint="build the checkpoint with `trtkit build --precision int8`",
        )
