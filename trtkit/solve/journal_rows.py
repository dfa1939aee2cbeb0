"""Records of the journal, both ways: ``Attempt``, ``Solution`` and the engine's counters as plain rows.

Fields that were added later are optional when reading. The readers raise ValueError, KeyError or TypeError for what is
no whole record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trtkit.runtime.api import EngineStats, FinishReason
from trtkit.solve.ends import Ending, Probe
from trtkit.solve.records import Attempt, Solution

__all__ = [
    "DAMAGE", "Settled", "amount", "attempt_row", "count", "counted", "engine_row", "number", "optional_amount",
    "parse_line", "read_attempt", "read_engine", "read_settled", "solution_row", "what_is_wrong", "whole",
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
    told: frozenset[str] = frozenset()
    """Answers that were counted as different ones."""


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
        "probes": list(map(list, attempt.probes)) or None,
        "used": _rounded(attempt.used_seconds),
        "text": attempt.text,
    }
    return row | {name: value for name, value in optional.items() if value is not None}


def read_attempt(row: dict[str, Any]) -> Attempt:
    """What :func:`attempt_row` wrote."""
    return Attempt(
        problem_id=str(row["problem"]),
        index=count(row, "index"),
        variant=str(row["variant"]),
        tokens=count(row, "tokens"),
        finish=FinishReason(row["finish"]),
        box=None if row["box"] is None else str(row["box"]),
        seconds=amount(row, "seconds"),
        text=None if row.get("text") is None else str(row["text"]),
        ending=None if row.get("ending") is None else Ending(row["ending"]),
        forced=bool(row.get("forced", False)),
        confidence=None if row.get("confidence") is None else number(row["confidence"], "confidence"),
        tool_calls=count(row, "tool_calls", 0),
        probes=tuple(_probe(probe) for probe in row.get("probes") or ()),
        used_seconds=optional_amount(row, "used"),
    )


def _probe(row: Any) -> Probe:
    at, tokens, box = row
    return Probe(int(at), int(tokens), None if box is None else str(box))


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
        tokens=count(row, "tokens"),
        seconds=amount(row, "seconds"),
        stopped_early=None if row["stopped_early"] is None else str(row["stopped_early"]),
        error=None if row["error"] is None else str(row["error"]),
        share_seconds=optional_amount(row, "share"),
        used_seconds=optional_amount(row, "used"),
        bank_seconds=optional_amount(row, "bank"),
        cancelled=count(row, "cancelled", 0),
        counted=counted(row),
        told=frozenset(str(key) for key, _ in row.get("votes") or ()),
    )


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a line raises that is no whole record."""


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of a journal. Raises one of ``DAMAGE``."""
    row = json.loads(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise TypeError("no JSON object")
    return row


def what_is_wrong(problem: Exception) -> str:
    """One of ``DAMAGE`` in words."""
    if isinstance(problem, KeyError):
        return f"no {problem}"
    if isinstance(problem, json.JSONDecodeError):
        return f"not valid JSON: {problem.msg}"
    return str(problem)


def count(row: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number from 0 up; ``default`` where there is one and the row has none. Raises one of ``DAMAGE``."""
    value = row[name] if default is None else row.get(name)
    return default if value is None and default is not None else whole(value, name)


def counted(row: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Indices of the counted samples of a ``solution`` row; None in older journals. Raises one of ``DAMAGE``."""
    indices = row.get("counted")
    return None if indices is None else tuple(whole(index, "counted") for index in indices)


def amount(row: Mapping[str, Any], name: str) -> float:
    """A finite number from 0 up. Raises one of ``DAMAGE``."""
    found = number(row[name], name)
    if found < 0:
        raise ValueError(f"{name}: negative: {found:g}")
    return found


def whole(value: Any, name: str) -> int:
    """``value`` as a whole number from 0 up. Raises one of ``DAMAGE``, which says ``name``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: expected a whole number from 0 up, found {value!r}"[:200])
    return value


def number(value: Any, name: str) -> float:
    """``value`` as a finite number. Raises one of ``DAMAGE``, which says ``name``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, found {value!r}"[:200])
    return float(value)


def optional_amount(row: Mapping[str, Any], name: str) -> float | None:
    """Like :func:`amount`; None where the row has none."""
    return None if row.get(name) is None else amount(row, name)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def read_engine(row: dict[str, Any], *, lenient: bool = False) -> EngineStats:
    """What :func:`engine_row` wrote. ``lenient``: only the counters of tokens and row-steps must be there."""
    optional = set(_ENGINE_COUNTS) - {"new_tokens", "row_steps"} if lenient else set()
    phases = row["seconds"]
    if not isinstance(phases, Mapping):
        raise TypeError(f"seconds: expected a table, found {phases!r}"[:200])
    return EngineStats(
        drafted_row_steps=count(row, "drafted_row_steps", 0),
        discarded_row_steps=count(row, "discarded_row_steps", 0),
        accepted_by_depth=tuple(whole(accepted, "accepted_by_depth") for accepted in row["accepted_by_depth"]),
        seconds={str(phase): amount(phases, phase) for phase in phases},
        **{name: count(row, name, 0 if name in optional else None) for name in _ENGINE_COUNTS},
    )


def engine_row(stats: EngineStats) -> dict[str, Any]:
    """A row of kind ``stats``."""
    return {"kind": "stats", **asdict(stats), "seconds": dict(stats.seconds)}
