"""Records of the journal, both ways: ``Attempt``, ``Solution`` and the engine's counters as plain rows.

Fields that were added later are optional when reading. The readers raise ValueError, KeyError or TypeError for what is
no whole record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trtkit.runtime.api import EngineStats, FinishReason
from trtkit.solve.ends import Ending
from trtkit.solve.records import Attempt, Solution

__all__ = [
    "Settled", "attempt_row", "engine_row", "read_attempt", "read_engine", "read_settled", "solution_row"
]  # fmt: skip

_ENGINE_COUNTS = (
    "steps", "prompt_tokens", "prefill_tokens", "new_tokens", "row_steps", "preemptions", "peak_rows", "kv_blocks",
    "kv_blocks_free",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the journal says of a problem that needs no more samples; its votes follow from its attempts."""

    tokens: int
    seconds: float
    stopped_early: str | None
    error: str | None
    share_seconds: float | None = None
    used_seconds: float | None = None
    bank_seconds: float | None = None
    cancelled: int = 0
    counted: tuple[int, ...] | None = None
    """Indices of the samples that were counted, in that order; None in journals of older versions: all of them."""


def attempt_row(attempt: Attempt) -> dict[str, Any]:
    """A row of kind ``attempt``."""
    row: dict[str, Any] = {
        "kind": "attempt",
        "problem": attempt.problem_id,
        "index": attempt.index,
        "variant": attempt.variant,
        "tokens": attempt.tokens,
        "finish": attempt.finish.value,
        "box": attempt.box,
        "seconds": round(attempt.seconds, 3),
    }
    optional = {
        "ending": attempt.ending and attempt.ending.value,
        "forced": attempt.forced or None,
        "confidence": attempt.confidence,
        "tool_calls": attempt.tool_calls or None,
        "used": _rounded(attempt.used_seconds),
        "text": attempt.text,
    }
    return row | {name: value for name, value in optional.items() if value is not None}


def read_attempt(row: dict[str, Any]) -> Attempt:
    """What :func:`attempt_row` wrote."""
    return Attempt(
        problem_id=str(row["problem"]),
        index=int(row["index"]),
        variant=str(row["variant"]),
        tokens=int(row["tokens"]),
        finish=FinishReason(row["finish"]),
        box=None if row["box"] is None else str(row["box"]),
        seconds=float(row["seconds"]),
        text=row.get("text"),
        ending=None if row.get("ending") is None else Ending(row["ending"]),
        forced=bool(row.get("forced", False)),
        confidence=_optional(row, "confidence"),
        tool_calls=int(row.get("tool_calls", 0)),
        used_seconds=_optional(row, "used"),
    )


def solution_row(solution: Solution) -> dict[str, Any]:
    """A row of kind ``solution``."""
    return {
        "kind": "solution",
        "problem": solution.problem_id,
        "answer": solution.answer.key if solution.answer else None,
        "votes": [[vote.answer.key, vote.count] for vote in solution.tally.ranked],
        "tokens": solution.tokens,
        "seconds": round(solution.seconds, 3),
        "stopped_early": solution.stopped_early,
        "error": solution.error,
        "share": _rounded(solution.share_seconds),
        "used": _rounded(solution.used_seconds),
        "bank": _rounded(solution.bank_seconds),
        "cancelled": solution.cancelled,
        "counted": [attempt.index for attempt in solution.attempts],
    }


def read_settled(row: dict[str, Any]) -> Settled:
    """The part of :func:`solution_row` that its attempts do not say."""
    return Settled(
        tokens=int(row["tokens"]),
        seconds=float(row["seconds"]),
        stopped_early=None if row["stopped_early"] is None else str(row["stopped_early"]),
        error=None if row["error"] is None else str(row["error"]),
        share_seconds=_optional(row, "share"),
        used_seconds=_optional(row, "used"),
        bank_seconds=_optional(row, "bank"),
        cancelled=int(row.get("cancelled", 0)),
        counted=tuple(map(int, row["counted"])) if "counted" in row else None,
    )


def _optional(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None else float(value)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def read_engine(row: dict[str, Any]) -> EngineStats:
    """What :func:`engine_row` wrote."""
    counts = {name: int(row[name]) for name in _ENGINE_COUNTS}
    return EngineStats(
        drafted_row_steps=int(row.get("drafted_row_steps", 0)),
        discarded_row_steps=int(row.get("discarded_row_steps", 0)),
        accepted_by_depth=tuple(int(count) for count in row["accepted_by_depth"]),
        seconds={str(phase): float(seconds) for phase, seconds in row["seconds"].items()},
        **counts,
    )


def engine_row(stats: EngineStats) -> dict[str, Any]:
    """A row of kind ``stats``."""
    return {"kind": "stats", **asdict(stats), "seconds": dict(stats.seconds)}
