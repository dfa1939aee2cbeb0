"""Code in the model's text: recognising a call when it is complete, and the reply that goes back into the row.

Two formats, those of the published systems (NVIDIA's OpenMath models were trained on both)::

    ```python                     <tool_call>
    print(6 * 7)                  print(6 * 7)
    ```                           </tool_call>
    ```output                     ```output
    42                            42
    ```                           ```

Inside ``<tool_call>`` may also stand the JSON of a function call, ``{"name": ..., "arguments": {"code": ...}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtkit.solve.sandbox import CallResult, SandboxOptions

__all__ = ["CodeCall", "end_of_call", "find_call", "reply"]

_TOOL_END = "</tool_call>"
_MARKS = ("```", _TOOL_END)
"""No call is complete before one of these."""
_OPENING = re.compile(r"<tool_call>|^[ \t]*```[ \t]*(?P<language>[^\s`]*)[^\n`]*\n", re.MULTILINE)
_CLOSING = re.compile(r"^[ \t]*```[ \t]*$", re.MULTILINE)
_PYTHON = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)\b[^\n`]*\n", re.MULTILINE | re.IGNORECASE)
_SPECIAL = re.compile(r"<(?=/?(?:seed:)?think>|/?tool_call>|/?tool_response>|[|\uff5c])")
_CUT = "<output cut>"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeCall:
    """A complete call. ``end`` is the number of characters of the text up to and including its closing mark."""

    code: str
    end: int


def find_call(text: str) -> CodeCall | None:
    """The first complete call in ``text``. Blocks in other languages are passed over."""
    place = 0
    while (opening := _OPENING.search(text, place)) is not None:
        if opening["language"] is None:
            end = text.find(_TOOL_END, opening.end())
            return CodeCall(code=_argument(text[opening.end() : end]), end=end + len(_TOOL_END)) if end >= 0 else None
        closing = _CLOSING.search(text, opening.end())
        if _PYTHON.match(text, opening.start()):
            return CodeCall(code=text[opening.end() : closing.start()], end=closing.end()) if closing else None
        # A stray fence must not swallow the Python block behind it.
        python = _PYTHON.search(text, opening.end())
        if closing is None or (python is not None and python.start() < closing.start()):
            place = opening.end()
        else:
            place = closing.end()
    return None


def end_of_call(
    tokens: Sequence[int], seen: int, decode: Callable[[Sequence[int]], str], *, since: int = 0
) -> tuple[int, CodeCall] | None:
    """How many of ``tokens`` it takes until a call is complete, and the call, if that is after the first ``seen``.

    Calls begin at token ``since`` at the earliest: where the model went on after the last reply. Only a few tokens are
    decoded unless a mark completes. The result does not depend on how the stream was cut into steps.
    """
    start = max(since, seen - max(len(mark) for mark in _MARKS) + 1)
    news = decode(tokens[start:])
    if not any(mark in news for mark in _MARKS):
        return None
    for end in range(seen + 1, len(tokens) + 1):
        call = find_call(decode(tokens[since:end]))
        if call is not None:
            return end, call
    return None


def reply(result: CallResult, options: SandboxOptions, *, calls_left: int, fresh_line: bool, anew: bool = False) -> str:
    """What the row gets to read: the head of what the code printed, and what went wrong.

    ``fresh_line`` says whether the model's text already ends with a line break; ``anew``, that the code ran without the
    names of the blocks before it. With no calls left the model is told.
    """
    shown = [_head(result.output, options.output_characters), _head(result.errors, options.output_characters)]
    if result.status == "cut" and not any(_CUT in part for part in shown):
        shown.append(_CUT)  # nothing but blank lines
    if result.status == "timeout":
        shown.append(f"TimeoutError: stopped after {options.seconds:g} seconds")
    elif result.status == "killed":
        shown.append(f"the code crashed ({result.reason}); what this block defined is lost")
    elif result.status in ("broken", "dropped"):
        shown.append("the code could not be run")
    if anew:
        shown.append("Python was started anew: what earlier blocks defined is lost")
    body = "".join(part + "\n" for part in shown if part)
    text = f"{'' if fresh_line else chr(10)}```output\n{_SPECIAL.sub('< ', body)}```\n"
    if calls_left <= 0:
        text += "```system\nNo code calls are left. Go on without code.\n```\n"
    return text


def _head(text: str, characters: int) -> str:
    text = text.strip()
    return text if len(text) <= characters else text[:characters] + _CUT


def _argument(text: str) -> str:
    """The code in a tool call: as it stands, inside a fence, or as an argument in JSON."""
    stripped = text.strip()
    if stripped.startswith("{"):
        try:
            call = json.loads(stripped)
            arguments = call.get("arguments", call)
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if isinstance(arguments["code"], str):
                return str(arguments["code"])
        except (ValueError, TypeError, KeyError, AttributeError):
            pass  # Python that begins with a brace
    inner = find_call(stripped) if stripped.startswith("```") else None
    return inner.code if inner is not None else text.strip("\n")
