"""What an engine counts and times: the numbers behind ``EngineStats``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from trtkit.runtime.api import EngineStats
from trtkit.runtime.blocks import BlockAllocator

__all__ = ["Counters"]

_PHASES = ("prefill", "draft", "verify", "accept")


@dataclass(slots=True, kw_only=True)
class Counters:
    """The fields as in :class:`EngineStats`."""

    max_length: int
    """Drafted tokens of the longest path."""
    steps: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    row_steps: int = 0
    drafted_row_steps: int = 0
    discarded_row_steps: int = 0
    preemptions: int = 0
    peak_rows: int = 0
    _accepted: list[int] = field(init=False)
    _seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))

    def __post_init__(self) -> None:
        self._accepted = [0] * self.max_length

    def step(self, rows: int, accepted: Sequence[int], *, drafted: bool) -> None:
        """A step of ``rows`` rows, of which ``accepted[d]`` accepted more than d drafted tokens."""
        self.steps += 1
        self.row_steps += rows
        self.peak_rows = max(self.peak_rows, rows)
        self.drafted_row_steps += rows if drafted else 0
        for depth, count in enumerate(accepted):
            self._accepted[depth] += count

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Host time of a phase. On CUDA, work still in flight is counted where the host waits for it: in accept, or in
        verify where the step is one launch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def stats(self, allocator: BlockAllocator) -> EngineStats:
        """Counters so far."""
        return EngineStats(
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            prefill_tokens=self.prefill_tokens,
            new_tokens=self.new_tokens,
            row_steps=self.row_steps,
            drafted_row_steps=self.drafted_row_steps,
            discarded_row_steps=self.discarded_row_steps,
            accepted_by_depth=tuple(self._accepted),
            preemptions=self.preemptions,
            peak_rows=self.peak_rows,
            kv_blocks=allocator.total,
            kv_blocks_free=allocator.free,
            seconds=dict(self._seconds),
        )
