"""``run_serve``: from an engine to a server, until a signal ends it."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

from trtkit.errors import EngineError, UsageError
from trtkit.log import logger
from trtkit.runtime.api import EngineStats
from trtkit.runtime.load import OpenOptions
from trtkit.runtime.sources import Source
from trtkit.serve.app import make_app
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.server import HttpServer, bound_socket
from trtkit.serve.service import VOTED, Reasoning, Service
from trtkit.serve.voting import Voting
from trtkit.solve.options import SolveOptions

__all__ = ["ServeOptions", "Serving", "run_serve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How an engine is served."""

    name: str
    """What clients call the model."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    reasoning: Reasoning = "inline"
    voting: SolveOptions
    """Of the voted model; its sampling is everybody's where a request does not say."""
    most_unfinished: int = 1024
    """Samples under way or waiting beyond which clients are turned away."""
    key: str | None = None
    """What clients must present."""

    def __post_init__(self) -> None:
        wrong = []
        if self.reasoning not in get_args(Reasoning):
            wrong.append(f"reasoning {self.reasoning!r}: must be {' or '.join(get_args(Reasoning))}")
        if not self.name.strip() or self.name.endswith(VOTED):
            wrong.append(f"name {self.name!r}: must be some text that does not end with {VOTED}")
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            wrong.append("the API key: must be printable ASCII" if self.key else "the API key: is empty")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server that takes requests."""

    url: str
    models: tuple[str, ...]
    rows: int
    """Samples that run at once."""
    total_tokens: int
    """Longest prompt + output."""


def run_serve(
    source: Source, opening: OpenOptions, options: ServeOptions, *, on_ready: Callable[[Serving], None]
) -> EngineStats:
    """Serve until SIGINT or SIGTERM; the engine's counters then. ``on_ready`` is called once, when requests are taken.

    Raises :class:`UsageError` and :class:`OutputError` for an address that cannot be had, :class:`EngineError` when the
    engine fails and cannot be opened again, and what opening it raises.
    """
    for text in source.notices(options.voting.sampling, logprobs=options.voting.wants_logprobs):
        logger.warning("note: %s", text)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(bound_socket(options.host, options.port))
        chat = source.chat
        broken = threading.Event()
        engine = stack.enter_context(EngineThread(lambda: source.open(opening), on_broken=broken.set))
        voting = stack.enter_context(Voting(engine, chat))
        stack.callback(engine.close)  # before the votes, which wait for what it does
        service = Service(
            engine=engine, voting=voting, chat=chat, source=source, name=options.name, options=options.voting,
            reasoning=options.reasoning, most_unfinished=options.most_unfinished, key=options.key,
        )  # fmt: skip
        host, port = listening.getsockname()[:2]
        serving = Serving(
            url=f"http://{f'[{host}]' if ':' in host else host}:{port}", models=service.models,
            rows=engine.max_rows, total_tokens=engine.max_total_tokens,
        )  # fmt: skip
        with _quick_turns():
            HttpServer(
                make_app(service), on_ready=lambda: on_ready(serving), on_overtime=engine.turn_out, until=broken
            ).run(sockets=[listening])
        if engine.broken:
            raise EngineError(engine.why_broken)
        return engine.stats().result()


@contextlib.contextmanager
def _quick_turns() -> Iterator[None]:
    """Let the engine's thread and the server's take turns at Python more often than every 5 ms; steps wait for that."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
