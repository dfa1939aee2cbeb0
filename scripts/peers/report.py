"""From the processes' outcomes to a table, notes and one JSON document. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peers.catalogue import Line
from peers.machine import BUSY_SHARE
from peers.ours import FORCED
from peers.run import Attempt, Run
from trtkit.bench.gpu_stages import PUBLISHED_ACCEPTANCE

__all__ = ["Cell", "Row", "cell_text", "document", "notes", "rows_of", "table_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One line at one batch size: medians over the processes, those left alone if there are any."""

    batch: int
    ms_per_step: float
    least_ms: float
    most_ms: float
    tokens_per_second: float
    tokens_per_step: float
    """Per row: 1.0 without a drafter."""
    prefill_ms: float
    processes: int
    """How many count here."""
    disturbed: bool
    """No process was left alone by other programs: the time is too high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    peer: str
    variant: str
    cells: tuple[Cell, ...]
    weight_bytes: int
    load_seconds: float
    import_seconds: float
    peak_rss_bytes: int
    versions: dict[str, str]
    read_fraction: float | None
    """Weight bytes per step at batch 1 over the time of a step, as a share of the memory's read bandwidth."""


def rows_of(run: Run, lines: Sequence[Line]) -> list[Row]:
    """A row for every line with at least one good process, in the order of ``lines``."""
    bandwidth = max(run.read_bytes_per_second, default=None)
    rows = []
    for line in lines:
        found = [a.outcome for a in run.attempts if (a.peer, a.variant) == (line.peer, line.variant) and a.outcome]
        if found:
            rows.append(_row(line, found, bandwidth))
    return rows


def _row(line: Line, found: Sequence[dict[str, Any]], bandwidth: float | None) -> Row:
    points: dict[int, list[dict[str, Any]]] = {}
    for outcome in found:
        for point in outcome["points"]:
            if point["wrong"] is None:
                points.setdefault(point["batch"], []).append(point)
    cells = tuple(_cell(batch, same) for batch, same in sorted(points.items()))
    alone = next((cell for cell in cells if cell.batch == 1), None)
    weights, fraction = found[0]["weight_bytes"], None
    if alone is not None and bandwidth:
        fraction = weights / (alone.ms_per_step / 1e3) / bandwidth
    return Row(
        peer=line.peer, variant=line.variant, cells=cells, weight_bytes=weights, versions=found[0]["versions"],
        load_seconds=statistics.median(outcome["load_seconds"] for outcome in found),
        import_seconds=statistics.median(outcome["import_seconds"] for outcome in found),
        peak_rss_bytes=max(outcome["peak_rss_bytes"] for outcome in found), read_fraction=fraction,
    )  # fmt: skip


def _cell(batch: int, points: Sequence[dict[str, Any]]) -> Cell:
    quiet = [point for point in points if not _is_disturbed(point)]
    counted = quiet or points
    steps = [1e3 * point["decode_seconds"] / point["steps"] for point in counted]
    speeds = [point["decode_tokens"] / point["decode_seconds"] for point in counted]
    per_step = [point["decode_tokens"] / point["steps"] / batch for point in counted]
    return Cell(
        batch=batch, ms_per_step=statistics.median(steps), least_ms=min(steps), most_ms=max(steps),
        tokens_per_second=statistics.median(speeds), tokens_per_step=statistics.median(per_step),
        prefill_ms=1e3 * statistics.median(point["prefill_seconds"] for point in counted), processes=len(counted),
        disturbed=not quiet,
    )  # fmt: skip


def _is_disturbed(point: dict[str, Any]) -> bool:
    share = point["foreign_share"]
    return share is not None and share > BUSY_SHARE


def cell_text(value: float, disturbed: bool) -> str:
    """Three figures, with ``~`` before a disturbed one."""
    text = f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    return f"~{text}" if disturbed else text


def table_rows(rows: Sequence[Row], batches: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: ms per step, then tok/s at each batch, then the facts of the line."""
    headings = ["peer", "variant"]
    headings += [f"ms B={batch}" for batch in batches] + [f"tok/s B={batch}" for batch in batches]
    headings += ["weights MB", "of read", "prefill ms", "load s", "RSS MB"]
    lines = []
    for row in rows:
        cells = {cell.batch: cell for cell in row.cells}
        times = [cell_text(cells[b].ms_per_step, cells[b].disturbed) if b in cells else "-" for b in batches]
        speeds = [cell_text(cells[b].tokens_per_second, cells[b].disturbed) if b in cells else "-" for b in batches]
        lines.append(
            [
                row.peer, row.variant, *times, *speeds, f"{row.weight_bytes / 1e6:,.0f}",
                "-" if row.read_fraction is None else f"{row.read_fraction:.2f}",
                f"{row.cells[0].prefill_ms:,.0f}" if row.cells else "-",
                f"{row.import_seconds + row.load_seconds:.1f}", f"{row.peak_rss_bytes / 1e6:,.0f}",
            ]
        )  # fmt: skip
    return headings, lines


def notes(run: Run, rows: Sequence[Row]) -> list[str]:
    """What the table does not show: lines without a result, wrong runs, disturbed ones."""
    found = [f"not measured  {line}: {reason}" for line, reason in sorted(run.unavailable.items())]
    for attempt in run.attempts:
        for point in attempt.outcome["points"] if attempt.outcome else ():
            if point["wrong"] is not None:
                found.append(
                    f"left out      {attempt.peer}:{attempt.variant} B={point['batch']}, round {attempt.round}: "
                    f"{point['wrong']}"
                )
    disturbed, total = _disturbed_count(run.attempts)
    if disturbed:
        found.append(
            f"disturbed     {disturbed} of {total} timings: other programs took more than {BUSY_SHARE:.0%} of a core; "
            "they count only where no other is left (~)"
        )
    drafting = [row for row in rows if any(cell.tokens_per_step > 1.005 for cell in row.cells)]
    if drafting:
        found.append("drafting      a step yields several tokens per row: compare tok/s, not ms")
    for row in drafting:
        yields = ", ".join(f"{cell.tokens_per_step:.2f} at B={cell.batch}" for cell in row.cells)
        found.append(f"drafting      {row.peer}:{row.variant}: tokens per step and row {yields}")
    if any(FORCED in row.variant for row in rows):
        profile = ", ".join(f"{share:.0%}" for share in PUBLISHED_ACCEPTANCE)
        found.append(
            f"{FORCED[1:]:<14}{FORCED}: draft head with random weights, acceptance forced to the published profile "
            f"({profile} of the steps accept at least 1, 2, 3 drafted tokens, {1 + sum(PUBLISHED_ACCEPTANCE):.2f} "
            "tokens per step); the cost of drafting, verifying and accepting is real"
        )
    return found


def _disturbed_count(attempts: Sequence[Attempt]) -> tuple[int, int]:
    points = [point for attempt in attempts if attempt.outcome for point in attempt.outcome["points"]]
    return sum(map(_is_disturbed, points)), len(points)


def document(run: Run, rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, raw processes included; ``facts`` says what was asked and on which machine."""
    return {
        **facts,
        "read_bytes_per_second": run.read_bytes_per_second,
        "rows": [asdict(row) for row in rows],
        "unavailable": run.unavailable,
        "notes": notes(run, rows),
        "processes": [asdict(attempt) for attempt in run.attempts],
    }
