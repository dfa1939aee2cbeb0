"""The place that a server listens at, and the HTTP server itself, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from trtkit.errors import OutputError, UsageError

__all__ = ["HttpServer", "bound_socket"]

_LAST_WORDS_SECONDS = 3
"""How long open connections may take to end after a signal; a second signal ends them at once."""
_GOODBYE_SECONDS = 2
"""How long those may take that were told to end then, before they are cut off."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening place, taken before anything is loaded. ``port`` 0 takes a free one.

    Raises :class:`UsageError` for a host that there is not, :class:`OutputError` where the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as problem:
        raise UsageError(f"--host {host!r}: {problem}", hint="127.0.0.1, or 0.0.0.0 for other machines") from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as problem:
        listening.close()
        reason = problem.strerror or str(problem)
        raise OutputError(f"cannot listen there: {reason}", where=f"{host}:{port}", hint="try --port 0") from None
    return listening


class HttpServer(uvicorn.Server):
    """Serves an application until a signal, or ``until`` is set. The program goes on after it."""

    def __init__(
        self, app: FastAPI, *, on_ready: Callable[[], None], on_overtime: Callable[[], None] = lambda: None,
        until: threading.Event | None = None,
    ) -> None:  # fmt: skip
        """``on_ready`` is called once, when requests are taken; ``on_overtime`` where some are still under way when
        their time is up, to end them. It must not block."""
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off",
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS + _GOODBYE_SECONDS,
            )
        )  # fmt: skip
        self._on_ready = on_ready
        self._on_overtime = on_overtime
        self._until = until
        self._hurry: Callable[[], object] | None = None
        """Ends what is under way, from a signal's handler."""

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        return await super().on_tick(counter) or (self._until is not None and self._until.is_set())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn's own way, to cancel them, gives clients no words and the log a traceback for each of them.
        loop = asyncio.get_running_loop()
        overtime = loop.call_later(_LAST_WORDS_SECONDS, self._on_overtime)
        self._hurry = partial(loop.call_soon_threadsafe, self._on_overtime)
        try:
            await super().shutdown(sockets)
        finally:
            overtime.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends what is under way at once; one more after it waits for nothing."""
        hurry, self._hurry = self._hurry, None
        if hurry is None:
            super().handle_exit(sig, frame)
        else:
            hurry()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the program with the same signal once more."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
