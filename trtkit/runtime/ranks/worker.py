"""The process of one of the other ranks: opens the same engine and repeats the first rank's calls.

    python -m trtkit.runtime.ranks.worker FD

FD is its end of the pipe of ``crew.py``. It ends when it is told to, or when the first rank is gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from trtkit.errors import CapacityError, RequestError, TrtkitError
from trtkit.log import set_up_logging
from trtkit.runtime.api import Engine
from trtkit.runtime.ranks.crew import CLOSE, News
from trtkit.runtime.ranks.group import LostRankError, joined

__all__ = ["work"]


class _Inbox:
    """What the first rank says, in order. Read by a thread of its own, which ends the process when there is nobody to
    read from: a rank that waits for the first one within a step would never find out."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self.closing = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while not self.closing:
            try:
                message = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)
            self.closing = message == CLOSE
            self._messages.put(message)

    def next(self) -> Any:
        """Wait for a message."""
        return self._messages.get()

    def agree(self, _number: int) -> int:
        """The number that the first rank has sent in the middle of a step."""
        (number,) = self.next()
        return int(number)


def work(pipe: Connection) -> None:
    """Serve as a rank until told to close."""
    inbox = _Inbox(pipe)
    place, level, open_own = inbox.next()
    set_up_logging(verbose=level <= logging.DEBUG, quiet=True)
    try:
        with ExitStack() as stack:
            pipe.send(News(state="ready"))
            ranks = stack.enter_context(joined(place, inbox.agree))
            engine = stack.enter_context(open_own(ranks))
            pipe.send(News(state="open"))
            _repeat(engine, inbox)
    except LostRankError:
        _say(pipe, inbox, News(state="lost"))
    except TrtkitError as problem:
        _say(pipe, inbox, News(state="failed", problem=str(problem)))
    except Exception as problem:  # whatever it is, the first rank must hear of it
        said = f"{type(problem).__name__}: {problem}"
        _say(pipe, inbox, News(state="failed", problem=said, trace=traceback.format_exc()))


def _repeat(engine: Engine, inbox: _Inbox) -> None:
    while (message := inbox.next()) != CLOSE:
        name, arguments, named = message
        try:
            getattr(engine, name)(*arguments, **named)
        except (RequestError, CapacityError):
            continue  # as on the first rank, whose caller sees it


def _say(pipe: Connection, inbox: _Inbox, news: News) -> None:
    """Say why it ends, unless it was told to: then the others are gone already."""
    if not inbox.closing:
        pipe.send(news)
    sys.exit(1)


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
