"""From the text of a sample to its answer: the last complete ``\\boxed{}``, in a form that can be counted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from trtkit.chat import THINK_END
from trtkit.errors import UsageError
from trtkit.solve.arithmetic import exact_value
from trtkit.solve.canonical import canonical_text, last_side, split_modulo

__all__ = ["Answer", "AnswerMode", "extract_box", "read_answer"]

# Escaped braces are no groups. Several backslashes before boxed come from text that was escaped twice.
_TOKEN = re.compile(r"(?P<box>\\+(?:boxed|fbox)(?![A-Za-z]))\s*(?P<bare>[-+]?[0-9][0-9.,/]*)?|\\.|[{}]", re.DOTALL)
# What stands in a box of the instruction or of an example, not of an answer.
_PLACEHOLDERS = frozenset(
    ("", ".", "..", "...", "?", "_", "\\ldots", "\\dots", "\\cdots", "answer", "your answer", "final answer")
)
# What leaves a box blank: spaces, and what is drawn where an answer is to be put.
_BLANK = re.compile(
    r"\\(?:[,;:!_ ]|(?:q?quad|square|Box|underline|boxed|fbox)(?![A-Za-z])|[hv]?(?:space|phantom)\*?\s*\{[^{}]*\})"
    r"|(?<!\\)[{}~$\s]"
)
_LONGEST_BLANK = 100
"""Characters; longer boxes are not looked through, so that nested ones stay cheap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMode:
    """How answers are read: ``auto`` takes any expression, ``integer`` only integers (modulo ``modulus``)."""

    kind: Literal["auto", "integer"] = "auto"
    modulus: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "integer"):
            raise UsageError(f"answer mode {self.kind!r}: must be auto or integer")
        if self.modulus is not None and (self.kind != "integer" or self.modulus < 1):
            raise UsageError(
                f"modulus {self.modulus}: must be at least 1, and needs the answer mode integer",
                hint="for AIMO: --answer-mode integer --modulus 1000",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer that can be compared. Equal keys mean equal answers; others may be equal too (``Grader``)."""

    raw: str
    """What stood in the box, before any reduction."""
    key: str
    """``42``, ``-3/8``, or the normalised expression."""
    value: Fraction | None
    """The exact value where the answer is a number."""


def extract_box(text: str) -> str | None:
    """Content of the last complete, non-empty box: the last one after ``</think>``, else the last one inside.

    Understands ``\\boxed{x}``, ``\\boxed {x}``, ``\\boxed 5`` and ``\\fbox{x}``. A box that the token limit
    cut off does not count; the complete one before it does. Linear in the length of the text.
    """
    thought, closed, rest = text.rpartition(THINK_END)
    found = _last_box(rest)
    return _last_box(thought) if found is None and closed else found


def read_answer(box: str | None, mode: AnswerMode) -> Answer | None:
    """The box's content as an :class:`Answer`; None for no box, and for a non-integer in integer mode.

    ``3.14`` is not an integer, ``42.0`` is. With a modulus, values from 0 up are reduced; negative ones
    stay as they are, because whether -5 means 995 is not ours to guess. ``raw`` keeps what was written.
    """
    text = canonical_text(box or "")
    if box is None or not text:
        return None
    value = exact_value(text)
    if mode.kind == "auto":
        return Answer(raw=box, key=text if value is None else str(value), value=value)
    if value is None:
        value = _last_value(text)
    if value is None or value.denominator != 1:
        return None
    if mode.modulus is not None and value >= 0:
        value = Fraction(value.numerator % mode.modulus)
    return Answer(raw=box, key=str(value), value=value)


def _last_value(text: str) -> Fraction | None:
    """The value of an equation's last side; where it is taken modulo a number, the remainder."""
    said, modulo = split_modulo(text)
    value = exact_value(last_side(said))
    if value is None or modulo is None:
        return value
    modulus = exact_value(modulo)
    return value % modulus if modulus is not None and modulus >= 1 else None


def _last_box(text: str) -> str | None:
    """One pass with a stack of open braces: thousands of unclosed boxes cost no more than their length."""
    open_at: list[tuple[int, int | None]] = []  # (where the content starts, where its box starts)
    best: tuple[int, str] | None = None
    pending: tuple[int, int] | None = None  # (start of a box command, where its brace would have to stand)
    for token in _TOKEN.finditer(text):
        symbol = token.group()
        if token.group("box"):
            pending = (token.start(), token.end())
            if token.group("bare"):
                best = _better(best, token.start(), token.group("bare").rstrip(".,/"), token.group("box"))
        elif symbol == "{":
            box = pending[0] if pending is not None and pending[1] == token.start() else None
            open_at.append((token.end(), box))
        elif symbol == "}" and open_at:
            start, box = open_at.pop()
            if box is not None:
                command = text[box : box + 2]
                best = _better(best, box, text[start : token.start()], command)
    return best[1] if best else None


def _better(best: tuple[int, str] | None, start: int, content: str, command: str) -> tuple[int, str] | None:
    """The box that begins later, unless it is empty. An inner box begins later than the one around it."""
    if best is not None and best[0] > start:
        return best
    if command.startswith("\\\\"):
        content = content.replace("\\\\", "\\")
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", content).strip()
    blank = len(content) <= _LONGEST_BLANK and not _BLANK.sub("", content)
    if blank or bare.lower() in _PLACEHOLDERS:
        return best
    return start, content.strip()
