"""What servers want to be told for one request, and how they put what they say. Pure.

All take OpenAI's fields of ``POST /v1/completions``. What a vote needs beyond them (token ids both ways, other cuts,
stop ids) every server spells in its own way. Read in the sources of vLLM 0.32 (entrypoints/openai/completion), SGLang
(srt/entrypoints/openai/protocol.py), TensorRT-LLM's trtllm-serve (serve/openai_protocol.py, postprocess_handlers.py)
and llama.cpp (tools/server/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtkit.errors import UsageError
from trtkit.runtime.api import SamplingParams

__all__ = ["DIALECTS", "OTHER", "Dialect", "Said", "body_of", "check_sampling", "complaint_of", "read_chunk"]

_MOST_STOP_TEXTS = 4
"""OpenAI's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one kind of server is spoken to."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Sent with every request: they ask for token ids, and keep a model's ``generation_config.json`` from changing how
    tokens are drawn."""
    ids: bool = True
    """It reports token ids. Else its text is put into tokens here."""
    no_top_k: int | None = None
    """The ``top_k`` that cuts nothing; None: left out then, as is ``min_p`` 0."""
    stop_ids: bool = True
    """It takes ``stop_token_ids``; else texts."""
    runs_on: bool = True
    """It takes ``ignore_eos``, without which it ends every turn where the model does."""
    seed_bits: int = 31
    logprobs: int = 0
    """What asks for the log-probability of the tokens themselves."""
    exact: bool = False
    """Noise by (seed, position), as in the torch runtime: a part that goes on elsewhere needs no seed of its own."""


_PLAIN = {"skip_special_tokens": False, "repetition_penalty": 1.0}
OTHER = Dialect(name="other", ids=False, stop_ids=False, runs_on=False)
DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(name="trtkit", fields={"return_token_ids": True}, no_top_k=0, seed_bits=64, exact=True),
        Dialect(name="vllm", fields={**_PLAIN, "return_token_ids": True}, no_top_k=-1),
        Dialect(name="sglang", fields={**_PLAIN, "return_token_ids": True}, no_top_k=-1),
        # It refuses fields that it does not know.
        Dialect(name="tensorrt_llm", fields={**_PLAIN, "detokenize": False}, no_top_k=0, logprobs=1),
        Dialect(
            name="llamacpp", fields={"cache_prompt": True, "repeat_penalty": 1.0}, ids=False, stop_ids=False, no_top_k=0
        ),
    )
}
"""By what a server's list of models calls their owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One event of a stream."""

    text: str = ""
    ids: tuple[int, ...] | None = None
    """None where the server does not say them."""
    logprobs: tuple[float, ...] = ()
    finish: str | None = None
    stop: int | str | None = None
    """The stop id or text that ended it; None for the end of a turn, and where the server does not say."""


def check_sampling(dialect: Dialect, sampling: SamplingParams, *, logprobs: bool) -> None:
    """Raise :class:`UsageError` for what cannot be asked of the server."""
    if sampling.switch is not None:
        raise UsageError(
            "a server cannot penalize thought switches: that changes logits between forward and sampling",
            hint="leave the penalty off, or solve with an engine directory",
        )
    if logprobs and not dialect.ids:
        raise UsageError(
            "this server reports no token ids, so that log-probabilities cannot be told apart",
            hint="weigh votes by something else than confidence",
        )


def body_of(
    dialect: Dialect, *, model: str, prompt: Sequence[int], sampling: SamplingParams, stop_ids: Sequence[int],
    stop_texts: Sequence[str], ends: bool, max_tokens: int, seed: int | None, logprobs: bool,
) -> dict[str, Any]:  # fmt: skip
    """The body of ``POST /v1/completions``. ``stop_texts`` are for servers that take no ids; ``ends``: the end of a
    turn is one of the stops."""
    body: dict[str, Any] = {
        "model": model, "prompt": list(prompt), "max_tokens": max_tokens, "stream": True,
        "temperature": sampling.temperature, "top_p": sampling.top_p, **dialect.fields,
    }  # fmt: skip
    if seed is not None:
        body["seed"] = seed % (1 << dialect.seed_bits)
    top_k = sampling.top_k or dialect.no_top_k
    if top_k is not None:
        body["top_k"] = top_k
    if sampling.min_p > 0 or dialect.no_top_k is not None:
        body["min_p"] = sampling.min_p
    if dialect.stop_ids:
        body["stop_token_ids"] = list(stop_ids)
    elif stop_texts:
        body["stop"] = list(stop_texts[:_MOST_STOP_TEXTS])
    if not ends and dialect.runs_on:
        body["ignore_eos"] = True
    if logprobs:
        body["logprobs"] = dialect.logprobs
    return body


def read_chunk(document: Mapping[str, Any]) -> Said | None:
    """One event of a stream; None for one that is about no choice, such as the token counts.

    Raises whatever comes of reading what is no completion.
    """
    if not document["choices"]:
        return None
    choice = document["choices"][0]
    ids = choice.get("token_ids")
    scores = (choice.get("logprobs") or {}).get("token_logprobs") or ()
    stop = choice.get("stop_reason")
    return Said(
        text=str(choice.get("text") or ""),
        ids=None if ids is None else tuple(int(token) for token in ids),
        logprobs=tuple(0.0 if score is None else float(score) for score in scores),
        finish=choice.get("finish_reason"),
        stop=choice.get("matched_stop") if stop is None else stop,
    )


def complaint_of(text: str, decode: Callable[[str], Any]) -> str:
    """What a server says of a request that it refuses, whatever form it gives that; ``decode`` reads JSON."""
    try:
        document = decode(text)
    except ValueError:
        document = None
    while isinstance(document, Mapping):
        document = next((document[name] for name in ("error", "message", "detail") if document.get(name)), None)
    said = text if document is None else str(document)
    return " ".join(said.split())[:500] or "no reason given"
