"""How results look on stdout: aligned tables, one ``next:`` line, and the JSON document as the last line."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["facts", "finish", "gigabytes", "notice", "quoted", "show", "table"]

_PIPE_WIDTH = 160
_ROOMY = 10_000


def _console() -> Console:
    # Into a pipe or a file rich would assume 80 columns and break words.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def show(renderable: Any) -> None:
    """Print a rich renderable, without the blanks that rich pads lines with."""
    console = _console()
    # What must stay whole may be wider than the terminal: long lines can still be read, chopped words cannot.
    roomy = console.options.update(width=_ROOMY)
    console.width = max(console.width, Measurement.get(console, roomy, renderable).minimum)
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().splitlines():
        print(line.rstrip())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), title: str = "") -> None:
    """Print rows under bold headings; columns named in ``right`` are aligned right. Only prose is wrapped."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        # A number or a name must stay whole; only text may wrap.
        numeric = name in right
        whole = numeric or not any(" " in row[index] for row in rows)
        width = max(map(cell_len, (name, *(row[index] for row in rows)))) if whole else None
        made.add_column(name, justify="right" if numeric else "left", no_wrap=whole, min_width=width, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    if title:
        _title(title)
    show(made)


def facts(title: str, pairs: Mapping[str, str]) -> None:
    """Print a title and ``name  value`` lines, wrapped under their own column."""
    _title(title)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in pairs.items():
        grid.add_row(Text(name), Text(value))
    show(Padding(grid, (0, 0, 0, 2)))


def _title(text: str) -> None:
    """A bold line, never wrapped: it may begin with a path."""
    console = _console()
    with console.capture() as captured:
        console.print(Text(text, style="bold"), no_wrap=True, overflow="ignore", crop=False)
    print(captured.get().rstrip())


def notice(text: str) -> None:
    """Print one line of text, never wrapped."""
    print(text)


def finish(next_step: str, document: Mapping[str, Any] | None) -> None:
    """The end of every verb: what to do next, then the machine form as the very last line if it was asked for."""
    print(f"next: {next_step}")
    if document is not None:
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(document, ensure_ascii=not unicode, allow_nan=False))


def quoted(word: object) -> str:
    """A path or a name as the shell takes it for one word: ``next:`` lines are pasted."""
    return shlex.quote(str(word))


def gigabytes(count: float) -> str:
    """``9.93e9`` -> ``9.93 GB``; small sizes in MB."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
