"""The first rank: an ``Engine`` whose calls all ranks make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from trtkit.closing import Closing
from trtkit.errors import EngineError
from trtkit.runtime.api import EngineStats, Request, StepOutput
from trtkit.runtime.ranks.crew import Crew
from trtkit.runtime.ranks.group import LostRankError, Ranks, joined
from trtkit.runtime.torch_engine import TorchEngine

__all__ = ["RankedEngine"]

T = TypeVar("T")


class RankedEngine(Closing):
    """One engine over ``size`` processes on ``device`` (cpu or cuda); the others are started here."""

    def __init__(self, size: int, device: str, open_own: Callable[[Ranks], TorchEngine]) -> None:
        """``open_own`` opens a rank's own engine, on every rank: the others get it pickled, so it must be found by name
        in its module. Raises :class:`EngineError` when another rank fails, and what ``open_own`` raises here."""
        with ExitStack() as stack:
            self._crew = Crew(size, device, open_own)
            stack.callback(self._crew.dismiss)
            stack.callback(self._crew.release)
            self._crew.wait_until("ready")
            ranks = stack.enter_context(joined(self._crew.place, self._crew.agree))
            stack.callback(self._crew.release)  # before this rank leaves the others
            self._engine = stack.enter_context(self._together(lambda: open_own(ranks)))
            self._crew.wait_until("open")
            self._held = stack.pop_all()

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
        """Make this call on all ranks."""
        self._crew.tell(name, arguments, named)
        return self._together(lambda: getattr(self._engine, name)(*arguments, **named))

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
        outputs: Sequence[StepOutput] = self._told("step")
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
