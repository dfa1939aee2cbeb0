"""``EngineView``: one caller's part of a shared engine, as an ``Engine`` of its own.

A solver decides between two steps; the shared engine does not wait for it. What it has done meanwhile with a row that
is paused, the view takes back when the row goes on: the noise at a position depends on the request alone, so the tokens
are those of an engine that waits.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace

from trtkit.closing import Closing
from trtkit.errors import EngineError, RequestError
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput
from trtkit.serve.engine_thread import EngineThread

__all__ = ["EngineView"]

_PATIENCE_SECONDS = 0.05
"""How long ``step`` waits for news: callers with a clock want to look at it."""


class EngineView(Closing):
    """For one thread; ``abandon`` alone may be called from others."""

    def __init__(self, engine: EngineThread, name: str) -> None:
        """``name`` goes before the ids of its requests, and must be nobody else's."""
        self._engine = engine
        self._prefix = f"{name}/"
        self._inbox: queue.SimpleQueue[tuple[Sequence[StepOutput], EngineError | None]] = queue.SimpleQueue()
        self._unseen: dict[str, StepOutput] = {}
        self._live: set[str] = set()
        self._known: set[str] = set()
        self._surplus: dict[str, int] = {}
        self._alike: set[Request] = set()

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""
        return self._engine.max_total_tokens

    @property
    def max_rows(self) -> int:
        """Most requests that run at once, those of others included."""
        return self._engine.max_rows

    @property
    def has_work(self) -> bool:
        """One of its requests has not been reported as finished; resting ones do not count."""
        return bool(self._live)

    def submit(self, request: Request) -> None:
        """Queue a request; see :class:`trtkit.runtime.api.Engine`."""
        if request.id in self._known:
            raise RequestError("the id is in use", where=f"request {request.id}")
        taken = self._engine.submit(replace(request, id=self._prefix + request.id), self._deliver)
        # What was taken once is taken again. Waiting each time would let one sample of a problem join per step.
        alike = replace(request, id="", seed=0)
        if alike not in self._alike:
            taken.result()
            self._alike.add(alike)
        self._known.add(request.id)
        self._live.add(request.id)

    def step(self) -> Sequence[StepOutput]:
        """What the engine has done since the last call, as one output per request. Nothing where nothing has come for a
        while. Raises :class:`EngineError` when the engine has failed, or the caller was told to give up."""
        self._take_in(_PATIENCE_SECONDS if self._live and not self._unseen else 0.0)
        outputs, self._unseen = list(self._unseen.values()), {}
        for output in outputs:
            if output.finish is not None:
                self._live.discard(output.request_id)
            if output.finish is FinishReason.CANCELLED:
                self._known.discard(output.request_id)
        return outputs

    def cancel(self, request_id: str) -> None:
        """End a request; see :class:`trtkit.runtime.api.Engine`."""
        self._engine.cancel(self._prefix + request_id)
        if request_id not in self._live:
            self._known.discard(request_id)

    def pause(self, request_id: str) -> None:
        """Take a held request out of the batch; see :class:`trtkit.runtime.api.Engine`.

        That it has ended meanwhile does not matter, if nobody has seen it.
        """
        refusal = self._engine.pause(self._prefix + request_id).exception()
        self._take_in(0.0)  # whatever was delivered before the pause is here by now
        unseen = self._unseen.pop(request_id, None)
        finish = None if unseen is None else unseen.finish
        if finish is FinishReason.CANCELLED or (refusal is not None and finish is None):
            raise refusal or RequestError("the request was cancelled", where=f"request {request_id}")
        self._live.discard(request_id)
        self._surplus[request_id] = 0 if unseen is None else len(unseen.tokens)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Let a resting request go on; see :class:`trtkit.runtime.api.Engine`."""
        drop += self._surplus.get(request_id, 0)
        self._engine.extend(self._prefix + request_id, tokens, max_tokens=max_tokens, drop=drop).result()
        self._surplus.pop(request_id, None)  # a refusal leaves it
        self._live.add(request_id)

    def stats(self) -> EngineStats:
        """The counters of the whole engine."""
        return self._engine.stats().result()

    def abandon(self) -> None:
        """Make the next ``step`` raise: nobody waits for the caller's result any more."""
        self._inbox.put(((), EngineError("nobody waits for this any more")))

    def close(self) -> None:
        """Cancel what is left."""
        for request_id in self._known:
            self._engine.cancel(self._prefix + request_id)

    def _deliver(self, outputs: Sequence[StepOutput], problem: EngineError | None) -> None:
        self._inbox.put((outputs, problem))

    def _take_in(self, patience: float) -> None:
        """Move what has come to the outputs that were not seen yet, those of one request put together."""
        wait = patience > 0
        while True:
            try:
                outputs, problem = self._inbox.get(block=wait, timeout=patience if wait else None)
            except queue.Empty:
                return
            wait = False
            if problem is not None:
                raise problem
            for output in outputs:
                name = output.request_id.removeprefix(self._prefix)
                before = self._unseen.get(name)
                self._unseen[name] = StepOutput(
                    request_id=name,
                    tokens=(*(before.tokens if before else ()), *output.tokens),
                    finish=output.finish,
                    logprobs=(*(before.logprobs if before else ()), *output.logprobs),
                )
