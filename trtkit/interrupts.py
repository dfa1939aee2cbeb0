"""A process that is asked to end goes the way of Ctrl-C, so that whatever cleans up behind itself does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["sigterm_as_interrupt"]


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise ``KeyboardInterrupt`` inside the block, and SIGHUP, which a lost connection sends, unless it is
    ignored (nohup). Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # the kernel and the shell both send one, and nobody meant two
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: installed from C, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
