"""Numbers -> positions inside an SVG of fixed view box. The template draws what stands here; nothing else computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Chart", "Drawn", "Series", "Tick", "chart", "ticks"]

_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 38.0, 52.0
_GAP, _DIGIT = 8.0, 11.0
"""Between the axis and its labels, and the width of one character of them on a narrow screen."""
_FEW = 24
"""Up to this many points each is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. ``band`` is half the height of the band around it at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[float] = ()
    place: int = 0
    """Which colour and dash it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A grid line and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A series in SVG coordinates."""

    name: str
    place: int
    line: str
    band: str
    dots: tuple[tuple[str, str, str], ...]
    """(x, y, what the point says)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A finished drawing."""

    title: str
    note: str
    x_label: str
    y_label: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Drawn, ...]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    note: str,
    percent: bool = False,
    whole_x: bool = False,
) -> Chart | None:
    """A line chart with its axes; None without any point. ``percent``: y is 0..1 and is labelled in percent."""
    series = [one for one in series if one.points]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    tops = [
        y + half for one in series for (_, y), half in zip(one.points, one.band or [0.0] * len(one.points), strict=True)
    ]
    x_low, x_high = (min(xs), max(xs)) if whole_x else (0.0, max(xs))
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_low + 0.5
    y_high = 1.0 if percent else max(ticks(0.0, max(tops) or 1.0, 5)[-1], max(tops))
    y_ticks = [(value, f"{value:.0%}" if percent else f"{value:,g}") for value in ticks(0.0, y_high, 5)]
    left = max(_LEFT, _GAP + _DIGIT * max(len(label) for _, label in y_ticks))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y: float) -> float:
        return bottom - min(max(y / y_high, 0.0), 1.0) * (bottom - _TOP)

    def drawn(one: Series) -> Drawn:
        places = [(across(x), up(y)) for x, y in one.points]
        upper = [(across(x), up(y + half)) for (x, y), half in zip(one.points, one.band, strict=False)]
        lower = [(across(x), up(y - half)) for (x, y), half in zip(one.points, one.band, strict=False)]
        said = [
            f"{one.name}: {x:g} {x_label}, {y:.1%}" if percent else f"{one.name}: {x:.1f} s, {y:,.1f}"
            for x, y in one.points
        ]
        dots = tuple((f"{x:.1f}", f"{y:.1f}", text) for (x, y), text in zip(places, said, strict=True))
        return Drawn(
            name=one.name,
            place=one.place,
            line=_path(places),
            band=_path([*upper, *reversed(lower)]) if len(upper) > 1 else "",
            dots=dots if len(dots) <= _FEW else (),
        )

    x_ticks = [value for value in ticks(x_low, x_high, 7) if not whole_x or value == int(value)]
    first = min(xs)  # not x_low: around a single point the axis begins half a step before it
    if whole_x and first not in x_ticks and (not x_ticks or across(x_ticks[0]) - across(first) > 24):
        x_ticks = [first, *x_ticks]
    return Chart(
        title=title,
        note=note,
        x_label=x_label,
        y_label=y_label,
        width=_WIDTH,
        height=_HEIGHT,
        left=left,
        right=right,
        top=_TOP,
        bottom=bottom,
        x_ticks=tuple(
            Tick(at=round(across(value), 1), label=f"{value:,g}") for value in x_ticks if x_low <= value <= x_high
        ),
        y_ticks=tuple(Tick(at=round(up(value), 1), label=label) for value, label in y_ticks),
        series=tuple(map(drawn, series)),
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) from ``low`` to at least ``high`` in at most ``most`` + 1 steps."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, last + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
