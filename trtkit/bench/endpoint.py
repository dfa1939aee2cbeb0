"""``measure_server``: how fast a running server decodes, counted as engines are."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from trtkit.bench.engines import BenchOptions, prompts_of, time_once
from trtkit.errors import UsageError
from trtkit.log import logger
from trtkit.runtime.endpoint.remote import Remote
from trtkit.runtime.load import OpenOptions

__all__ = ["ServerPoint", "measure_server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPoint:
    """A server at one batch size. Medians of the repeats."""

    endpoint: str
    model: str
    batch: int
    tokens_per_second: float
    """Decoding, all requests together, from when each has its first token to the end of the last."""
    first_token_seconds: float
    """Until each of the requests, sent at once, has its first token."""


def measure_server(remote: Remote, options: BenchOptions) -> Iterator[ServerPoint]:
    """Ask ``batch`` completions at once and count, after one count to warm up, for each of the batch sizes.

    Every request goes on for ``new_tokens``, past the ends of turns where the server can. Raises :class:`UsageError`
    for more tokens than it takes, and what a run on it raises.
    """
    prompts = prompts_of(remote.chat, remote.chat.size, options)
    asked = max(map(len, prompts))
    for batch in options.batches:
        logger.info("measuring %s at batch %d", remote.told, batch)
        with remote.open(OpenOptions(rows=batch)) as engine:
            if asked + options.new_tokens + 1 > engine.max_total_tokens:
                raise UsageError(
                    f"{asked} prompt and {options.new_tokens} new tokens exceed the server's {engine.max_total_tokens}",
                    hint="lower --prompt-tokens or --new-tokens",
                )
            counts = [time_once(engine, prompts, batch, options, repeat) for repeat in range(options.repeats + 1)][1:]
        yield ServerPoint(
            endpoint=remote.endpoint.url, model=remote.model, batch=batch,
            tokens_per_second=statistics.median(count.tokens_per_second for count in counts),
            first_token_seconds=statistics.median(count.first_seconds for count in counts),
        )  # fmt: skip
