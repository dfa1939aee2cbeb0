"""Is a directory what it was when it was built, and how far are its weights from the original ones?"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trtkit.checkpoint.shards import raise_damaged
from trtkit.checkpoint.trtllm_reader import open_checkpoint
from trtkit.files import digest_file
from trtkit.log import Progress
from trtkit.recipe import ENGINE_FILE, read_manifest

__all__ = ["relative_error", "verify_engine"]


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


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """||W - Q|| / ||W||; 0 for a zero weight."""
    wide = weight.float()
    norm = float(wide.norm())
    return float((wide - quantized).norm()) / norm if norm else 0.0
