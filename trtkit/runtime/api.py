"""The ``Engine`` protocol: token ids in, token ids out. No torch, no tokenizer.

>>> with open_engine(directory) as engine:
...     engine.submit(Request(id="p1/0", prompt=(1, 2, 3), sampling=SamplingParams(), stop_ids=(7,),
...                           max_tokens=256, seed=1))
...     while engine.has_work:
...         for output in engine.step():
...             print(output.request_id, output.tokens, output.finish)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from trtkit.errors import RequestError

__all__ = ["Engine", "EngineStats", "FinishReason", "Request", "SamplingParams", "StepOutput", "SwitchPenalty"]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """One of the stop ids was emitted; it is the last token of the output."""
    LENGTH = "length"
    """``max_tokens`` or the engine's total length was reached."""
    CANCELLED = "cancelled"
    """``cancel`` was called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchPenalty:
    """Holds a sample to its current thought: see :mod:`trtkit.runtime.processors`, which resolves words to tokens."""

    alpha: float
    """Taken from the logits of ``tokens``."""
    beta: int
    """For how many tokens from the beginning of a thought."""
    tokens: tuple[int, ...]
    """Ids that open another thought."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.alpha < float("inf"):
            wrong.append(f"alpha {self.alpha}: must be 0 or positive, and finite")
        if self.beta < 1:
            wrong.append(f"beta {self.beta}: must be at least 1")
        if not self.tokens or len(set(self.tokens)) < len(self.tokens):
            wrong.append("tokens: must name at least one id, each once")
        if wrong:
            raise RequestError("switch penalty out of range", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is drawn from the logits.

    The distribution is softmax(logits / temperature), cut by top_k, then top_p, then min_p (each on what the one
    before left, renormalised). ``temperature`` 0 (and below 1e-6) means the most likely token, lowest id on a tie.
    ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 mean no cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    switch: SwitchPenalty | None = None
    """Applied to the logits before everything above."""

    def __post_init__(self) -> None:
        wrong = []
        if not 0 <= self.temperature <= 100:
            wrong.append(f"temperature {self.temperature}: must lie in 0..100")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p {self.top_p}: must lie in (0, 1]")
        if not 0 <= self.top_k < 2**31:
            wrong.append(f"top_k {self.top_k}: must be 0 (off) or positive, and below 2^31")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"min_p {self.min_p}: must lie in 0..1")
        if wrong:
            raise RequestError("sampling parameters out of range", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. Requests with equal prompts share the prompt's KV blocks."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: tuple[int, ...] = ()
    max_tokens: int
    seed: int
    """The noise at position t depends on (seed, t) alone: same seed, same sample, whatever else is in the batch."""
    hold: bool = False
    """Keep the row's place and cache after STOP or LENGTH, for :meth:`Engine.extend`; ``cancel`` lets go of it."""
    logprobs: bool = False
    """Report the natural logarithm of each token's probability, by the model's own distribution: at temperature 1,
    before all cuts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """New tokens of one request. ``finish`` is set exactly once, on its last output (whose tokens may be empty).

    A held request that is extended goes on, and finishes once more.
    """

    request_id: str
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    logprobs: tuple[float, ...] = ()
    """One for each of ``tokens`` where the request asks for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was opened. ``seconds`` is split by phase: prefill, draft, verify, accept."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens asked for."""
    prefill_tokens: int = 0
    """Prompt tokens computed; smaller than ``prompt_tokens`` where samples share a prompt."""
    new_tokens: int = 0
    row_steps: int = 0
    """Sum over decode steps of the rows in it; new_tokens / row_steps is the number of tokens per step."""
    drafted_row_steps: int = 0
    """Of these, the ones with a draft: an engine may choose not to draft at a large batch."""
    discarded_row_steps: int = 0
    """Launched ahead for rows that had ended by then, and thrown away; in none of the other counts."""
    accepted_by_depth: tuple[int, ...] = ()
    """Row-steps in which at least 1, 2, ... drafted tokens were accepted; empty without a drafter."""
    preemptions: int = 0
    peak_rows: int = 0
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that one row gains in one decode step: 1.0 without a drafter."""
        return self.new_tokens / self.row_steps if self.row_steps else 0.0


class Engine(Protocol):
    """What ``solve``, ``bench`` and ``serve`` need of a backend."""

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""

    @property
    def max_rows(self) -> int:
        """Most requests that run at once."""

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not finished. Resting requests (held or paused) do not count."""

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises :class:`RequestError` when it can never run: too long, its id in use, a token id out of range.
        """

    def step(self) -> Sequence[StepOutput]:
        """One decode step over all running rows, after admitting waiting ones. Cheap no-op without work."""

    def cancel(self, request_id: str) -> None:
        """End a request now; the next ``step`` reports it as CANCELLED. Unknown or finished ids are ignored.

        A held request that has finished is let go of in silence, and one that is paused may be.
        """

    def pause(self, request_id: str) -> None:
        """Take a held request out of the batch between two steps, its place kept until ``extend`` or ``cancel``.

        Raises :class:`RequestError` for an id that is unknown, not held, or resting already.
        """

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Let a resting request go on: take back its last ``drop`` tokens, generated or appended, append ``tokens``,
        then generate up to ``max_tokens`` more under the same id.

        The appended tokens are not reported. The noise at a position is what it would have been anyway. Raises
        :class:`RequestError` when the request is not resting, or too long with these tokens.
        """

    def stats(self) -> EngineStats:
        """Counters so far."""

    def close(self) -> None:
        """Free memory. The engine must not be used afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...
