"""What the server says, in OpenAI's forms: chat completions, completions, the chunks of both, errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtkit.errors import CapacityError, EngineError, TrtkitError

__all__ = ["ChatReplies", "CompletionReplies", "Piece", "Replies", "Scored", "error_reply", "usage", "written"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A token with its log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What has come of one choice since its last piece; a whole choice where nothing is streamed."""

    index: int
    text: str = ""
    thought: str | None = None
    """Where the server keeps it apart from the text."""
    scored: tuple[Scored, ...] | None = None
    """None where they were not asked for."""
    offset: int = 0
    """Characters of the scored tokens before this piece."""
    finish: str | None = None
    """``stop`` or ``length`` in its last piece."""
    stop: int | str | None = None
    """There, too: the id or the text that ended it, where the client had asked for that."""
    tokens: int = 0
    """Tokens behind it."""
    ids: tuple[int, ...] | None = None
    """What they are; None where that was not asked for."""
    prompt: tuple[int, ...] | None = None
    """In its first piece, what the prompt's tokens are, where that was asked for."""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """``usage``: a prompt counts once, however many choices it has."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies(ABC):
    """Writes the answers to one request."""

    id: str
    created: int
    """Unix seconds."""
    model: str

    @abstractmethod
    def whole(self, pieces: Sequence[Piece], counts: dict[str, int]) -> dict[str, Any]:
        """The answer as one document."""

    @abstractmethod
    def opening(self, choices: int, prompt: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
        """The chunks that a stream begins with; ``prompt`` as in a first piece."""

    @abstractmethod
    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One chunk of a stream."""

    @abstractmethod
    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream, where it was asked for."""

    def _frame(self, kind: str, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return frame if counts is None else {**frame, "usage": counts}


class ChatReplies(Replies):
    """``/v1/chat/completions``."""

    def whole(self, pieces: Sequence[Piece], counts: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", **_said(piece)},
                "logprobs": _chat_logprobs(piece),
                **_end(piece),
            }
            for piece in pieces
        ]
        return {**self._frame("chat.completion", choices, counts), **_prompt_ids(pieces[0].prompt)}

    def opening(self, choices: int, prompt: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": ""}
        ids = None if prompt is None else ()
        chunks = [self._chunk(Piece(index=index, ids=ids), said) for index in range(choices)]
        return [{**chunk, **_prompt_ids(prompt)} for chunk in chunks]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._chunk(piece, _said(piece, brief=True))

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        return self._frame("chat.completion.chunk", [], counts)

    def _chunk(self, piece: Piece, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": piece.index, "delta": delta, "logprobs": _chat_logprobs(piece), **_end(piece)}
        return self._frame("chat.completion.chunk", [choice])


class CompletionReplies(Replies):
    """``/v1/completions``."""

    def whole(self, pieces: Sequence[Piece], counts: dict[str, int]) -> dict[str, Any]:
        return self._frame("text_completion", list(map(_completion_choice, pieces)), counts)

    def opening(self, choices: int, prompt: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return self._frame("text_completion", [_completion_choice(piece)])

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        return self._frame("text_completion", [], counts)


def _said(piece: Piece, *, brief: bool = False) -> dict[str, Any]:
    """The text and the thought; ``brief`` leaves out what is empty."""
    said: dict[str, Any] = {"content": piece.text}
    if piece.thought is not None:
        said["reasoning_content"] = piece.thought
    return {name: text for name, text in said.items() if text} if brief else said


def _end(piece: Piece) -> dict[str, Any]:
    """What ended a choice, and its ids."""
    end = {"finish_reason": piece.finish, "stop_reason": piece.stop}
    return end if piece.ids is None else {**end, "token_ids": list(piece.ids)}


def _prompt_ids(ids: tuple[int, ...] | None) -> dict[str, Any]:
    return {} if ids is None else {"prompt_token_ids": list(ids)}


def _chat_logprobs(piece: Piece) -> dict[str, Any] | None:
    if piece.scored is None:
        return None
    return {
        "content": [
            {"token": it.text, "logprob": it.logprob, "bytes": _bytes(it.text), "top_logprobs": []}
            for it in piece.scored
        ]
    }


def _bytes(text: str) -> list[int] | None:
    """Of a token; None where it is a part of a character, which ``text`` does not show."""
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


def _completion_choice(piece: Piece) -> dict[str, Any]:
    logprobs = None
    if piece.scored is not None:
        offsets, place = [], piece.offset
        for it in piece.scored:
            offsets.append(place)
            place += len(it.text)
        logprobs = {
            "tokens": [it.text for it in piece.scored],
            "token_logprobs": [it.logprob for it in piece.scored],
            "top_logprobs": None,
            "text_offset": offsets,
        }
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, **_end(piece), **_prompt_ids(piece.prompt)}


def error_reply(problem: TrtkitError, *, status: int | None = None) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) for what went wrong. What the engine cannot help is 500, the rest is the client's: 400."""
    if status is None:
        status = 500 if isinstance(problem, (EngineError, CapacityError)) else 400
    lines = [problem.message, *problem.offenders]
    text = lines[0] if len(lines) == 1 else f"{lines[0]}: {'; '.join(lines[1:])}"
    if problem.hint:
        text += f" ({problem.hint})"
    text = written(text)
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"error": {"message": text, "type": kind, "param": None, "code": None}}


def written(text: str) -> str:
    """``text`` as it can be sent: what is no whole character is escaped."""
    return text.encode(errors="backslashreplace").decode()
