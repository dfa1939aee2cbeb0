"""``Remote``: a server that has been looked at, and the tokenizer of what it serves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.chat import Chat, load_chat
from trtkit.checkpoint.hf import resolve_source
from trtkit.errors import ConfigError, TrtkitError, UsageError
from trtkit.files import read_json
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.endpoint.dialects import check_sampling
from trtkit.runtime.endpoint.engine import EndpointEngine, open_endpoint
from trtkit.runtime.endpoint.server import Endpoint, Server, look_at

if TYPE_CHECKING:
    from trtkit.runtime.load import OpenOptions

__all__ = ["Remote", "connect"]

_PROBE = "Let $x_1 = 12345$.\n\nThen \\frac{x}{y} is \\boxed{678}, but \u03c0 \u2248 3.14159</think>\n"
"""What is put into tokens to tell one tokenizer from another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What takes the place of an engine directory. Made by :func:`connect`."""

    endpoint: Endpoint
    server: Server
    chat: Chat
    total_tokens: int | None = None
    """Longest request by the checkpoint's config.json, for servers that do not say."""

    @property
    def place(self) -> Mapping[str, str]:
        """What a run that goes on must find again, and where it was; ``seeds`` is "no" where samples are given none."""
        chat = self.chat
        said = f"{chat.size} {chat.encode(_PROBE)}"
        return {
            "path": self.endpoint.url, "model": self.server.model, "template": chat.template_digest,
            "tokenizer": hashlib.sha256(said.encode()).hexdigest(),
            **({} if self.endpoint.seeds else {"seeds": "no"}),
        }  # fmt: skip

    @property
    def model(self) -> str:
        """As the server calls it."""
        return self.server.model

    @property
    def told(self) -> str:
        """Address, model and kind of server."""
        kind = self.server.dialect.name
        return f"{self.model} at {self.endpoint.url}" + ("" if kind == "other" else f" ({kind})")

    @property
    def card(self) -> Mapping[str, str]:
        """The checkpoint, where the server says it."""
        return {"root": self.server.source or self.model}

    @property
    def greedy(self) -> bool:
        """Servers sample."""
        return False

    def open(self, options: OpenOptions | None = None, *, patient: bool = False) -> EndpointEngine:
        """An engine. Of the options it takes the rows: so many requests are open at once."""
        rows = None if options is None else options.rows
        return open_endpoint(
            self.endpoint, self.server, self.chat, rows=rows, total_tokens=self.total_tokens, patient=patient
        )

    def notices(self, sampling: SamplingParams, *, logprobs: bool = False) -> tuple[str, ...]:
        """What to say before a run. Raises :class:`UsageError` when the server cannot sample so."""
        check_sampling(self.server.dialect, sampling, logprobs=logprobs)
        if self.server.dialect.ids:
            return ()
        return ("this server reports no token ids: its text is put into tokens here, and counted so",)


def connect(endpoint: Endpoint, tokenizer: str | None = None) -> Remote:
    """Ask a server what it serves, and load the tokenizer of that.

    ``tokenizer`` is a checkpoint or engine directory, or a hub id; None: what the server says that it serves. Raises
    :class:`UsageError` where that is not to be had here, and what :func:`look_at` and :func:`load_chat` raise.
    """
    server = look_at(endpoint)
    hint = "name the checkpoint that it serves with --tokenizer: a directory, or a hub id"
    if tokenizer is not None:
        directory = resolve_source(tokenizer, weights=False)
    elif server.source is None:
        raise UsageError("the server does not say which checkpoint it serves", where=endpoint.url, hint=hint)
    else:
        try:
            directory = resolve_source(server.source, weights=False)
        except TrtkitError as problem:
            raise UsageError(
                f"the server serves {server.source}, whose tokenizer is not here: {problem.message}",
                where=endpoint.url, hint=hint,
            ) from None  # fmt: skip
    return Remote(endpoint=endpoint, server=server, chat=load_chat(directory), total_tokens=_positions(directory))


def _positions(directory: Path) -> int | None:
    """Positions that the model knows; None where nothing says so, which is no reason to refuse a tokenizer."""
    try:
        found = read_json(directory / "config.json").get("max_position_embeddings")
    except ConfigError:
        return None
    return found if isinstance(found, int) and found > 0 else None
