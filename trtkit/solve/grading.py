"""Whether two answers are equal: numbers exactly, the rest by math-verify in a process that can be killed."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import trtkit
from trtkit.closing import Closing
from trtkit.errors import MissingDependency, TrtkitError
from trtkit.log import logger
from trtkit.solve.answers import Answer

__all__ = ["Grader"]

_LONGEST = 300
"""Characters; longer expressions are compared by spelling only."""
_STARTUP_SECONDS = 120.0
_PATIENCE = 4.0
"""Wall time allowed for each second of the worker's processor time, on a machine that is busy with other things."""
_WORDS = re.compile(r"[A-Z]|[A-Za-z][A-Za-z' -]+")


class Grader(Closing):
    """Equality of answers. The worker starts with the first question that needs it; ``close`` ends it.

    Two numbers are compared exactly, equal spellings are equal, and everything else goes to math-verify, with
    ``timeout_seconds`` of processor time for each question. An answer that alone takes too long is not asked
    about again. Threads may share one: they ask one after the other.

    >>> with Grader() as grader:
    ...     grader.equal(gold, answer)
    """

    def __init__(self, timeout_seconds: float = 3.0) -> None:
        self._timeout = timeout_seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], bool] = {}
        self._slow: set[str] = set()
        self._harmless: set[str] = set()
        self._turn = threading.Lock()

    def equal(self, gold: Answer, answer: Answer) -> bool:
        """True when ``answer`` says the same as ``gold``. False for anything undecided within the timeout."""
        if gold.key == answer.key:
            return True
        if gold.value is not None and answer.value is not None:
            return False
        if not (_is_mathematics(gold.key) and _is_mathematics(answer.key)):
            return False
        if gold.key in self._slow or answer.key in self._slow:
            return False
        pair = (gold.key, answer.key)
        with self._turn:
            if pair not in self._known:
                self._known[pair] = self._ask(*pair)
            return self._known[pair]

    def same(self, one: Answer, other: Answer) -> bool:
        """Equal in both directions: math-verify is more lenient towards the answer than towards the gold."""
        return self.equal(one, other) and self.equal(other, one)

    def close(self) -> None:
        """End the worker. Closing twice is fine, and a later question starts a new one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, gold: str, answer: str) -> bool:
        equal = self._question(gold, answer)
        if equal is not None:
            return equal
        logger.debug("comparing %s with %s took too long: counted as different", gold, answer)
        # One bomb must not take the gold answer or the leader down with it: find out who it was.
        for text in {gold, answer} - self._harmless:
            if self._question(text, "1") is None:
                self._slow.add(text)
        return False

    def _question(self, gold: str, answer: str) -> bool | None:
        """The worker's reply; None when it took too long, and then the worker is gone."""
        question = (json.dumps({"gold": gold, "answer": answer}) + "\n").encode()
        try:
            worker = self._put(question)
            # The worker ends itself at the timeout, by its own processor time; this is for when it cannot.
            reply = _read_reply(_pipe(worker.stdout), _PATIENCE * self._timeout + 1.0)
        except BaseException:
            # Ctrl-C between question and reply: the next reply would belong to this question.
            self.close()
            raise
        if reply is None:
            self.close()
            return None
        self._harmless |= {gold, answer}
        return bool(reply["equal"])

    def _put(self, question: bytes) -> subprocess.Popen[bytes]:
        """Hand the question to the worker, or to a new one if it has died since the last one."""
        if self._worker is not None and self._worker.poll() is not None:
            self.close()
        if self._worker is None:
            self._worker = self._start()
        # A line of a few kilobytes always fits into the pipe of a worker that is waiting for it.
        _pipe(self._worker.stdin).write(question)
        return self._worker

    def _start(self) -> subprocess.Popen[bytes]:
        # Not multiprocessing: its spawned children import the caller's main module again.
        home = str(Path(trtkit.__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
        worker = subprocess.Popen(
            [sys.executable, "-m", "trtkit.solve.grading_worker", str(self._timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for us, not for it
        )
        reply = _read_reply(_pipe(worker.stdout), _STARTUP_SECONDS)
        if reply is None or not reply.get("ready"):
            worker.kill()
            worker.communicate()
            reason = (reply or {}).get("error", "the grading process did not start")
            if "ModuleNotFoundError" in reason:
                raise MissingDependency(f"math-verify: {reason}", hint="pip install math-verify==0.9.0")
            raise TrtkitError(f"math-verify cannot be used: {reason}", hint="pip install math-verify==0.9.0")
        return worker


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _read_reply(stream: IO[bytes], seconds: float) -> dict[str, Any] | None:
    """The next line as JSON; None when it does not come in time or the process ended."""
    deadline = time.monotonic() + seconds
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return None
            piece = os.read(stream.fileno(), 65536)
            if not piece:
                return None
            received += piece
    reply: dict[str, Any] = json.loads(received)
    return reply


def _is_mathematics(key: str) -> bool:
    """False for words and choice letters (equal only when spelled alike) and for overlong text."""
    return len(key) <= _LONGEST and not _WORDS.fullmatch(key)
