"""Rows whose code runs: taken out of the batch when a call is complete, put back with what the code printed.

A row that waits keeps its place in the KV cache; the engine goes on with the others in the meantime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtkit.chat import Chat
from trtkit.errors import RequestError
from trtkit.runtime.api import Engine, StepOutput
from trtkit.solve.contest import Sample
from trtkit.solve.ends import End, EndRules
from trtkit.solve.sandbox import Call, CallResult, Sandbox
from trtkit.solve.tools import end_of_call, reply

__all__ = ["CodeRows"]

_IDLE_SECONDS = 0.05
"""How long to wait for code when no other row has anything to do."""
_UNMADE = ("error", "timeout", "killed")
"""How a call ends when a block before its own does."""


@dataclass(slots=True)
class _Row:
    """What is known of a sample's calls."""

    since: int = 0
    """Where the model went on after the last reply."""
    seen: int = 0
    """Tokens that were searched for calls."""
    blocks: list[str] = field(default_factory=list)
    """Those that ended well."""
    running: str | None = None
    """The block that runs now."""
    anew: bool = False
    """It runs without those before it, which did not end well when they were run again."""


class CodeRows:
    """The calls of all samples. State across the calls of one sample is kept as in the systems that the models were
    trained with: each call runs the earlier blocks that ended well again, unseen, before its own. Where they do not
    come to their end a second time (a timer, the clock, chance), the block runs alone, and its reply says so."""

    def __init__(self, sandbox: Sandbox, engine: Engine, chat: Chat, ends: EndRules, max_tokens: int) -> None:
        """``max_tokens``: what a sample may generate; replies do not count."""
        self._sandbox = sandbox
        self._engine = engine
        self._chat = chat
        self._ends = ends
        self._max_tokens = max_tokens
        self._rows: dict[str, _Row] = {}

    def go_on_with(self, engine: Engine) -> None:
        """Use another engine from now on."""
        self._engine = engine
        self._rows.clear()

    @property
    def waiting(self) -> list[str]:
        """Requests whose code runs."""
        return [request_id for request_id, row in self._rows.items() if row.running is not None]

    def take(self, sample: Sample, output: StepOutput, end: End | None) -> bool:
        """Take ``sample`` out of the batch if ``output``, just added to it, completes a call before its ``end``."""
        calls = self._sandbox.options.calls
        row = self._rows.setdefault(sample.request_id, _Row())
        if sample.tool_calls >= calls or sample.stream.forced:
            return False
        stream = sample.stream
        # What came after the end is not in the stream any more.
        reported = row.seen + len(output.tokens)
        found = end_of_call(stream.tokens, row.seen, self._chat.decode, since=row.since)
        row.seen = len(stream.tokens)
        if found is None or (end is not None and end.length <= found[0]):
            return False
        length, call = found
        if output.finish is None:
            self._engine.pause(sample.request_id)
        sample.surplus = reported - length
        self._ends.replace(stream, length, ())
        row.running = call.code
        sample.tool_calls += 1
        self._sandbox.submit(Call(id=sample.request_id, code=call.code, earlier=tuple(row.blocks)))
        return True

    def resume(self, samples: Mapping[str, Sample]) -> list[Sample]:
        """Put rows back whose code has ended; those that have no room left to go on."""
        spent = []
        for result in self._sandbox.ready(0.0 if self._engine.has_work else _IDLE_SECONDS):
            sample, row = samples[result.id], self._rows[result.id]
            if row.blocks and row.running is not None and not result.started and result.status in _UNMADE:
                row.blocks, row.anew = [], True
                self._sandbox.submit(Call(id=result.id, code=row.running))
            elif not self._resume(sample, row, result):
                spent.append(sample)
        return spent

    def forget(self, request_id: str) -> bool:
        """The sample is over, or made to answer: nothing waits for its code any more. Whether something did."""
        row = self._rows.pop(request_id, None)
        if row is None or row.running is None:
            return False
        self._sandbox.drop(request_id)
        return True

    def _resume(self, sample: Sample, row: _Row, result: CallResult) -> bool:
        assert row.running is not None
        if result.status == "ok":
            row.blocks.append(row.running)
        anew, row.running, row.anew = row.anew, None, False
        stream, options = sample.stream, self._sandbox.options
        text = reply(
            result,
            options,
            calls_left=options.calls - sample.tool_calls,
            fresh_line=self._chat.decode(stream.tokens[-1:]).endswith("\n"),
            anew=anew,
        )
        tokens = self._chat.encode(text)
        room = self._engine.max_total_tokens - sample.prompt_tokens - len(stream.tokens) - len(tokens)
        left = min(self._max_tokens - stream.generated, room - self._ends.closing_room)
        if left <= 0:
            return False
        try:
            self._engine.extend(sample.request_id, tokens, max_tokens=left, drop=sample.surplus)
        except RequestError:
            return False
        sample.surplus = 0
        self._ends.replace(stream, len(stream.tokens), tokens)
        row.since = row.seen = len(stream.tokens)
        return True
