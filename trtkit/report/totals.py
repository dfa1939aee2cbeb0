"""The figures of one or several runs as rows of text, each with what it means: the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from trtkit.report.compare import Comparison
from trtkit.report.figures import Estimate, Figures
from trtkit.report.records import Run

__all__ = ["Group", "Metric", "begun", "duration", "lead", "percent", "points", "rate", "settings", "totals"]

_MISSING = "not recorded"
_LONGEST = 300
"""Characters of a setting."""
_NAMES = {
    "variants": "prompt", "mode": "answer mode", "weighting": "weights", "outstanding": "samples submitted at once",
}  # fmt: skip
"""Settings that the options of ``trtkit solve`` call by another name."""
_UNSET = {"output_layer": "as built", "reserve": "default"}
_SECONDS = frozenset(("time_limit", "reserve"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row: a figure of every run."""

    name: str
    meaning: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Not every run has the same."""
        return len(set(self.values)) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows that belong together."""

    name: str
    metrics: tuple[Metric, ...]
    budget_bound: bool = False
    """Figures that say nothing against those of a run with another budget."""


_Text: TypeAlias = Callable[[Figures], str]


def totals(runs: Sequence[Run], figures: Sequence[Figures], comparison: Comparison) -> list[Group]:
    """All figures of all runs."""

    def rows(*described: tuple[str, str, _Text]) -> tuple[Metric, ...]:
        return tuple(
            Metric(name=name, meaning=meaning, values=tuple(map(text, figures))) for name, meaning, text in described
        )

    graded = any(figure.accuracy is not None for figure in figures)
    answers = rows(*(_GRADED if graded else ()), *_ANSWERS)
    if any(figure.defaulted for figure in figures):
        answers += rows(
            ("Default answers", "Problems answered with the configured default.", lambda f: f"{f.defaulted:,}")
        )
    if any(comparison.gains):
        gains = tuple("-" if gain is None else points(gain) for gain in comparison.gains)
        meaning = f"Accuracy minus that of {runs[0].label}, paired by problem."
        answers = (answers[0], Metric(name="Difference", meaning=meaning, values=gains), *answers[1:])
    time = Metric(
        name="Time", meaning="Work by all sessions, without loading the engine.", values=tuple(map(_time, runs))
    )
    speed = (time, *rows(*_SPEED))
    loading = [run.loading_seconds for run in runs]
    if any(seconds is not None for seconds in loading):
        values = tuple("-" if seconds is None else duration(seconds) for seconds in loading)
        speed += (Metric(name="Loading", meaning="Time to load the engine, all sessions.", values=values),)
    for there, row in (
        (any(f.accepted_by_depth for f in figures), _ACCEPTED),
        (any(f.phase_seconds for f in figures), _PHASES),
        (any(f.bank for f in figures), _BANK),
    ):
        speed += rows(row) if there else ()
    return [
        Group(name="Answers", metrics=answers, budget_bound=True),
        Group(name="Samples", metrics=rows(*_SAMPLES)),
        Group(name="Speed", metrics=speed),
    ]


def lead(run: Run, figures: Figures) -> str:
    """The run in two sentences."""
    if figures.accuracy is not None:
        first = f"{figures.correct:,} of {figures.graded:,} problems right ({figures.accuracy.value:.1%})"
    else:
        first = f"{figures.answered:,} of {figures.settled:,} problems answered (no known answers to hold them against)"
    samples = run.arguments.get("samples")
    asked = f"up to {samples:,} samples per problem" if isinstance(samples, int) else "samples not recorded"
    speed = f", {figures.tokens_per_second:,.0f} tokens per second" if figures.tokens_per_second else ""
    return f"{first} in {duration(figures.seconds)}, with {asked}. {figures.tokens:,} tokens{speed}."


def settings(runs: Sequence[Run]) -> list[Metric]:
    """How each run was made."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for fact in facts for name in fact)
    return [
        Metric(name=name, meaning="", values=tuple(_short(fact.get(name, "-")) for fact in facts)) for name in names
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _facts(run: Run) -> dict[str, str]:
    facts = {"directory": str(run.path), "begun": begun(run), "sessions": str(run.sessions)}
    facts |= {"problems": run.problems_path or _MISSING, "engine": run.engine_path or _MISSING}
    facts |= {_NAMES.get(name, name).replace("_", " "): _said(name, value) for name, value in run.arguments.items()}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or _MISSING
    return facts


def _said(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        parts = {part: said for part, said in value.items() if said is not None}
        if name == "mode":
            return " ".join(_said("", part) for part in parts.values()) or "none"
        return ", ".join(f"{part.replace('_', ' ')} {_said(part, said)}" for part, said in parts.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return _UNSET.get(name, "none")
    if name in _SECONDS and isinstance(value, (int, float)):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def begun(run: Run) -> str:
    """``2026-11-24 00:15:35 UTC``."""
    return run.created.replace("T", " ").replace("+00:00", " UTC") if run.created else _MISSING


def duration(seconds: float) -> str:
    """``3.1 s``, ``2 min 5 s``, ``1 h 2 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def percent(value: float | None) -> str:
    """``12.5%``."""
    return "-" if value is None else f"{value:.1%}"


def rate(estimate: Estimate | None) -> str:
    """``63.2% ± 8.1``: the mean and its standard error, in percent."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.1%}" + ("" if estimate.error is None else f" ± {100 * estimate.error:.1f}")


def points(estimate: Estimate) -> str:
    """``+4.2 ± 3.1 points``."""
    error = "" if estimate.error is None else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.value:+.1f}{error} points"


def _accuracy(figures: Figures) -> str:
    counted = f" ({figures.correct:,} of {figures.graded:,})" if figures.accuracy else ""
    return rate(figures.accuracy) + counted


def _majority(figures: Figures) -> str:
    curve = figures.majority
    return f"{rate(curve[-1])} (k = {len(curve)})" if curve else "-"


def _lengths(figures: Figures) -> str:
    if figures.tokens_median is None or figures.tokens_p90 is None:
        return "-"
    return f"{figures.tokens_median:,.0f}; {figures.tokens_p90:,.0f}"


def _time(run: Run) -> str:
    limit = "" if run.limit_seconds is None else f" (limit {duration(run.limit_seconds)})"
    return duration(run.seconds) + limit


def _tokens(figures: Figures) -> str:
    share = f" ({figures.cancelled_tokens / figures.tokens:.1%} cancelled)" if figures.cancelled_tokens > 0 else ""
    return f"{figures.tokens:,}{share}"


def _per_step(figures: Figures) -> str:
    return _MISSING if figures.tokens_per_step is None else f"{figures.tokens_per_step:.2f}"


def _accepted(figures: Figures) -> str:
    return ", ".join(f"{share:.0%}" for share in figures.accepted_by_depth) or "-"


def _phases(figures: Figures) -> str:
    total = sum(seconds for _, seconds in figures.phase_seconds)
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in figures.phase_seconds) if total else "-"


def _bank(figures: Figures) -> str:
    return duration(figures.bank[-1][1]) if figures.bank else "-"


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.0f}{unit}"


_GRADED: tuple[tuple[str, str, _Text], ...] = (
    ("Accuracy", "Problems whose voted answer is right. No answer is wrong.", _accuracy),
    ("pass@1", "How often a single finished sample is right, mean over problems.", lambda f: rate(f.pass_at_1)),
    ("maj@k, all samples", "Plain majority of all finished samples.", _majority),
)
_ANSWERS: tuple[tuple[str, str, _Text], ...] = (
    (
        "Problems without an answer",
        "No sample of theirs gave one.",
        lambda f: f"{f.settled - f.answered:,} of {f.settled:,}",
    ),
)
_SAMPLES: tuple[tuple[str, str, _Text], ...] = (
    ("Finished samples", "Samples of settled problems that ran to an end.", lambda f: f"{f.samples:,}"),
    ("Without an answer", "Finished samples that wrote no box that counts.", lambda f: percent(f.blank_rate)),
    ("Truncated", "Cut off by the token budget, without an answer being forced.", lambda f: percent(f.truncated_rate)),
    ("Forced", "Made to answer: budget, time or thought had ended without.", lambda f: percent(f.forced_rate)),
    ("Looped", "Ended because they repeated themselves.", lambda f: percent(f.looped_rate)),
    ("Cancelled", "Samples not run to their end: their problem was settled.", lambda f: f"{f.cancelled:,}"),
    (
        "Problems stopped early",
        "Settled before all samples were in, by a stop rule or the clock.",
        lambda f: f"{f.stopped_early:,} of {f.settled:,}",
    ),
    ("Tokens per sample", "Median and 90th percentile of finished samples.", _lengths),
)
_SPEED: tuple[tuple[str, str, _Text], ...] = (
    ("Tokens", "Generated, those of cancelled samples included.", _tokens),
    ("Speed", "All rows of the batch together.", lambda f: _number(f.tokens_per_second, " tok/s")),
    ("Tokens per step", "What one row gains in a decode step; 1.0 without a draft head.", _per_step),
)
_ACCEPTED = ("Draft accepted", "Drafting steps in which at least 1, 2, ... drafted tokens held.", _accepted)
_PHASES = ("Time by phase", "Where the engine's seconds went.", _phases)
_BANK = ("Time bank at the end", "Time that no problem had a claim to.", _bank)
