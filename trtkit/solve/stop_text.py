"""Finding ``</think>`` in a stream of tokens where the vocabulary has no single token for it.

The same text can be split in several ways (``>`` merges with a following newline), so the text is matched,
not the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["end_of_text"]


def end_of_text(tokens: Sequence[int], seen: int, text: str, decode: Callable[[Sequence[int]], str]) -> int | None:
    """How many of ``tokens`` it takes until ``text`` is complete, if it completes after the first ``seen``
    of them.

    Only the new tokens and a short overlap are decoded. ``text`` must be ASCII: then it spans at most
    ``len(text)`` tokens, since each of them holds at least one of its bytes. The result does not depend on
    how the stream was cut into steps.
    """
    start = max(0, seen - len(text) + 1)
    if text not in decode(tokens[start:]):
        return None
    for end in range(seen + 1, len(tokens) + 1):
        if text in decode(tokens[max(start, end - len(text)) : end]):
            return end
    return None
