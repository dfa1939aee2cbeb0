"""The process that runs code for the solver: ``python -m trtkit.solve.sandbox_child CONFIG``.

A fork server: it imports numpy and sympy once, and forks a keeper (sandbox_run.py) for each call, so that a call starts
in milliseconds and inherits nothing of the solver. It never runs foreign code itself.

One JSON object per line on stdin, ``{"call", "blocks"}`` or ``{"drop"}``; on stdout first ``{"ready", ...}`` with what
the walls were found to hold, then one ``{"call", "status", ...}`` per call. The end of stdin ends it and all calls.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import selectors
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from trtkit.solve.sandbox_folder import clear_folder
from trtkit.solve.sandbox_jail import LAYERS, Jail, readable_places
from trtkit.solve.sandbox_probe import Findings, probe
from trtkit.solve.sandbox_run import ENDED, FAILED, Pipes, keep

__all__ = ["main"]

PACKAGES = ("numpy", "sympy", "mpmath", "gmpy2")
"""What the code may import beside the standard library, where it is installed."""
_PRELOADED = (*PACKAGES, "numpy.random", "numpy.linalg", "sympy.core.random", "fractions", "decimal", "statistics")
_SET_UP_SECONDS = 60.0
"""For building the walls, on a machine that is busy with other things."""
_DYING_SECONDS = 5.0
_CHUNK_BYTES = 65536


@dataclass(slots=True)
class _Call:
    """A call that runs."""

    name: str
    keeper: int
    folder: str
    earlier: int
    cpu_seconds: int
    deadline: float
    began: float
    pipes: dict[str, int]
    """Reading ends that are still open: output, errors, go, report."""
    received: dict[str, bytearray] = field(default_factory=lambda: {"output": bytearray(), "errors": bytearray()})
    report: bytearray = field(default_factory=bytearray)
    locked: bool = False
    started: bool = False
    """The block in question ran, not only those before it."""
    stopped: str | None = None
    """Why it was stopped: ``timeout``, ``cut``, ``dropped``; None while it may run."""


class Server:
    """The event loop. Nothing here blocks."""

    def __init__(self, config: dict[str, Any], jail: Jail, home: str, channel: IO[str]) -> None:
        self._jail = jail
        self._home = home
        self._channel = channel
        self._seconds: float = config["seconds"]
        self._most_bytes: int = config["output_bytes"]
        self._workers: int = config["workers"]
        self._waiting: deque[tuple[str, list[str]]] = deque()
        self._running: dict[str, _Call] = {}
        self._selector = selectors.DefaultSelector()
        self._commands = b""
        self._open = True

    def serve(self) -> None:
        """Run calls until stdin ends, and take those that still run along."""
        os.set_blocking(0, False)
        self._selector.register(0, selectors.EVENT_READ, None)
        while self._open:
            for result in self._turn():
                self._channel.write(json.dumps(result) + "\n")
            self._channel.flush()
        for call in list(self._running.values()):
            _kill(call.keeper)

    def attempt(self, layers: tuple[str, ...], block: str) -> tuple[str, str]:
        """Run a block inside ``layers`` and wait for it: its status, and what it printed or why it could not run."""
        self._jail = replace(self._jail, layers=layers)
        self._start("attempt", [block])
        while True:
            for result in self._turn():
                return result["status"], result["output"] or result["reason"] or result["errors"]

    def close(self) -> None:
        """Give the selector back."""
        self._selector.close()

    def _turn(self) -> list[dict[str, Any]]:
        """Wait for the next event and act on it; the calls that ended."""
        while self._waiting and len(self._running) < self._workers:
            name, blocks = self._waiting.popleft()
            self._start(name, blocks)
        deadline = min((call.deadline for call in self._running.values()), default=None)
        pause = None if deadline is None else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(pause):
            if key.data is None:
                self._read_commands()
            else:
                self._read(*key.data)
        now = time.monotonic()
        for call in self._running.values():
            if now >= call.deadline:
                self._stop(call, "timeout")
        return [self._finish(call) for call in list(self._running.values()) if "report" not in call.pipes]

    def _read_commands(self) -> None:
        try:
            piece = os.read(0, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not piece:
            self._open = False
        *lines, self._commands = (self._commands + piece).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "drop" in command:
                self._drop(command["drop"])
            else:
                self._waiting.append((command["call"], command["blocks"]))

    def _drop(self, name: str) -> None:
        self._waiting = deque(each for each in self._waiting if each[0] != name)
        if name in self._running:
            self._stop(self._running[name], "dropped")

    def _start(self, name: str, blocks: list[str]) -> None:
        ends = {kind: os.pipe() for kind in ("output", "errors", "go", "report")}
        folder = tempfile.mkdtemp(dir=self._home)
        now = time.monotonic()
        jail = replace(self._jail, cpu_seconds=math.ceil(self._seconds * len(blocks)))
        server = os.getpid()
        keeper = os.fork()
        if keeper == 0:
            keep(jail, folder, blocks, Pipes(**{kind: end[1] for kind, end in ends.items()}), server)
        pipes = {}
        for kind, (read, write) in ends.items():
            os.close(write)
            os.set_blocking(read, False)
            pipes[kind] = read
        call = _Call(
            name=name,
            keeper=keeper,
            folder=folder,
            earlier=len(blocks) - 1,
            cpu_seconds=jail.cpu_seconds,
            deadline=now + _SET_UP_SECONDS,
            began=now,
            pipes=pipes,
        )
        for kind, read in pipes.items():
            self._selector.register(read, selectors.EVENT_READ, (call, kind))
        self._running[name] = call

    def _read(self, call: _Call, kind: str) -> None:
        pipe = call.pipes.get(kind)
        if pipe is None:
            return
        try:
            piece = os.read(pipe, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not piece:
            self._close(call, kind)
            if kind == "go" and call.locked and call.stopped is None:
                call.began = time.monotonic()
                call.deadline = call.began + self._seconds
        elif kind == "go":
            call.started = True
        elif kind == "report":
            call.report += piece
            if not call.locked and b'"locked"' in call.report:
                call.locked = True
                call.deadline = time.monotonic() + self._seconds * max(1, call.earlier)
        elif kind in call.received:
            call.received[kind] += piece[: self._most_bytes + 1 - len(call.received[kind])]
            if len(call.received[kind]) > self._most_bytes:
                self._stop(call, "cut")  # nothing that it does from here on could be seen

    def _close(self, call: _Call, kind: str) -> None:
        pipe = call.pipes.pop(kind)
        self._selector.unregister(pipe)
        os.close(pipe)

    def _stop(self, call: _Call, why: str) -> None:
        """Ask the keeper to kill the call; when it was asked before and still lives, kill the keeper."""
        number = signal.SIGTERM if call.stopped is None else signal.SIGKILL
        if call.stopped is None or why == "timeout":
            with contextlib.suppress(ProcessLookupError):
                os.kill(call.keeper, number)
            call.deadline = time.monotonic() + _DYING_SECONDS
        call.stopped = call.stopped or why

    def _finish(self, call: _Call) -> dict[str, Any]:
        """All processes of the call are gone: what is still in the pipes, and the verdict."""
        seconds = time.monotonic() - call.began
        for kind in ("output", "errors", "go"):
            while kind in call.pipes:
                before = len(call.received.get(kind, b""))
                self._read(call, kind)
                if kind in call.pipes and len(call.received.get(kind, b"")) == before:
                    self._close(call, kind)
        os.waitpid(call.keeper, 0)
        clear_folder(call.folder)
        del self._running[call.name]
        status, reason = _verdict(call)
        texts = {kind: bytes(data).decode("utf-8", "replace") for kind, data in call.received.items()}
        told = {"call": call.name, "status": status, "reason": reason, "seconds": seconds, "started": call.started}
        return {**told, **texts}


def _verdict(call: _Call) -> tuple[str, str]:
    rows: list[dict[str, Any]] = []
    for line in bytes(call.report).splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    broken = next((row["broken"] for row in rows if "broken" in row), None)
    if broken is not None:
        return "broken", broken
    if not call.locked:
        return ("dropped" if call.stopped == "dropped" else "broken"), "it did not start in time"
    if call.stopped is not None:
        return call.stopped, ""
    end = next((row for row in rows if "exit" in row), None)
    if end is None:
        return "killed", "the process that kept it is gone"
    code = end["exit"]
    if code == -signal.SIGKILL and end["cpu_seconds"] > call.cpu_seconds - 0.5:
        return "timeout", ""
    if code < 0:
        return "killed", signal.Signals(-code).name
    if code not in (ENDED, FAILED):
        return "killed", f"it ended Python itself, with exit code {code}"
    return ("ok" if code == ENDED else "error"), ""


def _kill(keeper: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(keeper, 0)


def _address_bytes() -> int:
    """Address space that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """Answer calls on stdin until it closes."""
    config = json.loads(sys.argv[1])
    # Whatever a library writes to stdout must not end up between our answers.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    home = tempfile.mkdtemp(prefix="trtkit-sandbox-", dir=config["temporary"])
    try:
        server, findings = _prepare(config, home, channel)
        channel.write(json.dumps({"ready": True, "home": home, **asdict(findings)}) + "\n")
        channel.flush()
        server.serve()
    finally:
        clear_folder(home)


def _prepare(config: dict[str, Any], home: str, channel: IO[str]) -> tuple[Server, Findings]:
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    readable = readable_places(PACKAGES)
    sys.path[:] = [place for place in sys.path if place not in config["hidden"]]
    sys.argv[:] = [""]
    os.environ.clear()
    gc.collect()
    gc.freeze()  # the children share what is here instead of copying it when they collect
    jail = Jail(layers=(), readable=readable, address_bytes=_address_bytes() + config["memory_bytes"], cpu_seconds=1)
    # The self-test must not fail because the machine is slow, nor because its few words are too many.
    trial = {**config, "seconds": _SET_UP_SECONDS, "output_bytes": _CHUNK_BYTES}
    wanted = [layer for layer in LAYERS if layer in config["layers"]]
    tester = Server(trial, jail, home, channel)
    findings = probe(wanted, home, tester.attempt)
    tester.close()
    return Server(config, replace(jail, layers=findings.layers), home, channel), findings


if __name__ == "__main__":
    main()
