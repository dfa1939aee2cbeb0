"""Which model a server has, and what kind of server it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trtkit.errors import EngineError, UsageError
from trtkit.files import nearest
from trtkit.runtime.endpoint.client import Client
from trtkit.runtime.endpoint.dialects import DIALECTS, OTHER, Dialect, complaint_of

__all__ = ["KEY_VARIABLE", "Endpoint", "Server", "endpoint_named", "look_at"]

KEY_VARIABLE = "TRTKIT_ENDPOINT_KEY"
"""Holds what the server wants to be shown: a command line can be read by everybody on the machine."""
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server, as a user names it. See :func:`endpoint_named`."""

    url: str
    """Ends with ``/v1``."""
    model: str | None = None
    """None: the only one that it has."""
    rows: int | None = None
    """Most requests that are open at once; None: what the server says, else ``ROWS`` of ``engine.py``."""
    seeds: bool = True
    """Give every sample its seed. Some servers draw faster without, and vLLM's CPU engine (0.32) dies of one."""
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a server says of itself."""

    model: str
    dialect: Dialect
    source: str | None = None
    """The checkpoint that it serves: a hub id, or a directory on its machine."""
    total_tokens: int | None = None
    """Longest prompt + output of one request."""
    rows: int | None = None
    """Requests that it runs at once."""


def endpoint_named(
    url: str, *, model: str | None = None, rows: int | None = None, seeds: bool = True
) -> Endpoint:  # fmt: skip
    """``http://host:8000`` or ``http://host:8000/v1``; the key is the environment's. Raises :class:`UsageError`."""
    try:
        parts = urlsplit(url.strip())
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or bool(parts.query or parts.fragment)
        _ = parts.port
    except ValueError:  # of a bracket or a port
        wrong = True
    if wrong:
        raise UsageError("is not the address of a server", where=f"--endpoint {url}", hint="http://HOST:PORT/v1")
    path = parts.path.rstrip("/")
    for tail in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(tail)
    path = path if path.endswith("/v1") else f"{path}/v1"
    key = os.environ.get(KEY_VARIABLE) or None
    return Endpoint(url=f"{parts.scheme}://{parts.netloc}{path}", model=model, rows=rows, seeds=seeds, key=key)


def look_at(endpoint: Endpoint) -> Server:
    """Ask the server what it is.

    Raises :class:`EngineError` when it cannot be reached or does not speak like OpenAI's, :class:`UsageError` for a
    model that it does not have and where it has several.
    """
    with Client(endpoint.url, key=endpoint.key, most=1) as client:
        cards = _cards(client, endpoint)
        card = _chosen(cards, endpoint)
        dialect = DIALECTS.get(str(card.get("owned_by", "")).lower(), OTHER)
        rows, total = _whole(card.get("max_rows")), _whole(card.get("max_model_len"))
        if dialect.name == "llamacpp":
            rows, total = _slots(client, endpoint)
    source = card.get("root")
    return Server(
        model=str(card["id"]), dialect=dialect, source=source if isinstance(source, str) else None,
        total_tokens=total, rows=rows,
    )  # fmt: skip


def _cards(client: Client, endpoint: Endpoint) -> list[Mapping[str, Any]]:
    url = f"{endpoint.url}/models"
    try:
        status, text = client.get(url, _PATIENCE_SECONDS)
    except OSError as problem:
        raise EngineError(
            f"the server cannot be reached: {problem}",
            where=endpoint.url,
            hint="is it running, and has it loaded?",
        ) from None
    if status in (401, 403):
        raise EngineError(
            f"the server wants a key: {complaint_of(text, json.loads)}", where=endpoint.url,
            hint=f"export {KEY_VARIABLE}=KEY",
        )  # fmt: skip
    try:
        cards = json.loads(text)["data"] if status == 200 else []
    except (ValueError, TypeError, KeyError):
        cards = []
    cards = [card for card in cards if isinstance(card, dict) and card.get("id")] if isinstance(cards, list) else []
    if not cards:
        raise EngineError(
            f"does not list any model (status {status})", where=url,
            hint="--endpoint takes the address of a server that speaks OpenAI's interface: http://HOST:PORT/v1",
        )  # fmt: skip
    return cards


def _chosen(cards: Sequence[Mapping[str, Any]], endpoint: Endpoint) -> Mapping[str, Any]:
    names = [str(card["id"]) for card in cards]
    if endpoint.model is not None:
        if endpoint.model not in names:
            raise UsageError(
                f"the server has no model {endpoint.model!r}{nearest(endpoint.model, names)}", where=endpoint.url,
                hint=f"it has: {', '.join(names)}",
            )  # fmt: skip
        return cards[names.index(endpoint.model)]
    # Adapters name the model below them, and our own server's second model answers by vote.
    whole = [card for card in cards if not card.get("parent") and not str(card["id"]).endswith(":maj")]
    if len(whole) != 1:
        raise UsageError(
            f"the server has {len(cards)} models", where=endpoint.url, hint="choose one with --endpoint-model",
            offenders=names[:20],
        )  # fmt: skip
    return whole[0]


def _slots(client: Client, endpoint: Endpoint) -> tuple[int | None, int | None]:
    """(rows, longest request) of a llama.cpp server, where it says."""
    try:
        status, text = client.get(f"{endpoint.url.removesuffix('/v1')}/props", _PATIENCE_SECONDS)
        props = json.loads(text) if status == 200 else {}
        return _whole(props.get("total_slots")), _whole((props.get("default_generation_settings") or {}).get("n_ctx"))
    except (OSError, ValueError, AttributeError):
        return None, None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
