"""``RestartingEngine``: the bookkeeping of an engine whose backend runs requests, but cannot let one rest.

A resting request (held or paused) is nothing but its tokens here; to go on it becomes a new request of the backend
whose prompt is everything so far. Where the backend keeps the KV blocks of what it has seen, that is cheap.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from trtkit.closing import Closing
from trtkit.errors import RequestError
from trtkit.runtime.api import FinishReason, Request, StepOutput

__all__ = ["RestartingEngine", "Started", "joined"]

Handle = TypeVar("Handle", bound=Hashable)
_SEED_STRIDE = 0x9E3779B97F4A7C15


def joined(outputs: Iterable[StepOutput | None]) -> list[StepOutput]:
    """One output per request: who pauses a request after its words of a step must have heard all of them."""
    heard: dict[str, StepOutput] = {}
    for output in outputs:
        if output is not None:
            before = heard.get(output.request_id)
            heard[output.request_id] = output if before is None else StepOutput(
                request_id=output.request_id, tokens=before.tokens + output.tokens, finish=output.finish,
                logprobs=before.logprobs + output.logprobs,
            )  # fmt: skip
    return list(heard.values())


@dataclass(slots=True)
class Started(Generic[Handle]):
    """A request, and what the backend runs for it."""

    request: Request
    prompt: list[int]
    """What the current part began with."""
    limit: int = 0
    """Most tokens that the current part may make."""
    generated: list[int] = field(default_factory=list)
    """Tokens of the current part, as reported."""
    handle: Handle | None = None
    """The backend's name for it; None while it rests."""
    parts: int = 0
    """How often it was extended."""
    losses: int = 0
    """How often the backend has let go of it before its end."""
    iterations: int = 0
    """Decode steps of the current part, where the backend counts them."""

    @property
    def seed(self) -> int:
        """Another stream of random numbers for every part: a backend's starts anew with each of its requests."""
        return self.request.seed + self.parts * _SEED_STRIDE


class RestartingEngine(Closing, Generic[Handle]):
    """The calls of ``Engine`` that are about single requests. What is left to a backend is in the abstract methods."""

    def __init__(self) -> None:
        self._requests: dict[str, Started[Handle]] = {}
        self._by_handle: dict[Handle, str] = {}
        self._cancelled: list[str] = []
        self._prompt_tokens = 0

    @property
    @abstractmethod
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""

    @property
    @abstractmethod
    def max_rows(self) -> int:
        """Most requests that run at once."""

    @property
    @abstractmethod
    def _vocab(self) -> int:
        """Token ids lie below it."""

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Raise for what the backend cannot do."""

    @abstractmethod
    def _start(self, started: Started[Handle]) -> Handle:
        """Run a part from its prompt on; what the backend calls it."""

    @abstractmethod
    def _stop(self, handle: Handle) -> None:
        """Let the backend forget a request that runs. What it still says of it is not listened to."""

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not been reported as finished; resting ones do not count."""
        return bool(self._by_handle) or bool(self._cancelled)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises :class:`RequestError`, or :class:`UsageError` for sampling that it cannot do."""
        self._check(request)
        wrong = []
        if request.id in self._requests:
            wrong.append("the id is in use by an unfinished request")
        if request.max_tokens < 1:
            wrong.append(f"max_tokens {request.max_tokens}: must be at least 1")
        self._check_prompt(request.id, request.prompt, wrong)
        started = self._requests[request.id] = Started(request=request, prompt=list(request.prompt))
        self._begin(started, request.max_tokens)

    def _check_prompt(self, name: str, prompt: Sequence[int], wrong: list[str]) -> None:
        vocab, longest = self._vocab, self.max_total_tokens
        if not prompt:
            wrong.append("the prompt is empty")
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            wrong.append(f"token id {outside[0]} lies outside the vocabulary of {vocab}")
        if len(prompt) >= longest:
            wrong.append(f"the prompt has {len(prompt)} tokens, the engine takes {longest} with the answer")
        if wrong:
            raise RequestError("the request cannot run", where=f"request {name}", offenders=wrong)

    def _begin(self, started: Started[Handle], max_tokens: int) -> None:
        started.limit = min(max_tokens, self.max_total_tokens - len(started.prompt))
        started.iterations = 0
        self._prompt_tokens += len(started.prompt)
        self._runs_as(started, self._start(started))

    def _runs_as(self, started: Started[Handle], handle: Handle) -> None:
        started.handle = handle
        self._by_handle[handle] = started.request.id

    def _report(
        self, started: Started[Handle], tokens: Sequence[int], finish: FinishReason | None,
        logprobs: Sequence[float] = (),
    ) -> StepOutput | None:  # fmt: skip
        """What the current part has come to; None where that is nothing new."""
        name = started.request.id
        started.generated += tokens
        if finish is not None:
            self._rest(started)
            if not started.request.hold:
                del self._requests[name]
        elif not tokens:
            return None
        return StepOutput(request_id=name, tokens=tuple(tokens), finish=finish, logprobs=tuple(logprobs))

    def _report_cancelled(self) -> list[StepOutput]:
        outputs = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._cancelled]
        self._cancelled.clear()
        return outputs

    def _rest(self, started: Started[Handle]) -> None:
        if started.handle is not None:
            self._by_handle.pop(started.handle, None)
            started.handle = None

    def _forget(self, name: str) -> None:
        self._rest(self._requests[name])
        del self._requests[name]

    def cancel(self, request_id: str) -> None:
        """End a request now; the next ``step`` reports it as CANCELLED. A resting one is let go of in silence."""
        started = self._requests.get(request_id)
        if started is None:
            return
        if started.handle is not None:
            self._stop(started.handle)
            self._cancelled.append(request_id)
        self._forget(request_id)

    def pause(self, request_id: str) -> None:
        """Take a held request out of the batch. Tokens that the backend has made but not reported are lost."""
        started = self._requests.get(request_id)
        if started is None or started.handle is None or not started.request.hold:
            raise RequestError("only a held request that waits or runs can be paused", where=f"request {request_id}")
        self._stop(started.handle)
        self._rest(started)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Let a resting request go on, as a new request of the backend whose prompt is everything so far.

        The draws that follow are fresh ones where the backend's noise hangs on more than seed and position.
        """
        started = self._requests.get(request_id)
        wrong = []
        if started is None or started.handle is not None:
            raise RequestError("only a resting request can be extended", where=f"request {request_id}")
        if max_tokens < 1:
            wrong.append(f"max_tokens {max_tokens}: must be at least 1")
        written = [*started.prompt, *started.generated]
        most = len(written) - len(started.request.prompt)
        if not 0 <= drop <= most:
            wrong.append(f"drop {drop}: {most} tokens were generated")
            drop = 0
        prompt = [*written[: len(written) - drop], *tokens]
        self._check_prompt(request_id, prompt, wrong)
        started.prompt, started.generated = prompt, []
        started.parts += 1
        self._begin(started, max_tokens)
