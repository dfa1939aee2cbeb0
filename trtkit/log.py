"""Logging and progress. Everything here goes to stderr; stdout belongs to results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

__all__ = ["Progress", "format_seconds", "logger", "set_up_logging"]

T = TypeVar("T")

logger = logging.getLogger("trtkit")


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's log to stderr. Called by the command line only, never at import."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s" if verbose else "%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def format_seconds(seconds: float) -> str:
    """``75.2`` -> ``1:15``, ``3.14`` -> ``3.1s``."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Progress with an ETA on stderr: one line redrawn on a terminal, a plain line every few seconds otherwise.

    >>> with Progress("convert", total=48, unit="layers") as progress:
    ...     progress.advance(1, note="int8")
    """

    def __init__(
        self, title: str, *, total: int, unit: str = "", every_seconds: float = 5.0, after_seconds: float = 0.0
    ) -> None:
        """``after_seconds``: nothing is said of work that takes less."""
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self._every = every_seconds
        self._after = after_seconds
        self._tty = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._start
        if seconds < self._after:
            return
        if self._tty:
            sys.stderr.write("\r\x1b[K")
        if kind is None:
            elapsed = format_seconds(seconds)
            self._emit(f"{self.title}: {self.done} {self.unit} in {elapsed}".replace("  ", " "), end="\n")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done."""
        self.done += count
        now = time.monotonic()
        if now - self._start < self._after:
            return
        if now - self._shown < (0.1 if self._tty else self._every) and self.done < self.total:
            return
        if not self._tty and self.done >= self.total:
            return
        self._shown = now
        left = (now - self._start) / max(self.done, 1) * max(self.total - self.done, 0)
        counted = f"{self.done}/{self.total} {self.unit}".rstrip()
        text = f"{self.title}: {counted}, {format_seconds(left)} left"
        text += f"  {note}" if note else ""
        self._emit(f"\r\x1b[K{text}" if self._tty else text, end="" if self._tty else "\n")

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, counting each when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    @staticmethod
    def _emit(text: str, *, end: str) -> None:
        if logger.isEnabledFor(logging.INFO):
            sys.stderr.write(text + end)
            sys.stderr.flush()
