"""The files of an export in Hugging Face's layout: safetensors, and beside them what belongs to the model."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from trtkit.checkpoint.convert import COMPANIONS
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.shards import Layout
from trtkit.errors import UsageError
from trtkit.files import digest_file
from trtkit.log import Progress
from trtkit.staging import staged_dir

__all__ = ["check_elsewhere", "write_export"]


def check_elsewhere(source: Path, out: Path) -> None:
    """Raise :class:`UsageError` where ``out`` would replace ``source``."""
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise UsageError("the output would replace the checkpoint it is made from", where=str(out))


def write_export(
    source: Path, out: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor | Iterator[Tensor]]],
    configure: Callable[[Path], None], *, replace: bool,
) -> dict[str, str]:  # fmt: skip
    """Write ``tensors``, in the order of ``layout``, the files of ``configure(directory)``, and the tokenizer and the
    generation config of ``source``: nothing of trtkit's own. Returns SHA-256 by file name.

    ``out`` appears whole or not at all. Raises :class:`OutputError`.
    """
    with staged_dir(out, replace=replace) as stage:
        writer = ShardWriter(stage, layout)
        try:
            with Progress("export", total=len(layout), unit="tensors") as progress:
                for name, pieces in tensors:
                    writer.write(name, pieces)
                    progress.advance()
            digests = writer.close()
        finally:
            writer.abandon()
        configure(stage)
        for path in sorted(source.iterdir()):
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
                shutil.copyfile(path, stage / path.name)
        names = sorted(path.name for path in stage.iterdir() if path.name not in digests)
        digests |= {name: digest_file(stage / name) for name in names}
    return digests
