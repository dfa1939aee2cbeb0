"""Options that several verbs share, so that they are spelled and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = ["Device", "Json", "Model", "Out", "Threads"]

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document, on the last line of stdout.")
]
Model: TypeAlias = Annotated[
    str, typer.Option("--model", help="Hub id, checkpoint directory, or 'practice' (bundled).")
]
Out: TypeAlias = Annotated[Path | None, typer.Option("--out", help="Where to write the result.")]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads: TypeAlias = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: one per core.")]
