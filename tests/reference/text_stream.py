"""What a sample's text is, the slow way: everything is decoded again after every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def stopped_text(
    tokens: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> tuple[str, int, bool]:
    """(text, tokens used, whether a stop string ended it)."""
    for used in range(1, len(tokens) + 1):
        text = decode(tokens[:used])
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[: min(places)], used, True
    return decode(tokens), len(tokens), False


def split_thought(text: str, *, opened: bool) -> tuple[str, str]:
    """(thought, answer) of a whole text."""
    if not opened:
        if not text.lstrip().startswith("<think>"):
            return "", text
        text = text.lstrip().removeprefix("<think>")
    thought, _, answer = text.partition("</think>")
    return thought.lstrip("\n"), answer.lstrip("\n")
