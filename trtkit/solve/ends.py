"""Where a sample ends, besides where the engine ends it, and how one that ran out of budget is made to answer.

Everything is decided at fixed token positions, so where a sample ends depends neither on the batch nor on how its
tokens were cut into steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from trtkit.chat import Chat
from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import Answer, AnswerMode, extract_box, read_answer
from trtkit.solve.stop_text import end_of_text

__all__ = [
    "ANSWER_OPENING",
    "CLOSING_TOKENS",
    "CONFIDENCE_TOKENS",
    "End",
    "EndRules",
    "Ending",
    "Probe",
    "Stream",
    "is_looping",
]

ANSWER_OPENING = "\n\nThe answer is \\boxed{"
CLOSING_TOKENS = 48
"""What a sample that is made to answer may spend on it."""

CONFIDENCE_TOKENS = 2048
"""The tail that says how sure a sample was: as in the tail confidence of DeepConf (arXiv 2508.15260)."""

_LOOP_CHARACTERS, _LOOP_TIMES = 200, 3
_LOOP_EVERY = 256
_BOX_EVERY = 16
_BOX_WINDOW = 256
"""Tokens before a check that are searched for a box; a longer box is found where the thought ends."""


class Ending(StrEnum):
    """Why a sample ended."""

    THINK = "think"
    """``</think>``, or what the model writes in its place."""
    EOS = "eos"
    """The end of the turn."""
    BOX = "box"
    """A complete answer before ``</think>`` (``--stop-at first-box``)."""
    LOOP = "loop"
    """It went in circles."""
    LENGTH = "length"
    """Its token budget, or the engine's."""
    DEADLINE = "deadline"
    """Its problem's time was up."""
    SETTLED = "settled"
    """Asked on its way, it gave the same answer several times (``--probe``)."""


def is_looping(text: str, *, characters: int = _LOOP_CHARACTERS, times: int = _LOOP_TIMES) -> bool:
    """The last ``characters`` of ``text`` stand in it ``times`` times (overlaps not counted).

    With the defaults, on public R1-Distill traces this catches most of those that never end and few that do.
    """
    return len(text) >= characters * times and text.count(text[-characters:]) >= times


class Probe(NamedTuple):
    """A sample was asked for its answer on the way."""

    at: int
    """After so many of its tokens."""
    tokens: int
    """It answered with so many."""
    box: str | None
    """As written; None where it gave none."""


@dataclass(slots=True)
class Stream:
    """The tokens of one sample so far."""

    tokens: list[int] = field(default_factory=list)
    closing_at: int | None = None
    """Where the text begins that makes it answer; None while it thinks."""
    closing_for: Ending | None = None
    """What it was made to answer for."""
    inserted: int = 0
    """Tokens that we wrote, not the model."""
    logprobs: list[float] = field(default_factory=list)
    """Of the tokens that the model wrote, where they were asked for."""
    probes: list[Probe] = field(default_factory=list)
    """What it said when it was asked on its way."""
    chunks: list[str] = field(default_factory=list)
    """Its text by stretches of ``_LOOP_EVERY`` tokens, as far as it was needed."""

    @property
    def generated(self) -> int:
        """Tokens that the model wrote."""
        return len(self.tokens) - self.inserted

    @property
    def forced(self) -> bool:
        """It was made to answer."""
        return self.closing_at is not None

    @property
    def confidence(self) -> float | None:
        """Mean log-probability of its last ``CONFIDENCE_TOKENS``; None where they were not asked for."""
        return statistics.fmean(self.logprobs[-CONFIDENCE_TOKENS:]) if self.logprobs else None

    def cut(self, length: int) -> None:
        """Take back what the model wrote after ``length`` tokens."""
        if self.logprobs:
            del self.logprobs[len(self.logprobs) - (len(self.tokens) - length) :]
        del self.tokens[length:]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A sample's end. What it said after ``length`` tokens does not count."""

    ending: Ending
    finish: FinishReason
    length: int


class EndRules:
    """The ends of a sample under one set of options; holds no state of any sample."""

    def __init__(self, chat: Chat, mode: AnswerMode, *, at_think: bool, at_box: bool, loops: bool) -> None:
        """``at_think``: end at ``</think>``; ``at_box``: at the first answer before it; ``loops``: when it loops."""
        single, at_think = len(chat.think_end) == 1, at_think and chat.thought.ends
        self._decode: Callable[[Sequence[int]], str] = chat.decode
        self._encode: Callable[[str], Sequence[int]] = chat.encode
        self._mode = mode
        self._think_ids = chat.think_end if single and at_think else ()
        self._match_text = at_think and not single
        self._closes = chat.thought.closes
        self._at_box = at_box
        self._loops = loops
        self.stop_ids = tuple(dict.fromkeys((*self._think_ids, *chat.eos_ids)))

    def add(
        self, stream: Stream, tokens: Sequence[int], finish: FinishReason | None, logprobs: Sequence[float] = ()
    ) -> End | None:
        """Add what the engine reported; the sample's end if it is in there. Of several, the earliest counts."""
        seen = len(stream.tokens)
        stream.tokens.extend(tokens)
        stream.logprobs.extend(logprobs)
        found = [end for end in (self._by_engine(stream, finish), self._by_text(stream, seen)) if end is not None]
        if stream.closing_at is None:
            found += [end for end in (self._by_box(stream, seen), self._by_loop(stream, seen)) if end is not None]
        if not found:
            return None
        end = min(found, key=lambda end: end.length)
        stream.cut(end.length)
        return end

    def text(self, stream: Stream) -> str:
        """Everything that the sample said, and what was put into its mouth."""
        return self._decode(stream.tokens)

    def answer(self, stream: Stream) -> Answer | None:
        """What it would vote for as it stands."""
        return self.read(extract_box(self.text(stream)))

    def close(self, stream: Stream, ending: Ending) -> tuple[int, ...]:
        """Make the sample answer: its :meth:`closing`, now part of ``stream``."""
        tokens = self.closing(stream)
        self.close_with(stream, tokens, ending)
        return tokens

    def closing(self, stream: Stream) -> tuple[int, ...]:
        """The tokens that end its thought and open a box."""
        closed = self._closes in self.text(stream)
        return tuple(self._encode(ANSWER_OPENING if closed else f"\n{self._closes}{ANSWER_OPENING}"))

    def close_with(self, stream: Stream, tokens: Sequence[int], ending: Ending) -> None:
        """Make a closing part of ``stream``: what follows is its answer."""
        stream.closing_at, stream.closing_for = len(stream.tokens), ending
        stream.tokens.extend(tokens)
        stream.inserted += len(tokens)

    def boxed(self, opening: Sequence[int], said: Sequence[int], seen: int) -> tuple[int | None, str | None]:
        """Where in ``said`` the box is complete that a closing has opened, after ``seen`` tokens, and what is in it."""
        for length in range(seen + 1, len(said) + 1):
            box = extract_box(self._decode([*opening, *said[:length]]))
            if box is not None:
                return length, box
        return None, None

    def read(self, box: str | None) -> Answer | None:
        """What a box votes for."""
        return read_answer(box, self._mode)

    def replace(self, stream: Stream, length: int, tokens: Sequence[int]) -> None:
        """Take back what the sample said after ``length`` tokens, and have it read ``tokens`` instead."""
        stream.cut(length)
        del stream.chunks[length // _LOOP_EVERY :]
        stream.tokens.extend(tokens)
        stream.inserted += len(tokens)
        if self._loops:
            for place in _positions(length, len(stream.tokens), _LOOP_EVERY):
                stream.chunks.append(self._decode(stream.tokens[place - _LOOP_EVERY : place]))

    @property
    def closing_room(self) -> int:
        """Tokens that a sample must leave free to be made to answer."""
        return len(self._encode(f"\n{self._closes}{ANSWER_OPENING}")) + CLOSING_TOKENS

    def _by_engine(self, stream: Stream, finish: FinishReason | None) -> End | None:
        if finish is None:
            return None
        if stream.closing_for is not None:
            ending = stream.closing_for
        elif finish is FinishReason.STOP:
            ending = Ending.THINK if stream.tokens and stream.tokens[-1] in self._think_ids else Ending.EOS
        else:
            ending = Ending.LENGTH
        return End(ending=ending, finish=finish, length=len(stream.tokens))

    def _by_text(self, stream: Stream, seen: int) -> End | None:
        if stream.closing_at is not None:
            return self._by_forced_box(stream, seen)
        if not self._match_text:
            return None
        length = end_of_text(stream.tokens, seen, self._closes, self._decode)
        return None if length is None else End(ending=Ending.THINK, finish=FinishReason.STOP, length=length)

    def _by_forced_box(self, stream: Stream, seen: int) -> End | None:
        assert stream.closing_at is not None
        assert stream.closing_for is not None
        at = stream.closing_at
        length, _ = self.boxed((), stream.tokens[at:], seen - at)
        if length is None:
            return None
        return End(ending=stream.closing_for, finish=FinishReason.LENGTH, length=at + length)

    def _by_box(self, stream: Stream, seen: int) -> End | None:
        if not self._at_box:
            return None
        for length in _positions(seen, len(stream.tokens), _BOX_EVERY):
            window = self._decode(stream.tokens[max(0, length - _BOX_EVERY - _BOX_WINDOW) : length])
            # "\boxed 5" may go on with more digits, so what stands at the very end does not count yet.
            if self.read(extract_box(window.rstrip("0123456789.,/"))) is not None:
                return End(ending=Ending.BOX, finish=FinishReason.STOP, length=length)
        return None

    def _by_loop(self, stream: Stream, seen: int) -> End | None:
        if not self._loops:
            return None
        for length in _positions(seen, len(stream.tokens), _LOOP_EVERY):
            stream.chunks.append(self._decode(stream.tokens[length - _LOOP_EVERY : length]))
            if is_looping("".join(stream.chunks)):
                return End(ending=Ending.LOOP, finish=FinishReason.CANCELLED, length=length)
        return None


def _positions(seen: int, length: int, every: int) -> range:
    """The multiples of ``every`` in (seen, length]."""
    return range((seen // every + 1) * every, length + 1, every)
