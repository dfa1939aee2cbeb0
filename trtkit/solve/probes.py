"""Asking a sample on its way: every so many tokens it is made to answer, and when it says the same several times in a
row, that is its answer. Otherwise what it was asked and what it said is taken back, and it goes on.

The question stands in the sample's own KV cache, at fixed token positions. On the torch engine the noise of a draw
hangs on seed and position, so a sample that was asked writes what it would have written otherwise. The idea is that of
Dynasor-CoT (arXiv 2412.20993).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trtkit.errors import RequestError
from trtkit.runtime.api import Engine, FinishReason, StepOutput
from trtkit.solve.answers import Answer
from trtkit.solve.contest import Sample
from trtkit.solve.ends import CLOSING_TOKENS, End, Ending, EndRules, Probe
from trtkit.solve.probe_options import ProbeOptions
from trtkit.solve.vote import Same

__all__ = ["Probes"]


@dataclass(slots=True)
class _Row:
    """What is known of a sample."""

    due: int
    """Where it is asked next."""
    seen: int = 0
    """Tokens of it that were reported and count."""
    opening: tuple[int, ...] = ()
    """What asks it, while it is asked."""
    said: list[int] = field(default_factory=list)
    """What it answers."""
    latest: Answer | None = None
    times: int = 0
    """How often in a row it gave the latest answer."""


class Probes:
    """The samples that are asked."""

    def __init__(self, engine: Engine, ends: EndRules, options: ProbeOptions, max_tokens: int, same: Same) -> None:
        """``max_tokens``: what a sample may generate; answers that are taken back do not count."""
        self._engine = engine
        self._ends = ends
        self._options = options
        self._max_tokens = max_tokens
        self._same = same
        self._rows: dict[str, _Row] = {}

    def go_on_with(self, engine: Engine) -> None:
        """Use another engine from now on."""
        self._engine = engine
        self._rows.clear()

    def forget(self, request_id: str) -> None:
        """The sample is over."""
        self._rows.pop(request_id, None)

    def asks(self, sample: Sample) -> bool:
        """Whether the sample is being asked: what the engine reports of it goes to :meth:`hear`."""
        row = self._rows.get(sample.request_id)
        return row is not None and bool(row.opening)

    def take(self, sample: Sample, output: StepOutput, end: End | None) -> bool:
        """Ask ``sample`` if ``output``, just added to it, reaches the place for that before its ``end``."""
        stream = sample.stream
        row = self._rows.setdefault(sample.request_id, _Row(due=self._options.every))
        reported, row.seen = row.seen + len(output.tokens), len(stream.tokens)
        at = row.due
        if stream.forced or row.seen < at or (end is not None and end.length <= at):
            return False
        row.due += self._options.every
        if self._left(sample, at) <= 0:
            return False
        if output.finish is None:
            self._engine.pause(sample.request_id)
        self._ends.replace(stream, at, ())
        row.seen, row.opening, row.said = at, self._ends.closing(stream), []
        try:
            self._engine.extend(sample.request_id, row.opening, max_tokens=CLOSING_TOKENS, drop=reported - at)
        except RequestError:  # no room for the question
            row.opening = ()
            self._engine.extend(sample.request_id, (), max_tokens=self._left(sample, at), drop=reported - at)
        return True

    def hear(self, sample: Sample, output: StepOutput) -> End | None:
        """Add what a sample that is asked says; its end if that settles it."""
        row, stream = self._rows[sample.request_id], sample.stream
        before = len(row.said)
        row.said.extend(output.tokens)
        length, box = self._ends.boxed(row.opening, row.said, before)
        if length is None and output.finish is None:
            return None
        stream.probes.append(Probe(len(stream.tokens), length or len(row.said), box))
        answer = self._ends.read(box)
        again = answer is not None and row.latest is not None and self._same(answer, row.latest)
        row.times = row.times + 1 if again else int(answer is not None)
        row.latest = answer
        if self._options.times and row.times >= self._options.times:
            del row.said[length:]
            self.adopt(sample, Ending.SETTLED)
            return End(ending=Ending.SETTLED, finish=FinishReason.STOP, length=len(stream.tokens))
        sample.contest.dropped_tokens += len(row.said)
        taken_back, row.opening = len(row.opening) + len(row.said), ()
        if output.finish is None:
            self._engine.pause(sample.request_id)
        left = self._left(sample, len(stream.tokens))
        self._engine.extend(sample.request_id, (), max_tokens=left, drop=taken_back)
        return None

    def adopt(self, sample: Sample, ending: Ending) -> bool:
        """Let what the sample says now be its answer; False where it is not being asked."""
        row = self._rows.get(sample.request_id)
        if row is None or not row.opening:
            return False
        self._ends.close_with(sample.stream, row.opening, ending)
        sample.stream.tokens.extend(row.said)
        del self._rows[sample.request_id]
        return True

    def _left(self, sample: Sample, length: int) -> int:
        """Tokens that a sample of ``length`` may still write."""
        room = self._engine.max_total_tokens - sample.prompt_tokens - length - self._ends.closing_room
        return min(self._max_tokens - (length - sample.stream.inserted), room)
