"""The picture of ``trtkit revote``: accuracy against tokens, one line per rule, one point per number of samples."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkit.errors import MissingDependency, OutputError
from trtkit.solve.tradeoff import Tradeoff

__all__ = ["draw_trade_offs", "need_matplotlib"]

_APART = 28.0
"""Pixels: numbers at points that are nearer lie on each other."""


def need_matplotlib() -> Any:
    """The module ``matplotlib.pyplot`` on a canvas without a screen. Raises :class:`MissingDependency`."""
    try:
        import matplotlib
    except ImportError:
        raise MissingDependency(
            "--png needs matplotlib, which is not installed",
            hint="pip install 'trtkit[report]', or leave --png out: the table and --json say the same",
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_trade_offs(rows: Sequence[Tradeoff], path: Path) -> None:
    """Write the PNG. Rows without accuracy are left out. Raises :class:`OutputError`."""
    plt = need_matplotlib()
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(8, 5), dpi=140)
    markers = "osD^vPX*"
    places: list[tuple[float, float, int]] = []
    for number, rule in enumerate(dict.fromkeys(row.rule for row in rows)):
        points = [(row, row.accuracy) for row in rows if row.rule == rule and row.accuracy is not None]
        tokens = [row.tokens.value / row.problems for row, _ in points]
        values = [100 * accuracy.value for _, accuracy in points]
        axes.plot(tokens, values, marker=markers[number % len(markers)], label=rule, alpha=0.85)
        places += [(spent, value, row.samples) for spent, value, (row, _) in zip(tokens, values, points, strict=True)]
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = high / low >= 5  # every whole multiple would lie on the next one's label
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else range(1, 10)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(labelsize=8)
    axes.set_xlabel("tokens per problem (log scale); the small numbers are samples per problem")
    axes.set_ylabel("accuracy of the vote, %")
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=8)
    figure.tight_layout()
    _number(axes, places)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fonts that lack a glyph of a rule's name
        figure.savefig(picture, format="png")
    plt.close(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    except OSError as problem:
        raise OutputError(f"cannot be written: {problem.strerror or problem}", where=str(path)) from None


def _number(axes: Any, places: Sequence[tuple[float, float, int]]) -> None:
    """Write the number of samples at its points, once where several rules meet."""
    written: list[tuple[float, float]] = []
    for spent, value, samples in places:
        x, y = axes.transData.transform((spent, value))
        if all(abs(x - left) > _APART or abs(y - high) > _APART for left, high in written):
            axes.annotate(
                str(samples), (spent, value), textcoords="offset points", xytext=(4, -10), fontsize=7, color="0.35"
            )
            written.append((x, y))
