"""Token ids over HTTP: those that the engine draws when it is asked directly, whole and as they are made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.engines import request, run_all
from tests.fakes import EOS_ID, THINK_ID, FakeEngine
from tests.reference.text_stream import stopped_text
from tests.serve.serving import ASK, CHAT, Slow, call, client, serving, streamed, whole
from tests.serve.test_forms import events
from trtkit.chat import Chat, load_chat
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.prompts import sample_seed

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.02}
TOLD = {"return_token_ids": True, "top_k": 0, "min_p": 0.02}
"""What OpenAI's client takes as ``extra_body``."""


def drawn(
    model_dir: Path, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int], *, max_tokens: int = 24,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:  # fmt: skip
    """What an engine of its own says to each prompt with each seed."""
    asked = [
        request(str(number), prompt, seed=seed, max_tokens=max_tokens, stop_ids=stop_ids, **SAMPLING)
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    with open_engine(model_dir, OpenOptions(device="cpu", threads=1, dtype="float32")) as engine:
        tokens, _ = run_all(engine, asked)
    return list(tokens.values())


def asked_of(chat: Chat, **more: Any) -> dict[str, Any]:
    """A request's sampling fields, for samples that no end of turn ends."""
    extra = {**TOLD, "ignore_eos": True, **more.pop("extra_body", {})}
    return {"model": "tiny", "temperature": 1.0, "top_p": 0.9, "max_tokens": 24, "extra_body": extra, **more}


def test_completions_say_the_ids_that_the_engine_draws(real: str, model_dir: Path) -> None:
    chat = load_chat(model_dir)
    prompts = [chat.encode("one and"), chat.encode("two")]
    seeds = [11, *(sample_seed(11, str(place), choice) for place, choice in ((0, 1), (1, 0), (1, 1)))]
    each = [prompts[0], prompts[0], prompts[1], prompts[1]]
    expected = drawn(model_dir, each, seeds)
    asked = asked_of(chat, prompt=["one and", "two"], n=2, seed=11)
    reply: Any = client(real).completions.create(**asked)
    assert [it.token_ids for it in reply.choices] == expected
    assert [tuple(it.prompt_token_ids) for it in reply.choices] == each
    assert reply.usage.completion_tokens == sum(map(len, expected))
    chunks: list[Any] = list(client(real).completions.create(**asked, stream=True))
    for index in range(4):
        mine = [it.choices[0] for it in chunks if it.choices[0].index == index]
        assert [token for it in mine for token in it.token_ids] == expected[index]
        assert tuple(mine[0].prompt_token_ids) == each[index]
        assert not [it for it in mine[1:] if hasattr(it, "prompt_token_ids")]


def test_chats_say_the_prompt_beside_the_choices(real: str, model_dir: Path) -> None:
    chat = load_chat(model_dir)
    prompt = chat.conversation(ASK)
    expected = drawn(model_dir, [prompt] * 3, [5, sample_seed(5, "0", 1), sample_seed(5, "0", 2)])
    asked = asked_of(chat, n=3, seed=5)
    reply = whole(client(real), **asked)
    assert [it.token_ids for it in reply.choices] == expected
    assert tuple(reply.prompt_token_ids) == prompt
    *chunks, last = streamed(client(real), **asked, stream_options={"include_usage": True})
    for index in range(3):
        mine = [it for it in chunks if it.choices[0].index == index]
        assert tuple(mine[0].prompt_token_ids) == prompt
        assert not [it for it in mine[1:] if hasattr(it, "prompt_token_ids")]
        assert [token for it in mine for token in it.choices[0].token_ids] == expected[index]
    assert last.usage.completion_tokens == sum(map(len, expected))


def test_a_client_chooses_the_seeds_of_its_samples(real: str, model_dir: Path) -> None:
    """One request each: those that the engine draws for these seeds, negative and large ones included."""
    prompt = (5, 6, 7)
    seeds = [0, 7, sample_seed(0, "problem", 3), 2**63 - 1, 2**63, -1, -7]
    found = []
    for seed in seeds:
        reply: Any = client(real).completions.create(**asked_of(CHAT, prompt=list(prompt), seed=seed))
        found.append(reply.choices[0].token_ids)
    assert found == drawn(model_dir, [prompt] * len(seeds), seeds)
    assert len({tuple(it) for it in found}) == len(seeds)


Stop = Literal["id", "token", "text"]


@pytest.mark.parametrize("kind", ["id", "token", "text"])
def test_the_ids_end_with_what_ended_the_sample(real: str, model_dir: Path, kind: Stop) -> None:
    """An id; a text that is one token, which the engine itself stops at; a text that is several."""
    chat, prompt = load_chat(model_dir), (5, 6, 7)
    line = drawn(model_dir, [prompt], [3], max_tokens=200)[0]
    size = 2 if kind == "text" else 1
    text = next(
        said
        for place in range(8, len(line) - size)
        if (said := chat.decode(line[place : place + size])).isascii() and said.isprintable() and len(said) == size
    )
    assert len(chat.encode(text)) == size
    if kind == "id":
        reason: int | str = chat.encode(text)[0]
        more: dict[str, Any] = {"extra_body": {"stop_token_ids": [reason, 999]}}
        expected = line[: line.index(chat.encode(text)[0]) + 1]
    else:
        reason, more = text, {"stop": ["nothing", text]}
        expected = line[: stopped_text(line, [text], chat.decode)[1]]
    asked = asked_of(chat, prompt=list(prompt), seed=3, **more) | {"max_tokens": 200}
    reply: Any = client(real).completions.create(**asked)
    (choice,) = reply.choices
    assert (choice.token_ids, choice.stop_reason, choice.finish_reason) == (expected, reason, "stop")
    assert reply.usage.completion_tokens == len(expected)
    assert choice.text == stopped_text(line, [text], chat.decode)[0]
    chunks: list[Any] = [it.choices[0] for it in client(real).completions.create(**asked, stream=True)]
    assert [token for it in chunks for token in it.token_ids] == expected
    assert [it.stop_reason for it in chunks] == [None] * (len(chunks) - 1) + [reason]


@pytest.mark.parametrize("reasoning", ["inline", "separate"])
def test_ids_come_as_they_are_made(reasoning: str) -> None:
    """One in each chunk, though halves of characters, what may become a stop text and tags are held back."""
    said = [*"<think>\nsix é∞ EN</th".encode(), THINK_ID, *b"6 END!", EOS_ID]
    with serving(lambda: FakeEngine(lambda _: said), CHAT, reasoning=reasoning) as (url, _):
        chunks = streamed(client(url), stop=["END?", "</though"], extra_body={"return_token_ids": True})
        assert [it.choices[0].token_ids for it in chunks] == [[], *([token] for token in said)]
        deltas = [it.choices[0].delta for it in chunks]
        assert "".join(it.content or "" for it in deltas).endswith("6 END!")
        plain = streamed(client(url), stop=["END?", "</though"])
        assert len(plain) < len(chunks) - 4
        chunks = list(client(url).completions.create(
            model="tiny", prompt="x", max_tokens=99, stream=True, stop="END?", extra_body={"return_token_ids": True}
        ))  # fmt: skip
        assert [it.choices[0].token_ids for it in chunks] == [[token] for token in said]


def test_what_an_engine_made_after_a_stop_text_is_not_told() -> None:
    said = [*CHAT.encode("one END and " + "on and " * 500)]
    with serving(lambda: Slow(lambda _: said, burst=5), CHAT) as (url, _):
        asked: dict[str, Any] = {"stop": ["x", "END"], "extra_body": {"return_token_ids": True}}
        reply = whole(client(url), **asked)
        assert (reply.choices[0].token_ids, reply.choices[0].stop_reason) == (list(b"one END"), "END")
        assert reply.usage.completion_tokens == len(b"one END")
        chunks = [it.choices[0] for it in streamed(client(url), **asked)]
        assert [it.token_ids for it in chunks] == [[], list(b"one E"), list(b"ND")]


@pytest.mark.parametrize(
    ("asked", "finish", "reason"),
    [
        ({}, "stop", None),
        ({"stop_token_ids": [EOS_ID], "stop": "<|im_end|>"}, "stop", None),
        ({"stop_token_ids": [EOS_ID], "ignore_eos": True}, "stop", EOS_ID),
        ({"stop_token_ids": [5, 98], "stop": "c"}, "stop", 98),
        ({"stop_token_ids": [98], "stop": "b"}, "stop", 98),
        ({"stop": ["c", "b"]}, "stop", "b"),
        ({"stop": ["bcd", "bc"]}, "stop", "bc"),
        ({"stop": ["c", "</think>"], "max_tokens": 2}, "length", None),
        ({"model": "tiny:maj"}, "stop", None),
    ],
)
def test_why_a_sample_stopped(asked: dict[str, Any], finish: str, reason: int | str | None) -> None:
    """In every choice, of every chunk, whether ids are asked for or not."""
    with serving(lambda: FakeEngine(lambda _: [*CHAT.encode("abcd"), EOS_ID], burst=8), CHAT) as (url, _):
        paths: dict[str, dict[str, Any]] = {"chat/completions": {"messages": ASK}}
        if "model" not in asked:
            paths["completions"] = {"prompt": "x"}
        for path, body in paths.items():
            (choice,) = json.loads(call(url, f"/v1/{path}", {**body, **asked})[1])["choices"]
            assert (choice["finish_reason"], choice["stop_reason"]) == (finish, reason)
            chunks = events(call(url, f"/v1/{path}", {**body, **asked, "stream": True})[1])
            reasons = [it["choices"][0]["stop_reason"] for it in chunks]
            assert reasons == [None] * (len(chunks) - 1) + [reason]


@pytest.mark.parametrize("more", [{}, {"return_token_ids": False}, {"return_token_ids": None}])
def test_ids_that_nobody_asked_for_are_not_told(url: str, more: dict[str, Any]) -> None:
    for path, body in (("chat/completions", {"messages": ASK}), ("completions", {"prompt": "x"})):
        for stream in (False, True):
            status, text = call(url, f"/v1/{path}", {**body, **more, "stream": stream})
            assert (status, "token_ids" in text) == (200, False)
