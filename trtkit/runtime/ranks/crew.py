"""The processes of the other ranks, as the first rank starts, instructs and watches them.

Instructions go through one pipe to each process, and word of its state comes back through it. A process that dies
closes its pipe, so the first rank finds out whatever it is doing; and the others end by themselves when the first rank
is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

import trtkit
from trtkit.errors import EngineError
from trtkit.log import logger
from trtkit.runtime.api import Engine
from trtkit.runtime.ranks.group import Place, Ranks

__all__ = ["CLOSE", "FAREWELL_SECONDS", "Crew", "News"]

CLOSE = ("close",)
"""The last instruction."""
FAREWELL_SECONDS = 10.0
"""How long a process may take to end when it is told to."""
_NEWS_SECONDS = 5.0
"""How long it may take until word of a failure is there that has broken a step already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a rank says of itself."""

    state: Literal["ready", "open", "failed", "lost"]
    """``ready`` to meet the others; its engine is ``open``; it has ``failed``; or it has ``lost`` one of the others,
    which is no failure of its own."""
    problem: str = ""
    trace: str = ""


_State: TypeAlias = Literal["started", "ready", "open", "gone"]


class Crew:
    """The processes of the ranks 1 to ``size`` - 1 on ``device`` (cpu or cuda), each with what ``open_own`` opens."""

    def __init__(self, size: int, device: str, open_own: Callable[[Ranks], Engine]) -> None:
        """``open_own`` must be found by name in its module: the others get it pickled. Raises :class:`EngineError` when
        the system starts no more processes."""
        if os.name != "posix":
            raise EngineError("an engine over several processes takes Linux or macOS", hint="--tp 1")
        if not sys.executable:
            raise EngineError("this Python does not know its own program, so it cannot start more processes of it")
        self._changed = threading.Condition()
        self._states: list[_State] = ["started"] * (size - 1)
        self._failure: str | None = None
        self._traced = False
        self._released = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._watcher = threading.Thread(target=self._watch, name="trtkit-ranks", daemon=True)
        try:
            with contextlib.ExitStack() as undo:
                self._folder = tempfile.TemporaryDirectory(prefix="trtkit-ranks-")
                undo.callback(self._folder.cleanup)
                undo.callback(self._kill)
                self.place = Place(rank=0, size=size, device=device, store=Path(self._folder.name) / "store")
                for rank in range(1, size):
                    self._start(replace(self.place, rank=rank), open_own)
                undo.pop_all()
        except OSError as problem:
            raise EngineError(f"cannot start the engine's processes: {problem}") from problem
        self._watcher.start()

    def _start(self, place: Place, open_own: Callable[[Ranks], Engine]) -> None:
        import fcntl  # not on Windows, where engines of one process run

        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Not a number of stdin, stdout or stderr, which are free where these are closed.
            end = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3)
            try:
                # A session of its own: Ctrl-C in the terminal is for the first rank, which tells the others.
                process = subprocess.Popen(
                    _command(end), pass_fds=[end], stdin=subprocess.DEVNULL, start_new_session=True
                )
            finally:
                os.close(end)
            pipe = Connection(ours.detach())
        self._processes.append(process)
        self._pipes.append(pipe)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended already, which is noticed soon
            pipe.send((place, logger.getEffectiveLevel(), open_own))

    def _watch(self) -> None:
        """Take in what the others say, until all of them are gone."""
        indices = {pipe: index for index, pipe in enumerate(self._pipes)}
        while indices:
            for pipe in wait(list(indices)):
                assert isinstance(pipe, Connection)
                try:
                    self._hear(indices[pipe], pipe.recv())
                except (EOFError, OSError):
                    self._hear(indices.pop(pipe), None)

    def _hear(self, index: int, news: News | None) -> None:
        """``news`` None: the process has ended."""
        with self._changed:
            failed = self._states[index] != "gone" if news is None else news.state == "failed"
            failed = failed and not self._released
            self._states[index] = news.state if news is not None and news.state in ("ready", "open") else "gone"
            if failed and self._failure is None:
                what = _ending(self._processes[index]) if news is None else news.problem
                self._failure = f"rank {index + 1}: {what}"
                trace = "" if news is None else news.trace
                self._traced = bool(trace)
                logger.debug("rank %d: %s", index + 1, trace or "no traceback")
            self._changed.notify_all()
        if failed:
            self.abort()

    def wait_until(self, state: Literal["ready", "open"]) -> None:
        """Return when all have got there. Raises :class:`EngineError` when one could not."""
        with self._changed:
            self._changed.wait_for(lambda: "gone" in self._states or all(now == state for now in self._states))
            gone = "gone" in self._states
        if gone:
            self.blame()
            raise EngineError("one of the engine's processes has ended")

    def check(self, *, patience: float = 0.0) -> None:
        """Raise :class:`EngineError` when a rank has failed, or does so within ``patience`` seconds."""
        with self._changed:
            if self._changed.wait_for(lambda: self._failure is not None, timeout=patience):
                hint = "--verbose shows where it did" if self._traced else None
                raise EngineError(f"one of the engine's processes failed: {self._failure}", hint=hint)

    def blame(self) -> None:
        """:meth:`check` after something has gone wrong here that a failure there would explain."""
        self.check(patience=_NEWS_SECONDS)

    def tell(self, *message: Any) -> None:
        """Send all ranks the same instruction. One that is gone gets none: whoever meets it next finds out."""
        data = pickle.dumps(message)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(data)

    def agree(self, number: int) -> int:
        """Send all ranks ``number`` in the middle of a step: ``Ranks.agree`` of the first rank."""
        self.tell(number)
        return number

    def abort(self) -> None:
        """Release a step on the GPUs that waits for a rank that is gone. Between CPU processes the broken connection
        does. Not run on GPUs so far."""
        if self.place.device == "cuda" and dist.is_initialized():
            # There is no public way to a backend.
            dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()

    def release(self) -> None:
        """Tell all processes to end. From now on no ending is a failure."""
        with self._changed:
            self._released = True
        self.tell(*CLOSE)

    def dismiss(self) -> None:
        """See all released processes end, by force where they do not."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._watcher.join(FAREWELL_SECONDS)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()  # does nothing to one that was waited for
            process.wait()


def _ending(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that had closed its pipe."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "its process closed the connection"
    if code < 0:
        short = " (memory may have run out)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{short}"
    return f"its process ended with exit code {code}"


def _command(end: int) -> list[str]:
    """A worker, run by this Python with modules from where this process has them: not from the working directory,
    unless it is on the path here. ``end`` is its end of the pipe."""
    path = [*map(os.fspath, sys.path), str(Path(trtkit.__file__).resolve().parents[1])]
    code = f"import sys; sys.path[:] = {path!r}; from trtkit.runtime.ranks import worker; worker.main({end})"
    return [sys.executable, *(["-I"] if sys.flags.isolated else []), "-c", code]
