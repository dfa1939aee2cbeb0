"""Is a directory what it was when it was built, and how far are its weights from the original ones?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trtkit.checkpoint.hf import HfCheckpoint
from trtkit.checkpoint.shards import raise_damaged
from trtkit.checkpoint.trtllm_reader import open_checkpoint
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.files import digest_file
from trtkit.log import Progress
from trtkit.quant.group import effective_weight
from trtkit.quant.tensor import dequantize
from trtkit.recipe import ENGINE_FILE, read_manifest

__all__ = ["TensorError", "relative_error", "tensor_errors", "verify_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """Of one quantized weight."""

    name: str
    relative: float
    """||W - Q|| / ||W||, Frobenius."""


def verify_engine(directory: Path, name: str = ENGINE_FILE) -> int:
    """Compare every file with the digest in engine.json, or in the manifest ``name``; returns how many were checked.

    Raises :class:`CheckpointError` listing every missing, changed or damaged file, :class:`EngineError` when the
    directory is no engine.
    """
    manifest = read_manifest(directory, name)
    digests = manifest.checkpoint_digest
    problems = []
    with Progress("verify", total=len(digests), unit="files") as progress:
        for file, digest in digests.items():
            path = directory / file
            if not path.is_file():
                problems.append(f"{file}: missing")
            elif digest_file(path) != digest:
                problems.append(f"{file}: its contents have changed since the build")
            progress.advance()
    raise_damaged(directory, problems, "the engine is not what was built")
    if manifest.backend == "torch":
        open_checkpoint(directory)
    return len(digests)


def tensor_errors(source: HfCheckpoint, built: UnifiedCheckpoint) -> Iterator[TensorError]:
    """The error of every linear, in layer order, one weight in memory at a time."""
    for layer in range(source.spec.layers):
        for part in source.spec.linear_shapes:
            linear = built.part(layer, part)
            weight = source.part(layer, part).weight.data
            quantized = effective_weight(linear, dequantize(linear.weight))
            yield TensorError(name=f"layers.{layer}.{part}", relative=relative_error(weight, quantized))


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """||W - Q|| / ||W||; 0 for a zero weight."""
    wide = weight.float()
    norm = float(wide.norm())
    return float((wide - quantized).norm()) / norm if norm else 0.0
