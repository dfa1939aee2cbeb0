"""What the engine's counters say of a run: tokens per step, acceptance, seconds by phase; and when to warn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trtkit.runtime.api import EngineStats

__all__ = ["EngineFigures", "engine_figures"]

_POOR_TOKENS_PER_STEP = 1.5
_FEW_ROW_STEPS = 200
"""Too few to judge a draft head by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """Counters of all sessions of a run, added up. A session that was killed left none."""

    tokens_per_step: float | None
    """New tokens per row and step: 1.0 without a drafter; None when no step was counted."""
    accepted_by_depth: tuple[float, ...] = ()
    """Share of drafting row-steps that accepted at least 1, 2, ... tokens; empty without a drafter."""
    drafting: float | None = None
    """Share of row-steps that drafted; None without a drafter. At a large batch the engine may choose not to."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    preemptions: int = 0
    peak_rows: int = 0
    drafted_row_steps: int = 0

    def document(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "tokens_per_step": None if self.tokens_per_step is None else round(self.tokens_per_step, 4),
            "accepted_by_depth": [round(share, 4) for share in self.accepted_by_depth],
            "drafting": None if self.drafting is None else round(self.drafting, 4),
            "phase_seconds": {phase: round(seconds, 3) for phase, seconds in self.phase_seconds.items()},
            "preemptions": self.preemptions,
            "peak_rows": self.peak_rows,
        }

    @property
    def warning(self) -> str | None:
        """What to say of a draft head that does not pay; None when it does, or when there is none."""
        speed = 1 + sum(self.accepted_by_depth)
        if self.drafted_row_steps < _FEW_ROW_STEPS or speed >= _POOR_TOKENS_PER_STEP:
            return None
        return (
            f"the draft head gave {speed:.2f} tokens per drafting step; below {_POOR_TOKENS_PER_STEP} it may cost more "
            "than it saves: compare with --tree none, and train it on this model's own answers"
        )


def engine_figures(stats: Sequence[EngineStats]) -> EngineFigures:
    """Add up the sessions of a run."""
    row_steps = sum(one.row_steps for one in stats)
    # Journals of older versions do not count them: engines drafted in every step. One that accepted nothing and
    # drafted in no step is an engine that chose not to.
    drafted = sum(one.drafted_row_steps or (one.row_steps if any(one.accepted_by_depth) else 0) for one in stats)
    depths = max((len(one.accepted_by_depth) for one in stats), default=0)
    accepted = [sum(sum(one.accepted_by_depth[depth : depth + 1]) for one in stats) for depth in range(depths)]
    phases: Counter[str] = Counter()  # counters add floats as well
    for one in stats:
        phases.update(one.seconds)
    return EngineFigures(
        tokens_per_step=sum(one.new_tokens for one in stats) / row_steps if row_steps else None,
        accepted_by_depth=tuple(count / drafted for count in accepted) if drafted else (),
        drafting=drafted / row_steps if accepted and row_steps else None,
        phase_seconds=dict(phases),
        preemptions=sum(one.preemptions for one in stats),
        peak_rows=max((one.peak_rows for one in stats), default=0),
        drafted_row_steps=drafted,
    )
