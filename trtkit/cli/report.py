"""``trtkit report``: runs -> one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.options import Json
from trtkit.cli.output import facts, finish, notice
from trtkit.errors import UsageError


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories of trtkit solve, finished or not.", metavar="RUN")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page; default: report.html in the run, for several runs report.html here."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Also write it as Markdown, beside the page.")] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page about one or several runs.

    It needs no other file and no network.

    Accuracy is compared only between runs with the same problems, samples, token budget and time limit.
    """
    from trtkit.files import write_text
    from trtkit.report.page import document, html, report_on
    from trtkit.report.page import markdown as as_markdown
    from trtkit.report.totals import lead

    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    beside = page.with_suffix(".md") if markdown else None
    if beside == page:
        raise UsageError(f"the page and its Markdown would both be {page}", hint="give --out another ending: .html")
    report = report_on(runs)
    write_text(page, html(report))
    if beside is not None:
        write_text(beside, as_markdown(report))
    for run, figures in zip(report.runs, report.figures, strict=True):
        notice(f"{run.label}: {lead(run, figures)}")
    for text in report.notices:
        notice(f"note: {text}")
    if not report.comparison.comparable:
        names = ", ".join(item.name for item in report.comparison.budgets)
        notice(f"note: The accuracy of these runs must not be compared: they differ in {names}.")
    facts("files", {"page": str(page), **({"markdown": str(beside)} if beside else {})})
    finish(
        f"open {page} in a browser",
        {"page": str(page), "markdown": str(beside) if beside else None, **document(report)} if as_json else None,
    )
