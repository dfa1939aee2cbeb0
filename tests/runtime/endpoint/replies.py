"""What servers of each kind say, key for key: lists of models, streams, refusals. And which fields they take.

Written after vLLM 0.32 (entrypoints/openai/completion/serving.py), SGLang (entrypoints/openai/serving_completions.py),
trtllm-serve (serve/postprocess_handlers.py) and llama.cpp (tools/server/server-task.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.runtime.endpoint.scripted_server import Reply, Script, document, said
from trtkit.chat import Chat

DONE = b"data: [DONE]\n\n"
_OPENAI = frozenset((
    "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
))  # fmt: skip
_CUTS = {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens"}
FIELDS: Mapping[str, frozenset[str]] = {
    "other": _OPENAI,
    "vllm": _OPENAI - {"best_of"} | _CUTS | {"return_token_ids", "min_tokens", "include_stop_str_in_output"},
    "sglang": _OPENAI | _CUTS | {"return_token_ids", "min_tokens", "no_stop_trim", "lora_path"},
    "tensorrt_llm": _OPENAI | _CUTS | {"detokenize", "min_tokens", "include_stop_str_in_output", "top_p_min"},
    "llamacpp": _OPENAI | {"top_k", "min_p", "repeat_penalty", "cache_prompt", "ignore_eos", "n_probs", "id_slot"},
}
"""What each takes of a completion's body; trtllm-serve refuses everything else."""


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def frame(choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": choices, **more}


def refusal(status: int, words: str, **headers: str) -> Reply:
    """As vLLM and OpenAI put it."""
    return document(
        status, {"error": {"message": words, "type": "BadRequestError", "param": None, "code": status}}, **headers
    )


def strict(kind: str, script: Script) -> Script:
    """``script`` for bodies that a server of this kind takes, 400 for the others."""

    def answer(body: dict[str, Any]) -> Reply:
        unknown = sorted(body.keys() - FIELDS[kind])
        if not unknown:
            return script(body)
        words = f"[{{'type': 'extra_forbidden', 'loc': ('body', '{unknown[0]}')}}]"
        return document(
            400, {"object": "error", "message": words, "type": "BadRequestError", "param": None, "code": 400}
        )

    return answer


class Voice:
    """Cuts what it says into events: ``parts`` are the tokens of each. Text lags where a character is not whole yet."""

    def __init__(self, chat: Chat, parts: Sequence[Sequence[int]]) -> None:
        self._chat, self.parts = chat, [list(part) for part in parts]

    def texts(self, *, hidden: int = 0) -> Iterator[str]:
        """The text of each part; that of the last ``hidden`` tokens stays unsaid."""
        tokens = [token for part in self.parts for token in part]
        shown, seen, out = tokens[: len(tokens) - hidden], 0, ""
        for index, part in enumerate(self.parts):
            seen += len(part)
            text = self._chat.decode(shown[:seen])
            if index + 1 < len(self.parts):
                text = text.rstrip("\ufffd")
            yield text[len(out) :]
            out = text


def _logprobs(chat: Chat, tokens: Sequence[int], scores: Sequence[float]) -> dict[str, Any]:
    words = [chat.decode([token]) for token in tokens]
    return {
        "text_offset": list(range(len(words))), "token_logprobs": list(scores), "tokens": words,
        "top_logprobs": [{word: score} for word, score in zip(words, scores, strict=True)],
    }  # fmt: skip


Stream = Callable[..., Reply]


def vllm(
    chat: Chat, parts: Sequence[Sequence[int]], finish: str, *, stop: int | str | None = None,
    scores: Sequence[float] | None = None, prompt: Sequence[int] = (1,),
) -> Reply:  # fmt: skip
    """The stop id is among the ids and not in the text."""
    events, seen = [], 0
    voice = Voice(chat, parts)
    for index, text in enumerate(voice.texts(hidden=1 if finish == "stop" else 0)):
        part, last = voice.parts[index], index + 1 == len(parts)
        choice = {
            "index": 0, "text": text,
            "logprobs": None if scores is None else _logprobs(chat, part, scores[seen : seen + len(part)]),
            "finish_reason": finish if last else None, "stop_reason": stop if last else None,
            "prompt_token_ids": list(prompt) if index == 0 else None, "token_ids": part,
        }  # fmt: skip
        seen += len(part)
        events.append(event(frame([choice])))
    return said(*events, DONE)


def sglang(
    chat: Chat, parts: Sequence[Sequence[int]], finish: str, *, stop: int | str | None = None,
    scores: Sequence[float] | None = None, prompt: Sequence[int] = (1,),
) -> Reply:  # fmt: skip
    """As vLLM's, with the stop id under another name; then the counts."""
    events, seen = [], 0
    voice = Voice(chat, parts)
    for index, text in enumerate(voice.texts(hidden=1 if finish == "stop" else 0)):
        part, last = voice.parts[index], index + 1 == len(parts)
        choice = {
            "index": 0, "text": text,
            "logprobs": None if scores is None else _logprobs(chat, part, scores[seen : seen + len(part)]),
            "finish_reason": finish if last else None, "matched_stop": stop if last else None, "token_ids": part,
            **({"prompt_token_ids": list(prompt)} if index == 0 else {}),
        }  # fmt: skip
        seen += len(part)
        events.append(event(frame([choice], usage=None)))
    counts = {"prompt_tokens": 1, "total_tokens": 1 + seen, "completion_tokens": seen, "reasoning_tokens": 0}
    return said(*events, event(frame([], usage=counts)), DONE)


def trtllm(
    chat: Chat, parts: Sequence[Sequence[int]], finish: str, *, stop: int | str | None = None,
    scores: Sequence[float] | None = None, prompt: Sequence[int] = (1,),
) -> Reply:  # fmt: skip
    """With ``detokenize`` false: no text, and the stop id is swallowed."""
    events, seen = [], 0
    for index, whole in enumerate(parts):
        last = index + 1 == len(parts)
        part = list(whole[:-1] if last and finish == "stop" else whole)
        choice = {
            "index": 0, "text": "", "token_ids": part,
            "logprobs": None if scores is None else _logprobs(chat, part, scores[seen : seen + len(part)]),
            "finish_reason": finish if last else None, "stop_reason": stop if last else None,
            "avg_decoded_tokens_per_iter": 1.0,
        }  # fmt: skip
        seen += len(part)
        events.append(event(frame([choice], usage=None)))
    return said(*events, DONE)


def llamacpp(
    chat: Chat, parts: Sequence[Sequence[int]], finish: str, *, stop: int | str | None = None,
    scores: Sequence[float] | None = None, prompt: Sequence[int] = (1,),
) -> Reply:  # fmt: skip
    """Whole characters, no ids, nothing of what stopped it; the last event has no text."""
    more = {"system_fingerprint": "b1-0"}
    texts = Voice(chat, parts).texts(hidden=1 if finish == "stop" else 0)
    events = [
        event(frame([{"text": text, "index": 0, "logprobs": None, "finish_reason": None}], **more)) for text in texts
    ]
    usage = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
    last = {"text": "", "index": 0, "logprobs": None, "finish_reason": finish}
    return said(*events, event(frame([last], usage=usage, **more)), DONE)


def other(
    chat: Chat, parts: Sequence[Sequence[int]], finish: str, *, stop: int | str | None = None,
    scores: Sequence[float] | None = None, prompt: Sequence[int] = (1,),
) -> Reply:  # fmt: skip
    """No more than OpenAI's own."""
    texts = list(Voice(chat, parts).texts(hidden=1 if finish == "stop" else 0))
    return said(*(
        event(frame([{
            "text": text, "index": 0, "logprobs": None,
            "finish_reason": finish if index + 1 == len(texts) else None,
        }]))
        for index, text in enumerate(texts)
    ), DONE)  # fmt: skip


STREAMS: Mapping[str, Stream] = {
    "vllm": vllm, "sglang": sglang, "tensorrt_llm": trtllm, "llamacpp": llamacpp, "other": other,
}  # fmt: skip
