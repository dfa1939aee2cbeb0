"""The pipes between the solver and the process that runs code: JSON lines both ways, and nothing that waits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import trtkit
from trtkit.errors import TrtkitError
from trtkit.solve.sandbox_folder import clear_folder

__all__ = ["Link", "open_link"]

_STARTUP_SECONDS = 300.0
_DYING_SECONDS = 20.0
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


class Link:
    """A process that was started by :func:`open_link`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._unsent = b""
        self._received = b""
        self.greeting: dict[str, Any] = {}
        """What it said first."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def send(self, command: Mapping[str, Any]) -> None:
        """Have ``command`` sent, as soon as the pipe takes it."""
        self._unsent += (json.dumps(command) + "\n").encode()
        self._flush()

    def receive(self, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """The lines that have come, after waiting up to ``seconds`` for something; and whether more may follow."""
        self._flush()
        stream = _pipe(self._process.stdout).fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(max(0.0, seconds)):
                return [], True
        more = True
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(stream, 65536):
                self._received += piece
            more = False
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines], more

    def greet(self) -> None:
        """Wait until it is ready. Raises :class:`TrtkitError` when it is not in time."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        lines: list[dict[str, Any]] = []
        more = True
        while more and not lines and time.monotonic() < deadline:
            lines, more = self.receive(deadline - time.monotonic())
        if not lines:
            raise TrtkitError("the process that runs code did not start", hint="try `python -c 'import sympy'`")
        self.greeting = lines[0]

    def end(self) -> None:
        """End the process; the end of its stdin makes it kill what it runs and clear up."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            _pipe(pipe).close()
        try:
            process.wait(_DYING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if "home" in self.greeting:
            clear_folder(self.greeting["home"])

    def _flush(self) -> None:
        if self._unsent:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                self._unsent = self._unsent[os.write(_pipe(self._process.stdin).fileno(), self._unsent) :]


def open_link(config: Mapping[str, Any]) -> Link:
    """Start sandbox_child.py with ``config`` and wait until it is ready."""
    home = Path(trtkit.__file__).resolve().parent.parent
    # What lies beside a checkout is nobody's library.
    hidden = [str(home)] if (home / "pyproject.toml").exists() else []
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-m", "trtkit.solve.sandbox_child", json.dumps({**config, "hidden": hidden})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=_environment(str(home)),
        cwd="/",
        start_new_session=True,  # Ctrl-C is for us, not for it
    )
    for pipe in (process.stdin, process.stdout):
        number = _pipe(pipe).fileno()
        os.set_blocking(number, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(number, _F_SETPIPE_SZ, _PIPE_BYTES)
    link = Link(process)
    try:
        link.greet()
    except BaseException:
        process.kill()
        link.end()
        raise
    return link


def _environment(home: str) -> dict[str, str]:
    """Nothing of ours but what it takes to find the interpreter's libraries and this package."""
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    # Equal code must print equal text: sets of strings keep their order.
    return {**inherited, **one_thread, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
