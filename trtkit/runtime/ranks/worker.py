"""The process of one of the other ranks: opens the same engine and repeats the first rank's calls.

``crew.py`` starts it and has the other end of its pipe. It ends when it is told to, or when the first rank is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from trtkit.errors import CapacityError, RequestError, TrtkitError
from trtkit.log import set_up_logging
from trtkit.runtime.api import Engine
from trtkit.runtime.ranks.crew import CLOSE, FAREWELL_SECONDS, News
from trtkit.runtime.ranks.group import LostRankError, claim, joined

__all__ = ["main"]


class _Inbox:
    """What the first rank says, in order. Read by a thread of its own, which ends the process when there is nobody to
    read from, or soon after it was told to: a rank that waits for the first one within a step would never find out."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self.closing = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while not self.closing:
            try:
                data = self._pipe.recv_bytes()
            except (EOFError, OSError):
                os._exit(1)
            try:
                message = pickle.loads(data)
            except Exception as problem:  # of a module that is not found here, say
                message = problem
            self.closing = message == CLOSE
            self._messages.put(message)
        time.sleep(FAREWELL_SECONDS)
        os._exit(1)

    def next(self) -> Any:
        """Wait for a message. Raises what reading it has raised."""
        message = self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def agree(self, _number: int) -> int:
        """The number that the first rank has sent in the middle of a step."""
        (number,) = self.next()
        return int(number)


def main(end: int) -> None:
    """Serve as a rank until told to close; ``end``: number of this end of the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all of a service at once; the first rank tells when it is over
    with contextlib.suppress(OSError):  # stderr may be closed
        os.dup2(2, 1)  # stdout is for results, and libraries print there
    pipe = Connection(end)
    inbox = _Inbox(pipe)
    held = ExitStack()  # after a failure nothing is given back: on GPUs that would wait for the other ranks
    try:
        place, level, open_own = inbox.next()
        set_up_logging(verbose=level <= logging.DEBUG, quiet=True)
        claim(place)
        pipe.send(News(state="ready"))
        ranks = held.enter_context(joined(place, inbox.agree))
        engine = held.enter_context(open_own(ranks))
        pipe.send(News(state="open"))
        _repeat(engine, inbox)
    except LostRankError:
        _end(pipe, inbox, News(state="lost"))
    except TrtkitError as problem:
        _end(pipe, inbox, News(state="failed", problem=str(problem)))
    except Exception as problem:  # whatever it is, the first rank must hear of it
        said = f"{type(problem).__name__}: {problem}"
        _end(pipe, inbox, News(state="failed", problem=said, trace=traceback.format_exc()))
    held.close()


def _repeat(engine: Engine, inbox: _Inbox) -> None:
    while (message := inbox.next()) != CLOSE:
        name, arguments, named = message
        try:
            getattr(engine, name)(*arguments, **named)
        except (RequestError, CapacityError):
            continue  # as on the first rank, whose caller sees it


def _end(pipe: Connection, inbox: _Inbox, news: News) -> None:
    """Say why it ends, unless it was told to: then the others are gone already."""
    if not inbox.closing:
        pipe.send(news)
    os._exit(1)
