"""*Lookup*: drafts without a draft head, from what was written after the same tokens before.

Long reasoning repeats itself: its formulas, its numbers, its turns of phrase; and the samples of one problem repeat
each other. So a row's next tokens are often those that followed the last time its latest tokens were written, in its
prompt, in its own text or in a sibling's. Of the places where the latest two tokens stand, those are drafted whose text
before agrees longest with the row's, the most recent first. (Prompt lookup, apoorvumang/prompt-lookup-decoding; the
links from place to place are those of LZ77 compressors; the siblings are what a vote brings along.)

The target decides on the drafts as on any other, so tokens do not depend on them. Pure Python, plain data; about 15 us
for a row and step. Letters: R rows, B beams, L drafted tokens per beam.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from drafter.config import TreeShape
from trtkit.runtime.scheduler import Prefix, Row

__all__ = ["GUESS", "LOOKED_UP", "LOOKUP_TREES", "Lookup", "SharedText"]

LOOKUP_TREES: tuple[TreeShape | None, ...] = (
    None,
    TreeShape(beams=1, length=2),
    TreeShape(beams=1, length=3),
    TreeShape(beams=1, length=4),
    TreeShape(beams=1, length=8),
    TreeShape(beams=2, length=4),
    TreeShape(beams=4, length=4),
)
"""What the engine chooses from: a long draft costs nothing to make here, unlike a head's."""

GUESS = TreeShape(beams=1, length=8)
"""What is guessed on the side, see :meth:`Lookup.check`."""

LOOKED_UP: Mapping[TreeShape, Sequence[float]] = {
    TreeShape(beams=1, length=8): (0.44, 0.26, 0.18, 0.14, 0.11, 0.09, 0.08, 0.07),
    TreeShape(beams=2, length=4): (0.52, 0.35, 0.26, 0.21),
    TreeShape(beams=4, length=4): (0.56, 0.39, 0.29, 0.24),
}
"""Shares of steps that accepted at least 1, 2, ... drafts on public traces of a 1.5B model (``docs/solver.md``):
where the choice begins."""

_PLACES = 16
"""Places that are compared for a draft."""
_AGREEMENT = 16
"""Tokens before a place that are compared; more agreement makes no better a draft."""
_MOST_TOKENS = 2 << 20
"""Beyond so many (20 to 40 bytes each) the text of a prompt begins anew: a server may be asked one thing for ever."""
_SHARE_READ_AGAIN = 4
"""Of that, one part in so many is left to what is read again then: the samples may hold more than all of it."""
_NOWHERE = -1


class _Text:
    """One sample: its tokens, behind the last few of its prompt."""

    __slots__ = ("earlier", "number", "tokens")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = array("i")
        self.earlier = array("q")
        """For each token, the place where the two before it stood the last time, before some other token."""


class SharedText:
    """What the samples of one prompt have written so far, and where each pair of tokens was last followed by what.

    A place is a text's number and a position in it, in one integer: where a continuation begins.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._texts: list[_Text] = []
        self.size = 0
        """Tokens, of all samples."""
        self._after_pair: dict[int, int] = {}
        self._after_token: dict[int, int] = {}
        self._tail = tuple(prompt[-_AGREEMENT:])
        """Where each sample begins: a row's first drafts need something to look up."""
        self._extend(self._new(), prompt)

    def begin(self) -> int:
        """The number of a new sample."""
        text = self._new()
        text.tokens.extend(self._tail)
        text.earlier.extend([_NOWHERE] * len(self._tail))  # the prompt's own text has their places
        return text.number

    def _new(self) -> _Text:
        self._texts.append(_Text(len(self._texts)))
        return self._texts[-1]

    def write(self, number: int, tokens: Sequence[int]) -> None:
        """Sample ``number`` goes on with ``tokens``."""
        self._extend(self._texts[number], tokens)

    def _extend(self, text: _Text, tokens: Sequence[int]) -> None:
        """Add tokens to a text, and to what leads to them."""
        written = text.tokens
        self.size += len(tokens)
        for token in tokens:
            position = len(written)
            place, earlier = text.number << 32 | position, _NOWHERE
            if position >= 1:
                self._after_token[written[-1]] = place
            if position >= 2:
                pair = written[-2] << 32 | written[-1]
                earlier = self._after_pair.get(pair, _NOWHERE)
                self._after_pair[pair] = place
            text.earlier.append(earlier)
            written.append(token)

    def draft(self, number: int, beams: int, length: int) -> list[list[int]]:
        """Up to ``beams`` different continuations of sample ``number``, ``length`` tokens each, the best one first."""
        drafts: list[list[int]] = []
        for place in self._places(self._texts[number].tokens):
            tokens = self._from(place, length)
            if tokens not in drafts:
                drafts.append(tokens)
            if len(drafts) == beams:
                break
        return drafts

    def _places(self, written: Sequence[int]) -> Iterator[int]:
        """Where what ends like ``written`` goes on: by agreement, then the most recent first."""
        found: list[tuple[int, int, int]] = []
        if len(written) >= 2:
            place = self._after_pair.get(written[-2] << 32 | written[-1], _NOWHERE)
            while place != _NOWHERE and len(found) < _PLACES:
                text, position = self._at(place)
                found.append((-_agreement(written, text.tokens, position), len(found), place))
                place = text.earlier[position]
        yield from (place for _, _, place in sorted(found))
        if written and (place := self._after_token.get(written[-1], _NOWHERE)) != _NOWHERE:
            yield place

    def _from(self, place: int, length: int) -> list[int]:
        """``length`` tokens from ``place`` on; where the text ends, what was copied is copied on."""
        text, position = self._at(place)
        tokens = list(text.tokens[position : position + length])
        for index in range(length - len(tokens)):
            tokens.append(tokens[index])
        return tokens

    def _at(self, place: int) -> tuple[_Text, int]:
        return self._texts[place >> 32], place & 0xFFFFFFFF


def _agreement(written: Sequence[int], other: Sequence[int], position: int) -> int:
    """How many tokens before ``position`` of ``other`` are those at the end of ``written``; at least two are."""
    most = min(_AGREEMENT, position, len(written))
    count = 2
    while count < most and other[position - 1 - count] == written[-1 - count]:
        count += 1
    return count


def _agreeing(guess: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of ``guess`` those that came begin with."""
    wrong = (count for count, (one, other) in enumerate(zip(guess, tokens, strict=False)) if one != other)
    return next(wrong, min(len(guess), len(tokens)))


class _Siblings:
    """The text of the rows that have one prompt."""

    def __init__(self, prefix: Prefix, prompt: Sequence[int]) -> None:
        self.prefix = prefix
        self.text = SharedText(prompt)
        self.written: dict[int, tuple[int, int]] = {}
        """By the row's order: its number in the text, and how many of its tokens are written there."""
        self.guesses: dict[int, tuple[int, list[int]]] = {}
        """By the row's order: how many tokens it had when it guessed, and which would come."""


class Lookup:
    """Drafts for the rows of an engine. Every call follows from the rows' tokens alone: ranks draft the same."""

    def __init__(self) -> None:
        self._siblings: dict[int, _Siblings] = {}

    def draft(self, rows: Sequence[Row], shape: TreeShape) -> npt.NDArray[np.int64] | None:
        """int64 (R, B, L); a row without a draft, and beams that are missing, repeat something harmless. None when no
        row has a draft."""
        drafts = np.empty((len(rows), shape.beams, shape.length), dtype=np.int64)
        any_found = False
        for index, row in enumerate(rows):
            siblings = self._siblings_of(row)
            found = siblings.text.draft(self._read(siblings, row), shape.beams, shape.length)
            any_found = any_found or bool(found)
            found = found or [[row.tokens[-1]] * shape.length]
            drafts[index] = found + found[:1] * (shape.beams - len(found))
        return drafts if any_found else None

    def check(self, rows: Sequence[Row]) -> list[int]:
        """How many tokens in a row came as they were guessed, for each row that has written a guess's length since; it
        then guesses anew. So it is known what chains of ``GUESS`` are worth while a step takes something else."""
        right: list[int] = []
        for row in rows:
            siblings = self._siblings_of(row)
            if row.order in siblings.guesses:
                at, guess = siblings.guesses[row.order]
                if len(row.tokens) < at + GUESS.length:
                    continue
                right.append(_agreeing(guess, row.tokens[at:]))
            found = siblings.text.draft(self._read(siblings, row), 1, GUESS.length)
            siblings.guesses[row.order] = (len(row.tokens), found[0] if found else [])
        return right

    def rewritten(self, row: Row) -> None:
        """Some of the row's tokens were taken back: it is a new sample from here on."""
        siblings = self._siblings.get(id(row.prefix))
        if siblings is not None:
            siblings.written.pop(row.order, None)
            siblings.guesses.pop(row.order, None)

    def _siblings_of(self, row: Row) -> _Siblings:
        found = self._siblings.get(id(row.prefix))
        if found is None or found.text.size > _MOST_TOKENS:
            # A problem begins: those that are over are forgotten.
            self._siblings = {key: kept for key, kept in self._siblings.items() if kept.prefix.requests}
            found = self._siblings[id(row.prefix)] = _Siblings(row.prefix, row.request.prompt)
        return found

    def _read(self, siblings: _Siblings, row: Row) -> int:
        """Take over what the row has written since the last look; its number in the text."""
        if row.order in siblings.written:
            number, done = siblings.written[row.order]
        else:
            most = _MOST_TOKENS // (_SHARE_READ_AGAIN * max(1, row.prefix.requests))
            number, done = siblings.text.begin(), max(len(row.request.prompt), len(row.tokens) - most)
        siblings.text.write(number, row.tokens[done:])
        siblings.written[row.order] = (number, len(row.tokens))
        return number
