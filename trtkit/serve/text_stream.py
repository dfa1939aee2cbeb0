"""Tokens to text as they come: no half characters, stop strings wherever they fall, the thought apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trtkit.chat import Thought

__all__ = ["TextStream", "ThoughtSplitter"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 16
"""Tokens that are decoded again and again, rather than all of them."""


class TextStream:
    """The text of one sample.

    All pieces together are the text of all tokens, up to where the first stop string begins. Where it ends does not
    depend on how the tokens were cut into steps.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._begin = self._whole = self._shown = 0
        self._held = ""
        self.stop: str | None = None
        """The stop string that was found; what comes after it is ignored."""

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self.stop is not None

    @property
    def tokens(self) -> int:
        """How many tokens were taken, up to the one that completed a stop string."""
        return len(self._tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` add, as far as no more tokens can change it."""
        if not self._stops:
            return self._push(tokens)
        # One by one, because the token with which a stop string is complete is the last that counts.
        return "".join(self._push((token,)) for token in tokens)

    def finish(self) -> str:
        """What was held back. Nothing comes after it."""
        if self.stopped:
            return ""
        text = self._held + self._decode(self._tokens[self._begin :])[self._shown :]
        self._held, self._begin, self._shown = "", len(self._tokens), 0
        return text

    def _push(self, tokens: Sequence[int]) -> str:
        if self.stopped or not tokens:
            return ""
        self._tokens.extend(tokens)
        # Some tokens before the new ones are decoded with them: how a token reads may depend on its neighbour.
        text = self._decode(self._tokens[self._begin :])
        unfinished = len(text) - len(text.rstrip(_UNFINISHED))
        if 0 < unfinished <= _WINDOW:
            return ""
        if unfinished:  # no character is that long: all but the last sign is as it will stay
            fresh = self._held + text[self._shown : -1]
            self._begin = self._whole = len(self._tokens) - _WINDOW // 2
            self._shown = len(self._decode(self._tokens[self._begin :])) - 1
        else:
            fresh, self._shown = self._held + text[self._shown :], len(text)
            if len(self._tokens) - self._begin > _WINDOW:  # go on from the end of the last whole character before
                self._begin = self._whole
                self._shown = len(self._decode(self._tokens[self._begin :]))
            self._whole = len(self._tokens)
        places = [(place, len(stop), stop) for stop in self._stops if (place := fresh.find(stop)) >= 0]
        if places:
            place, _, self.stop = min(places)  # of those that begin there, the one that was complete first
            return fresh[:place]
        kept = _begun(fresh, self._stops)
        self._held = fresh[len(fresh) - kept :]
        return fresh[: len(fresh) - kept]


class ThoughtSplitter:
    """Cuts text into the thought and what is said after it, without the tags and the line ends after them."""

    def __init__(self, thought: Thought, *, opened: bool) -> None:
        """``opened``: the prompt has begun the thought; else it begins only where the text begins with ``<think>``."""
        self._opens, self._closes = thought.opens, thought.closes
        self._place = "thought" if opened else "start"
        self._held = ""
        self._fresh = opened
        """Nothing but line ends has come since the last tag."""

    def push(self, text: str) -> tuple[str, str]:
        """(thought, answer) that ``text`` adds."""
        return self._split(self._held + text, last=False)

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        return self._split(self._held, last=True)

    def _split(self, text: str, *, last: bool) -> tuple[str, str]:
        self._held = ""
        if self._place == "start":
            begun = text.lstrip()
            if not last and self._opens.startswith(begun) and begun != self._opens:
                self._held = text
                return "", ""
            if begun.startswith(self._opens):
                self._place, self._fresh, text = "thought", True, begun.removeprefix(self._opens)
            else:
                self._place, self._fresh = "answer", False
        if self._place == "answer":
            return "", self._trimmed(text)
        thought, tag, answer = text.partition(self._closes)
        if tag:
            thought = self._trimmed(thought)
            self._place, self._fresh = "answer", True
            return thought, self._trimmed(answer)
        kept = 0 if last else _begun(text, (self._closes,))
        self._held = text[len(text) - kept :]
        return self._trimmed(text[: len(text) - kept]), ""

    def _trimmed(self, text: str) -> str:
        """Without the line ends right after a tag."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def _begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``text`` with which a stop string may have begun."""
    longest = max(map(len, stops), default=0)
    for count in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
