"""What may be said of several runs together. Accuracy is compared between equal budgets only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtkit.report.figures import Estimate, standard_error
from trtkit.report.records import Run

__all__ = ["Comparison", "Difference", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that the runs do not share."""

    name: str
    values: tuple[str, ...]
    """One per run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs side by side."""

    budgets: tuple[Difference, ...]
    """Why their accuracy must not be compared; empty when it may be."""
    gains: tuple[Estimate | None, ...]
    """Accuracy minus that of the first run, paired by problem; None for the first, and without comparable runs."""

    @property
    def comparable(self) -> bool:
        """Accuracy may be compared."""
        return not self.budgets


def compare(runs: Sequence[Run]) -> Comparison:
    """Hold the runs against each other. One run alone is comparable to nothing, and that is fine."""
    differing = tuple(
        Difference(name=name, values=tuple(value for _, value in values))
        for name, values in (
            ("problems", [(run.problems_digest or run.label, _problems(run)) for run in runs]),
            ("problems settled", [_settled(run) for run in runs]),
            ("samples per problem", [(_argument(run, "samples"),) * 2 for run in runs]),
            ("max tokens per sample", [(_argument(run, "max_tokens"),) * 2 for run in runs]),
            ("time limit", [(_limit(run),) * 2 for run in runs]),
        )
        if len({key for key, _ in values}) > 1
    )
    gains = tuple(None if differing or place == 0 else _gain(runs[0], run) for place, run in enumerate(runs))
    return Comparison(budgets=differing, gains=gains)


def _gain(first: Run, run: Run) -> Estimate | None:
    before = {result.id: result.correct for result in first.settled if result.correct is not None}
    pairs = [
        float(result.correct) - float(before[result.id] or 0)
        for result in run.settled
        if result.correct is not None and result.id in before
    ]
    if not pairs:
        return None
    return Estimate(value=sum(pairs) / len(pairs), error=standard_error(pairs), count=len(pairs))


def _problems(run: Run) -> str:
    digest = f"sha256 {run.problems_digest[:12]}" if run.problems_digest else "no digest"
    return f"{run.problems_path or 'unknown'} ({digest})"


def _settled(run: Run) -> tuple[str, str]:
    names = sorted(result.id for result in run.settled)
    return "\n".join(names), f"{len(names):,} of {len(run.results):,}"


def _argument(run: Run, name: str) -> str:
    value = run.arguments.get(name)
    return f"{value:,}" if isinstance(value, int) else "not recorded" if value is None else str(value)


def _limit(run: Run) -> str:
    return "none" if run.limit_seconds is None else f"{run.limit_seconds:,g} s"
