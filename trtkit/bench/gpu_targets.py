"""What the figures of ``scripts/gpu_bench`` should reach, and the table that says whether they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["goals", "lines"]

COPY_SHARE = {"bf16": 0.90, "int8": 0.85, "fp8": 0.85, "int4": 0.75}
"""Of a copy's bandwidth, one row."""
OVER_BF16 = {"fp8": 1.7, "int4": 2.2}
"""Tokens per second of 12 rows against bf16."""
DRAFT_OVER_BF16 = 3.2
"""The same for fp8 with a draft head."""


def _point(
    points: Sequence[Mapping[str, Any]], precision: str, rows: int, *, overlap: bool | None = None,
    kv_dtype: str = "model",
) -> Mapping[str, Any] | None:  # fmt: skip
    """A point without a drafter; with ``overlap`` None as the engine runs by default, where that was measured."""
    if overlap is None:
        ahead = _point(points, precision, rows, overlap=True, kv_dtype=kv_dtype)
        return ahead or _point(points, precision, rows, overlap=False, kv_dtype=kv_dtype)
    wanted = (precision, rows, None, overlap, kv_dtype)
    fields = ("precision", "rows", "tree", "overlap", "kv_dtype")
    return next((p for p in points if tuple(p[field] for field in fields) == wanted), None)


def goals(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target whose figure was measured: name, value, target, met."""
    points = document["points"]
    found: list[tuple[str, float, float]] = []
    for precision, least in COPY_SHARE.items():
        if (point := _point(points, precision, 1)) is not None:
            found.append((f"{precision}, 1 row: share of copy bandwidth", point["copy_fraction"], least))
    base = _point(points, "bf16", 12)
    if base is not None:
        speed = base["tokens_per_second"]
        for precision, least in OVER_BF16.items():
            if (point := _point(points, precision, 12)) is not None:
                ratio = point["tokens_per_second"] / speed
                found.append((f"{precision}, 12 rows: times bf16", ratio, least))
        if (point := _point(points, "fp8", 12, kv_dtype="fp8")) is not None:
            ratio = point["tokens_per_second"] / speed
            found.append(("fp8, its keys and values too, 12 rows: times bf16", ratio, OVER_BF16["fp8"]))
        drafted = {point["draft_vocabulary"]: point for point in points if point["tree"] is not None}  # the last: ahead
        for vocabulary, point in drafted.items():
            name = f"fp8 + draft head of {vocabulary} tokens, 12 rows: times bf16"
            found.append((name, point["tokens_per_second"] / speed, DRAFT_OVER_BF16))
    for precision in COPY_SHARE:
        plain, ahead = (_point(points, precision, 12, overlap=overlap) for overlap in (False, True))
        if plain is not None and ahead is not None:
            ratio = ahead["tokens_per_second"] / plain["tokens_per_second"]
            found.append((f"{precision}, 12 rows: overlap, times without", ratio, 1.0))
    peers = document.get("transformers", {}).get("figures", [])
    one = _point(points, "bf16", 1)
    for peer in peers if one is not None else []:
        name = f"bf16, 1 row: times transformers, {'compiled' if peer['compiled'] else 'step by step'}"
        found.append((name, one["tokens_per_second"] / peer["tokens_per_second"], 1.0))  # type: ignore[index]
    return [{"name": name, "value": value, "target": target, "met": value >= target} for name, value, target in found]


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield ""
    heads = f"{'precision':9} {'rows':>4} {'context':>7} {'kv':>5} {'tree':>5} {'tok/s':>9} {'ms/step':>8}"
    yield f"{heads} {'of copy':>7}  phases (ms)"
    for p in (*document["points"], *document.get("shared_points", [])):
        phases = "  ".join(f"{name} {ms:.2f}" for name, ms in p.get("phase_ms", {}).items())
        note = "  forced acceptance, not a model's" if p["tree"] is not None else ""
        note += "  with overlap" if p["overlap"] else ""
        note += f"  over {p['ranks']} processes" if "ranks" in p else ""
        yield (
            f"{p['precision']:9} {p['rows']:4} {p['context']:7} {p['kv_dtype']:>5} {p['tree'] or '-':>5} "
            f"{p['tokens_per_second']:9.1f} {p['step_ms']:8.2f} {p['copy_fraction']:7.2f}  {phases}{note}"
        )
    for peer in document.get("transformers", {}).get("figures", []):
        kind = "compiled, static cache" if peer["compiled"] else "static cache"
        yield f"transformers generate, {kind}, bf16, 1 row: {peer['tokens_per_second']:.1f} tok/s"
    yield ""
    for goal in document["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        yield f"{verdict:6} {goal['value']:6.2f} (target {goal['target']:.2f})  {goal['name']}"
    for stage, why in document["failures"].items():
        yield f"not measured: {stage}: {why}"
