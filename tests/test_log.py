from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from trtkit.log import Progress, format_seconds, logger, set_up_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The package's log as other tests expect it."""
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


class Clock:
    """A clock that a test turns, in place of ``time.monotonic``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("trtkit.log.time.monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.97, "1:00"), (3.14, "3.1s"), (60, "1:00"), (75.2, "1:15"), (3599.7, "1:00:00"), (7505, "2:05:05")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging()
    clock = Clock(monkeypatch)
    with Progress("convert", total=5, unit="layers") as progress:
        for seconds in (1.0, 5.0, 2.0, 12.0):
            clock.now += seconds
            progress.advance(note="int8")
    assert capsys.readouterr().err.splitlines() == [
        "convert: 2/5 layers, 9.0s left  int8",  # 6 seconds for the first two
        "convert: 4/5 layers, 5.0s left  int8",
        "convert: 4 layers in 20.0s",
    ]


def test_progress_on_a_terminal_is_one_line_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_logging()
    clock, terminal = Clock(monkeypatch), Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("convert", total=3) as progress:
        for seconds in (0.2, 0.05, 0.05):  # the second is too soon, the last one is shown all the same
            clock.now += seconds
            progress.advance()
    drawn = terminal.getvalue().split("\r\x1b[K")
    assert drawn == ["", "convert: 1/3, 0.4s left", "convert: 3/3, 0.0s left", "convert: 3 in 0.3s\n"]


def test_progress_says_nothing_at_the_end_of_work_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging()
    clock = Clock(monkeypatch)

    def work() -> Iterator[int]:
        for place in range(4):
            if place == 1:
                raise OSError("full")
            clock.now += 9.0
            yield place

    with pytest.raises(OSError, match="full"), Progress("convert", total=4) as progress:
        list(progress.track(work()))
    assert capsys.readouterr().err == "convert: 1/4, 27.0s left\n"


def test_short_work_says_nothing_and_the_last_step_no_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging()
    clock = Clock(monkeypatch)

    def work() -> list[str]:
        with Progress("read", total=3, unit="files", every_seconds=2.0, after_seconds=10.0) as progress:
            seen = []
            for name in progress.track(["a", "b", "c"]):
                clock.now += each
                seen.append(name)
            return seen

    each = 3.0
    assert work() == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    each = 6.0
    work()
    assert capsys.readouterr().err.splitlines() == ["read: 2/3 files, 6.0s left", "read: 3 files in 18.0s"]


@pytest.mark.parametrize(
    ("how", "shown"),
    [({}, ["info", "warning"]), ({"quiet": True}, ["warning"]),
     ({"verbose": True}, ["DEBUG debug", "INFO info", "WARNING warning"])],
)  # fmt: skip
def test_how_much_is_said(
    how: dict[str, bool], shown: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(**how)
    for level in ("debug", "info", "warning"):
        logger.log(getattr(logging, level.upper()), level)
    assert capsys.readouterr().err.splitlines() == shown
    clock = Clock(monkeypatch)
    with Progress("convert", total=2) as progress:
        clock.now += 9.0
        progress.advance()
    assert bool(capsys.readouterr().err) is not bool(how.get("quiet"))
