"""The first rank: an ``Engine`` whose calls all ranks make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch

from trtkit.closing import Closing
from trtkit.errors import CapacityError, EngineError, RequestError
from trtkit.runtime.api import EngineStats, Request, StepOutput
from trtkit.runtime.ranks.crew import Crew
from trtkit.runtime.ranks.group import LostRankError, Ranks, claim, joined, refuse_a_second
from trtkit.runtime.torch_engine import TorchEngine

__all__ = ["RankedEngine"]

T = TypeVar("T")


class RankedEngine(Closing):
    """One engine over ``size`` processes on ``device`` (cpu or cuda); the others are started here."""

    def __init__(self, size: int, device: str, open_own: Callable[[Ranks], TorchEngine]) -> None:
        """``open_own`` opens a rank's own engine, on every rank: the others get it pickled, so it must be found by name
        in its module. Raises :class:`EngineError` when another rank fails, and what ``open_own`` raises here."""
        self._apart = True
        """Whether the ranks may be at different places: a call is under way, or was cut short."""
        refuse_a_second()  # before processes are started that would wait for this one
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            self._crew = Crew(size, device, open_own)
            stack.callback(self._crew.dismiss)
            stack.callback(self._crew.release)
            self._crew.wait_until("ready")
            claim(self._crew.place)
            joining = joined(self._crew.place, self._crew.agree)
            ranks = self._together(lambda: stack.enter_context(joining))
            stack.callback(self._leave)
            self._engine = stack.enter_context(self._together(lambda: open_own(ranks)))
            self._crew.wait_until("open")
            self._held = stack.pop_all()
        self._apart = False

    def _leave(self) -> None:
        """Before this rank leaves the others. They leave, too; where they cannot, it must not wait for them."""
        self._crew.release()
        if self._apart:
            self._crew.abort()

    def _together(self, call: Callable[[], T]) -> T:
        """``call``, in which the ranks meet. When one of them has failed, that is what is raised."""
        try:
            return call()
        except (LostRankError, RuntimeError) as problem:  # torch raises the latter where the host waits for the device
            self._crew.blame()
            if isinstance(problem, LostRankError):
                raise EngineError(f"the engine's processes do not answer each other: {problem}") from problem
            raise

    def _told(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Make this call on all ranks; on this one alone when they are apart, which the next step says."""
        call = partial(getattr(self._engine, name), *arguments, **named)
        if self._apart:
            return call()
        self._apart = True
        self._crew.tell(name, arguments, named)
        try:
            result = self._together(call)
        except (RequestError, CapacityError):  # so it is everywhere
            self._apart = False
            raise
        self._apart = False
        return result

    @property
    def own(self) -> TorchEngine:
        """This rank's engine. Its calls that exchange anything must be made on all ranks: through this class."""
        return self._engine

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""
        return self._engine.max_total_tokens

    @property
    def max_rows(self) -> int:
        """Most requests that run at once."""
        return self._engine.max_rows

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not been reported as finished; resting ones do not count."""
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        """See :class:`trtkit.runtime.api.Engine`."""
        self._told("submit", request)

    def step(self) -> Sequence[StepOutput]:
        """See :class:`trtkit.runtime.api.Engine`. Raises :class:`EngineError` when a rank has failed."""
        self._crew.check()
        if self._apart:
            raise EngineError(
                "an earlier call was cut short, so the engine's processes are no longer at the same place",
                hint="open the engine again",
            )
        outputs: Sequence[StepOutput] = self._told("step")
        self._crew.check()  # an exchange that was released because a rank is gone has brought nothing
        return outputs

    def cancel(self, request_id: str) -> None:
        """See :class:`trtkit.runtime.api.Engine`."""
        self._told("cancel", request_id)

    def pause(self, request_id: str) -> None:
        """See :class:`trtkit.runtime.api.Engine`."""
        self._told("pause", request_id)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """See :class:`trtkit.runtime.api.Engine`."""
        self._told("extend", request_id, tuple(tokens), max_tokens=max_tokens, drop=drop)

    def stats(self) -> EngineStats:
        """Counters so far, of this rank: time is its own, everything else is the same on all."""
        return self._engine.stats()

    def close(self) -> None:
        """End the other processes, free the cache and the weights."""
        self._held.close()
