from __future__ import annotations

from collections.abc import Sequence

import pytest

from trtkit.report.charts import Chart, Series, Tick, chart


def curve(series: Sequence[Series], **more: bool) -> Chart:
    drawn = chart("", series, x_label="", y_label="", note="", **more)
    assert drawn is not None
    return drawn


def read_off(ticks: Sequence[Tick], at: float) -> float:
    """The value at a place in the drawing, as a reader finds it: by the labels of the axis."""
    first, last = ticks[0], ticks[-1]
    low, high = (float(tick.label.rstrip("%").replace(",", "")) for tick in (first, last))
    return low + (at - first.at) / (last.at - first.at) * (high - low)


def places(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in text.split())]


@pytest.mark.parametrize("most", [1, 2, 9, 24, 100])
def test_an_axis_of_samples_has_whole_numbers_that_are_there(most: int) -> None:
    points = [(float(k), 0.5) for k in range(1, most + 1)]
    drawn = curve([Series(name="", points=points)], percent=True, whole_x=True)
    shown = [int(tick.label) for tick in drawn.x_ticks]
    assert shown[0] == 1
    assert shown == sorted(set(shown))
    assert shown[-1] <= most


def test_what_is_drawn_can_be_read_off_the_axes() -> None:
    values, band = [0.25, 0.5, 0.75], [0.125, 0.0625, 0.25]
    points = [(float(k), value) for k, value in enumerate(values, start=1)]
    drawn = curve([Series(name="", points=points, band=band)], percent=True, whole_x=True)
    [one] = drawn.series
    line, around = places(one.line), places(one.band)
    assert [read_off(drawn.x_ticks, x) for x, _ in line] == pytest.approx([1, 2, 3], abs=0.01)
    assert [read_off(drawn.y_ticks, y) for _, y in line] == pytest.approx([25, 50, 75], abs=0.1)
    assert [read_off(drawn.x_ticks, x) for x, _ in around] == pytest.approx([1, 2, 3, 3, 2, 1], abs=0.01)
    bounds = [37.5, 56.25, 100, 50, 43.75, 12.5]  # there above the line and back below it
    assert [read_off(drawn.y_ticks, y) for _, y in around] == pytest.approx(bounds, abs=0.1)


def test_two_lines_share_their_axes() -> None:
    long, short = [(0.5, 900.0), (80.0, 1700.0)], [(3.0, 40.0)]
    drawn = curve(
        [Series(name="long", points=long), Series(name="none", points=[]), Series(name="short", points=short)]
    )
    found = {
        one.name: [(read_off(drawn.x_ticks, x), read_off(drawn.y_ticks, y)) for x, y in places(one.line)]
        for one in drawn.series
    }
    assert found.keys() == {"long", "short"}
    for name, points in (("long", long), ("short", short)):
        for seen, meant in zip(found[name], points, strict=True):
            assert seen == pytest.approx(meant, abs=2), name


@pytest.mark.parametrize("most", [0.1, 90.0, 18_000.0, 123_456.0, 12_345_678.0])
def test_labels_have_room_beside_the_axis(most: float) -> None:
    drawn = curve([Series(name="", points=[(0.0, 0.0), (1.0, most)])])
    widest = 19 * 0.56 * max(len(tick.label) for tick in drawn.y_ticks)  # as large as a narrow screen has them
    assert widest + 8 <= drawn.left
    assert read_off(drawn.x_ticks, drawn.left) == pytest.approx(0.0)
