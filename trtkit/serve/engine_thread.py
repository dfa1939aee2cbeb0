"""``EngineThread``: one engine for many callers. Its thread opens the engine, steps it and closes it; everybody else
hands over commands, which are carried out between two steps.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from trtkit.closing import Closing
from trtkit.errors import EngineError
from trtkit.log import logger
from trtkit.runtime.api import Engine, EngineStats, FinishReason, Request, StepOutput

__all__ = ["EngineThread", "Sink"]

_CLOSING = "the server is shutting down"
T = TypeVar("T")
Sink: TypeAlias = Callable[[Sequence[StepOutput], EngineError | None], None]
"""Takes what one step gave to the requests that were submitted with it, or the error that ended them all. It is called
in the engine's thread and must not block."""


@dataclass(frozen=True, slots=True)
class _Command(Generic[T]):
    act: Callable[[Engine], T]
    done: Future[T]

    def carry_out(self, engine: Engine) -> None:
        try:
            self.done.set_result(self.act(engine))
        except Exception as problem:
            self.done.set_exception(problem)


class EngineThread(Closing):
    """Runs an engine for many callers, from any thread.

    When a step fails, all requests under way end with an :class:`EngineError` and the engine is opened anew; when that
    fails too, the thread is ``broken``: it refuses everything, and ``on_broken`` is called once, in its thread.
    """

    def __init__(self, open_engine: Callable[[], Engine], *, on_broken: Callable[[], None] = lambda: None) -> None:
        """Opens the engine; raises what that raises."""
        self._open_engine = open_engine
        self._on_broken = on_broken
        self._commands: queue.SimpleQueue[_Command[Any] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._coming: set[str] = set()
        """Handed over and not yet taken by the engine, which may be in the middle of a step."""
        self._held: set[str] = set()
        self._resting: set[str] = set()
        self._turn = threading.Lock()
        self._ended: str | None = None
        opened: Future[Engine] = Future()
        # A daemon, so that a step that never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(opened,), name="engine", daemon=True)
        self._thread.start()
        engine = opened.result()
        self.max_total_tokens, self.max_rows = engine.max_total_tokens, engine.max_rows

    @property
    def broken(self) -> bool:
        """The engine failed and could not be opened again, or was closed."""
        return self._ended is not None

    @property
    def why_broken(self) -> str:
        """What happened, in words."""
        return self._ended or ""

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not ended, those that rest not counted."""
        return len(self._coming) + len(self._sinks) - len(self._resting)

    def submit(self, request: Request, sink: Sink) -> Future[None]:
        """Queue a request; the future raises :class:`RequestError` where the engine refuses it."""

        def command(engine: Engine) -> None:
            try:
                engine.submit(request)
                self._sinks[request.id] = sink
                if request.hold:
                    self._held.add(request.id)
            finally:
                self._coming.discard(request.id)

        self._coming.add(request.id)
        try:
            return self._post(command)
        except EngineError:
            self._coming.discard(request.id)
            raise

    def cancel(self, request_id: str) -> None:
        """End a request soon; its sink gets a CANCELLED, unless it has ended or rests."""

        def command(engine: Engine) -> None:
            engine.cancel(request_id)
            if request_id in self._resting:
                self._forget(request_id)

        with contextlib.suppress(EngineError):  # a broken engine has ended it already
            self._post(command)

    def pause(self, request_id: str) -> Future[None]:
        """As :meth:`trtkit.runtime.api.Engine.pause`."""

        def command(engine: Engine) -> None:
            engine.pause(request_id)
            self._resting.add(request_id)

        return self._post(command)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> Future[None]:
        """As :meth:`trtkit.runtime.api.Engine.extend`."""

        def command(engine: Engine) -> None:
            engine.extend(request_id, tokens, max_tokens=max_tokens, drop=drop)
            self._resting.discard(request_id)

        return self._post(command)

    def stats(self) -> Future[EngineStats]:
        """The engine's counters; those of an engine that failed are gone with it."""
        return self._post(lambda engine: engine.stats())

    def turn_out(self) -> None:
        """End the requests that are under way, with an error: the server is about to end."""

        def command(engine: Engine) -> None:
            for request_id in list(self._sinks):
                engine.cancel(request_id)
            self._drop_all(EngineError(_CLOSING))

        with contextlib.suppress(EngineError):
            self._post(command)

    def close(self) -> None:
        """End everything and close the engine."""
        with self._turn:
            if self._ended is None:
                self._ended = _CLOSING
                self._commands.put(None)
        self._thread.join()

    def _post(self, act: Callable[[Engine], T]) -> Future[T]:
        command = _Command(act, Future())
        with self._turn:
            if self._ended is not None:
                raise EngineError(self._ended)
            self._commands.put(command)
        return command.done

    def _run(self, opened: Future[Engine]) -> None:
        try:
            engine = self._open_engine()
        except BaseException as problem:
            opened.set_exception(problem)
            return
        opened.set_result(engine)
        while self._obey(engine):
            try:
                self._deliver(engine.step())
            except Exception as failure:
                _let_go(failure)
                with contextlib.suppress(Exception):
                    engine.close()
                again = self._open_again(failure)
                if again is None:
                    return
                engine = again
        self._drop_all(EngineError(_CLOSING))
        engine.close()

    def _obey(self, engine: Engine) -> bool:
        """Carry out what was asked for, and wait for it where the engine has nothing to do; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.carry_out(engine)

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        """Each caller's outputs together, so that a step wakes it once."""
        shares: dict[Sink, list[StepOutput]] = {}
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:  # cancelled while it rested: nobody waits for that
                continue
            shares.setdefault(sink, []).append(output)
            if output.finish is None:
                continue
            if output.request_id in self._held and output.finish is not FinishReason.CANCELLED:
                self._resting.add(output.request_id)
            else:
                self._forget(output.request_id)
        for sink, share in shares.items():
            sink(share, None)

    def _open_again(self, failure: Exception) -> Engine | None:
        """What a failed step comes to: everybody is told, and the engine is opened anew; None where it cannot be."""
        text = f"the engine failed: {type(failure).__name__}: {failure}"
        logger.error("%s; %d request(s) end with it, and it is opened again", text, self.unfinished)
        logger.debug("where it failed", exc_info=failure)
        self._drop_all(EngineError(text))
        try:
            return self._open_engine()
        except Exception as problem:
            logger.error("the engine cannot be opened again: %s", problem)
            with self._turn:
                self._ended = f"{text}, and it cannot be opened again: {problem}"
                self._commands.put(None)
        while (command := self._commands.get()) is not None:
            command.done.set_exception(EngineError(self._ended))
        self._coming.clear()
        self._on_broken()
        return None

    def _drop_all(self, problem: EngineError) -> None:
        sinks = set(self._sinks.values())
        for request_id in list(self._sinks):
            self._forget(request_id)
        for sink in sinks:
            sink([], problem)

    def _forget(self, request_id: str) -> None:
        self._sinks.pop(request_id, None)
        self._held.discard(request_id)
        self._resting.discard(request_id)


def _let_go(failure: BaseException | None) -> None:
    """Forget what the calls that failed were working on: the traceback would hold the weights and the cache while those
    of the next engine are loaded, and a GPU has no room for both."""
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__
