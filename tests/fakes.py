"""Stand-ins for tests without a model: a scripted engine and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from trtkit.chat import THINK_END, PromptVariant, Thought
from trtkit.closing import Closing
from trtkit.errors import RequestError
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput

THINK_ID, EOS_ID = 256, 257


class FakeChat:
    """Ids are bytes. ``</think>`` is one id, or its eight bytes with ``single_think_end=False``."""

    eos_ids = (EOS_ID,)
    thought = Thought()

    def __init__(self, *, single_think_end: bool = True) -> None:
        self.think_end = (THINK_ID,) if single_think_end else tuple(THINK_END.encode())

    @property
    def size(self) -> int:
        return 258

    def prompt(self, problem: str, variant: PromptVariant) -> tuple[int, ...]:
        return tuple(f"{variant.name}|{problem}".encode())

    def encode(self, text: str) -> tuple[int, ...]:
        """What a model would have to emit to say ``text``."""
        thought, tag, rest = text.partition(THINK_END)
        return (*thought.encode(), *(self.think_end if tag else ()), *rest.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        special = {THINK_ID: THINK_END.encode(), EOS_ID: b"<|im_end|>"}
        return b"".join(special.get(token) or bytes([token]) for token in tokens).decode("utf-8", "replace")


class FakeEngine(Closing):
    """Emits what ``script(request)`` says: ``burst`` tokens per step and row, ``rows`` requests at a time."""

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]],
        *,
        rows: int = 8,
        burst: int = 1,
        max_total_tokens: int = 4096,
    ) -> None:
        self.max_total_tokens = max_total_tokens
        self.max_rows = rows
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.closed = False
        self.steps = 0
        self._script = script
        self._rows = rows
        self._burst = burst
        self._left: dict[str, tuple[Request, list[int]]] = {}  # insertion order is the queue
        self._resting: dict[str, tuple[Request, list[int]]] = {}
        self._emitted: dict[str, int] = {}
        self.extended: list[tuple[str, tuple[int, ...], int]] = []
        self._ended: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self._left or self._ended)

    def submit(self, request: Request) -> None:
        if len(request.prompt) >= self.max_total_tokens:
            raise RequestError(f"prompt of {len(request.prompt)} tokens is too long")
        if request.id in self._left or request.id in self._ended or request.id in self._resting:
            raise RequestError(f"request id {request.id!r} is in use")
        self.submitted.append(request)
        self._left[request.id] = (request, list(self._script(request))[: request.max_tokens])
        self._emitted[request.id] = 0

    def step(self) -> list[StepOutput]:
        self.steps += 1
        outputs = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._ended]
        self._ended.clear()
        for name in list(self._left)[: self._rows]:
            request, left = self._left[name]
            tokens, rest = left[: self._burst], left[self._burst :]
            stop = next((place for place, token in enumerate(tokens) if token in request.stop_ids), None)
            if stop is not None:
                tokens, finish = tokens[: stop + 1], FinishReason.STOP
            else:
                finish = None if rest else FinishReason.LENGTH
            self._left[name] = (request, rest)
            self._emitted[name] += len(tokens)
            if finish is not None:
                del self._left[name]
                if request.hold:
                    self._resting[name] = (request, [])
            outputs.append(StepOutput(request_id=name, tokens=tuple(tokens), finish=finish))
        return outputs

    def pause(self, request_id: str) -> None:
        if request_id not in self._left or not self._left[request_id][0].hold:
            raise RequestError("only a held request that waits or runs can be paused")
        self._resting[request_id] = self._left.pop(request_id)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Goes on with what ``script`` says to a request whose prompt ends with the appended tokens."""
        if request_id not in self._resting:
            raise RequestError("only a resting request can be extended")
        request, _ = self._resting.pop(request_id)
        assert 0 <= drop <= self._emitted[request_id]
        self._emitted[request_id] -= drop
        self.extended.append((request_id, tuple(tokens), drop))
        longer = replace(request, prompt=(*request.prompt, *tokens), max_tokens=max_tokens)
        self._left[request_id] = (longer, list(self._script(longer))[:max_tokens])

    def cancel(self, request_id: str) -> None:
        _, unsaid = self._resting.pop(request_id, (None, []))  # nothing unsaid: it has ended, and was reported
        if unsaid or self._left.pop(request_id, None) is not None:
            self.cancelled.append(request_id)
            self._ended.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(steps=self.steps)

    def close(self) -> None:
        self.closed = True
