"""Options that several verbs share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from drafter.config import TreeShape
from trtkit.errors import UsageError

__all__ = ["Device", "Json", "Model", "Out", "Threads", "tree_named"]

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document, on the last line of stdout.")
]
Model: TypeAlias = Annotated[
    str, typer.Option("--model", help="Hub id, checkpoint directory, or 'practice' (bundled).")
]
Out: TypeAlias = Annotated[Path | None, typer.Option("--out", help="Where to write the result.")]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads: TypeAlias = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: one per core.")]


def tree_named(text: str) -> TreeShape:
    """``4x3`` -> four beams of three tokens. Raises :class:`UsageError`."""
    beams, _, length = text.lower().partition("x")
    try:
        return TreeShape(beams=int(beams), length=int(length))
    except ValueError:
        raise UsageError(f"--tree {text!r}: not a draft tree", hint="beams x length, e.g. 1x3 or 4x4") from None
