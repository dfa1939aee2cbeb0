"""Runs -> one HTML page that needs nothing else, and the same in Markdown.

Every text that comes from a file is escaped by the template engine, and the page's own content security policy lets no
script run but the one whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trtkit import __version__
from trtkit.log import Progress
from trtkit.report.charts import Chart, Series, chart
from trtkit.report.compare import Comparison, compare
from trtkit.report.figures import Figures, figures_of
from trtkit.report.problems import ProblemRow, problem_rows
from trtkit.report.read import TOLD_SECONDS, read_runs
from trtkit.report.records import Run, Sample
from trtkit.report.totals import begun, lead, rate, settings, totals

__all__ = ["Report", "document", "html", "markdown", "report_on"]

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
_PIECE = re.compile(r"\([^)]{,30}\)|[a-z]+ [0-9]+%|% ± [0-9.]+|[0-9.]+ (?:s|min|h|tok/s)\b")
_LONGEST_BOX = 200
_ENDINGS = {
    "stop": "finished", "think": "finished", "eos": "end of turn", "box": "first box", "loop": "looped",
    "length": "token budget", "deadline": "deadline", "settled": "settled on its answer",
}  # fmt: skip
_STATES = {
    "wrong": "wrong", "none": "without an answer", "right": "right", "unknown": "answered", "open": "not settled",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a page shows."""

    runs: tuple[Run, ...]
    figures: tuple[Figures, ...]
    """One per run."""
    comparison: Comparison
    rows: tuple[ProblemRow, ...]
    notices: tuple[str, ...]


def report_on(paths: Sequence[Path]) -> Report:
    """Read runs and compute their figures. Raises what :func:`trtkit.report.read.read_runs` raises."""
    runs = read_runs(paths)
    graded = sum(result.correct is not None for run in runs for result in run.settled)
    with Progress("figures", total=graded, unit="problems", after_seconds=TOLD_SECONDS) as progress:
        figures = tuple(figures_of(run, progress.advance) for run in runs)
    return Report(
        runs=tuple(runs),
        figures=figures,
        comparison=compare(runs),
        rows=tuple(problem_rows(runs)),
        notices=tuple(_notices(runs)),
    )


def html(report: Report) -> str:
    """The page."""
    style, script = _asset("page.css"), _asset("page.js")
    return (
        _environment("html")
        .get_template("page.html.j2")
        .render(
            **_content(report),
            charts=_charts(report),
            states=_states(report),
            graded=any(figures.graded for figures in report.figures),
            clocked=any(result.share_seconds is not None for run in report.runs for result in run.results),
            style=Markup(style),
            script=Markup(script),
            style_digest=_digest(style),
            script_digest=_digest(script),
            version=__version__,
        )
    )


def markdown(report: Report) -> str:
    """The same as GitHub-flavoured Markdown, with the votes in words."""
    curves = [figures.majority for figures in report.figures]
    majority = [
        (k + 1, [rate(curve[k]) if k < len(curve) else "-" for curve in curves])
        for k in range(max(map(len, curves), default=0))
    ]
    return _environment("markdown").get_template("report.md.j2").render(**_content(report), majority=majority)


def _content(report: Report) -> dict[str, Any]:
    runs, figures = report.runs, report.figures
    return {
        "title": runs[0].label if len(runs) == 1 else f"{len(runs)} runs side by side",
        "runs": runs,
        "begun": list(map(begun, runs)),
        "leads": [lead(run, one) for run, one in zip(runs, figures, strict=True)],
        "comparison": report.comparison,
        "groups": totals(runs, figures, report.comparison),
        "notices": report.notices,
        "early": any(one.cancelled for one in figures),
        "errors": any(one.accuracy is not None for one in figures),
        "rows": report.rows,
        "settings": settings(runs),
    }


def _notices(runs: Sequence[Run]) -> list[str]:
    notices = []
    for run in runs:
        name = "" if len(runs) == 1 else f"{run.label}: "
        if not run.finished:
            notices.append(
                f"{name}The run is not finished: {len(run.settled)} of {len(run.results)} problems are settled, "
                "and all figures are about those."
            )
        notices += [name + notice for notice in run.notices]
    return notices


def _charts(report: Report) -> list[Chart]:
    pairs = list(enumerate(zip(report.runs, report.figures, strict=True)))
    bound = (
        "" if report.comparison.comparable else "These runs had different budgets: their curves must not be compared. "
    )
    curves = [
        chart(
            "Majority of k samples",
            [
                Series(
                    name=run.label,
                    place=place,
                    points=[(float(k), point.value) for k, point in enumerate(figures.majority, start=1)],
                    band=[point.error or 0.0 for point in figures.majority],
                )
                for place, (run, figures) in pairs
            ],
            x_label="k, samples in the vote",
            y_label="maj@k, % of problems right",
            note=f"{bound}k of the finished samples, drawn without replacement; a problem with fewer counts with all "
            "it has. Band: one standard error over problems.",
            percent=True,
            whole_x=True,
        ),
        chart(
            "Speed over time",
            [Series(name=run.label, place=place, points=figures.speed) for place, (run, figures) in pairs],
            x_label="seconds of work on the run",
            y_label="Tokens per second",
            note="A sample's tokens are spread evenly over the time from submitting its problem to its end.",
        ),
        chart(
            "Draft tokens accepted",
            [
                Series(
                    name=run.label,
                    place=place,
                    points=[(float(n), share) for n, share in enumerate(figures.accepted_by_depth, start=1)],
                )
                for place, (run, figures) in pairs
            ],
            x_label="drafted tokens, at least",
            y_label="Share of drafting steps",
            note="How often at least so many drafted tokens held. Steps that decode without drafts, as an engine may "
            "choose to at a large batch, do not count.",
            percent=True,
            whole_x=True,
        ),
        chart(
            "Time bank",
            [Series(name=run.label, place=place, points=figures.bank) for place, (run, figures) in pairs],
            x_label="seconds of work on the run",
            y_label="Seconds in the bank",
            note="Time that no problem had a claim to, whenever one was settled.",
        ),
    ]
    return [one for one in curves if one is not None]


def _states(report: Report) -> list[tuple[str, str]]:
    there = {line.state for row in report.rows for line in row.lines}
    return [(state, words) for state, words in _STATES.items() if state in there]


@cache
def _environment(kind: str) -> Environment:
    page = kind == "html"
    made = Environment(
        loader=PackageLoader("trtkit.report", "templates"),
        autoescape=page,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if page else _escaped,
    )
    made.filters["ending"] = _ending
    made.filters["boxed"] = _boxed
    made.filters["whole"] = _whole
    return made


def _escaped(value: object) -> str:
    """One line of Markdown text that means just what it says."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(value).split()))


def _whole(value: str) -> str:
    """Figures with no-break spaces where a narrow screen must not cut them: ``(k = 24)``, ``draft 62%``, ``12.9 s``."""
    return _PIECE.sub(lambda piece: piece.group().replace(" ", "\N{NO-BREAK SPACE}"), value)


def _ending(sample: Sample) -> str:
    return ("forced to answer, " if sample.forced else "") + _ENDINGS.get(sample.ending, sample.ending)


def _boxed(sample: Sample) -> str:
    if sample.box is None:
        return "–"
    return sample.box if len(sample.box) <= _LONGEST_BOX else sample.box[: _LONGEST_BOX - 1] + "…"


def _asset(name: str) -> str:
    return (files("trtkit.report") / "templates" / name).read_text("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def document(report: Report) -> Mapping[str, Any]:
    """The machine form of the figures: ``runs``, ``comparable``, ``differences``, ``notices``."""
    return {
        "comparable": report.comparison.comparable,
        "differences": {item.name: list(item.values) for item in report.comparison.budgets},
        "notices": list(report.notices),
        "runs": [_run_document(run, figures) for run, figures in zip(report.runs, report.figures, strict=True)],
    }


def _run_document(run: Run, figures: Figures) -> dict[str, Any]:
    def pair(name: str) -> dict[str, float | None]:
        estimate = getattr(figures, name)
        return {
            name: estimate and round(estimate.value, 6),
            f"{name}_error": estimate and estimate.error and round(estimate.error, 6),
        }

    def rounded(name: str, digits: int) -> float | None:
        value = getattr(figures, name)
        return None if value is None else round(value, digits)

    rates = ("blank_rate", "truncated_rate", "forced_rate", "looped_rate")
    counts = (
        "problems",
        "settled",
        "answered",
        "graded",
        "correct",
        "samples",
        "cancelled",
        "stopped_early",
        "defaulted",
        "tokens",
        "cancelled_tokens",
    )
    return {
        "run": run.label,
        "run_dir": str(run.path),
        **{name: getattr(figures, name) for name in counts},
        **pair("accuracy"),
        **pair("pass_at_1"),
        "maj_at": [round(point.value, 6) for point in figures.majority],
        **{name: rounded(name, 6) for name in rates},
        "tokens_per_step": rounded("tokens_per_step", 4),
        "tokens_per_second": rounded("tokens_per_second", 2),
        "seconds": round(figures.seconds, 3),
        "bank_seconds": round(figures.bank[-1][1], 3) if figures.bank else None,
    }
