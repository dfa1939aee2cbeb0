"""Samples over HTTP, through OpenAI's own client: the engine's own, whole and as streams."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers

from tests.engines import request, run_all
from tests.fakes import FakeEngine
from tests.serve.serving import ASK, CHAT, Slow, Talk, client, recite, serving, streamed, wait_for, whole
from trtkit.chat import Chat, load_chat
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.prompts import sample_seed


def test_greedy_text_is_that_of_transformers(real: str, model_dir: Path) -> None:
    chat = load_chat(model_dir)
    prompt = chat.conversation(ASK)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, len(prompt) :
    ]
    for got in (
        whole(client(real), temperature=0, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].message.content,
        client(real)
        .completions.create(
            model="tiny", prompt=list(prompt), temperature=0, max_tokens=24, extra_body={"ignore_eos": True}
        )
        .choices[0]
        .text,
    ):
        assert got == chat.decode(ids.tolist())


def test_samples_are_the_engines_own(real: str, model_dir: Path) -> None:
    """Seeds, choices and cuts: what the engine draws for these requests when it is asked directly."""
    chat = load_chat(model_dir)
    prompts = [chat.encode("one and"), chat.encode("two")]
    requests = [
        request(f"{place}/{choice}", prompt, seed=sample_seed(11, str(place), choice) if place or choice else 11,
                max_tokens=16, temperature=1.0, top_p=0.9, min_p=0.02, stop_ids=chat.eos_ids)
        for place, prompt in enumerate(prompts) for choice in range(3)
    ]  # fmt: skip
    with open_engine(model_dir, OpenOptions(device="cpu", threads=1, dtype="float32")) as engine:
        tokens, _ = run_all(engine, requests)
    reply = client(real).completions.create(
        model="tiny", prompt=["one and", "two"], n=3, seed=11, top_p=0.9, max_tokens=16, extra_body={"min_p": 0.02}
    )
    assert [choice.index for choice in reply.choices] == list(range(6))
    expected = [chat.decode([token for token in line if token not in chat.eos_ids]) for line in tokens.values()]
    assert [choice.text for choice in reply.choices] == expected
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, prompts))
    assert reply.usage.completion_tokens == sum(map(len, tokens.values()))


def test_a_stream_says_what_the_whole_says(real: str) -> None:
    asked = {"seed": 3, "n": 3, "max_tokens": 20, "logprobs": True}
    reply = whole(client(real), **asked)
    chunks = streamed(client(real), stream_options={"include_usage": True}, **asked)
    assert chunks[-1].usage == reply.usage
    for choice in reply.choices:
        mine = [it.choices[0] for it in chunks if it.choices and it.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(it.delta.content or "" for it in mine) == choice.message.content
        assert [it.finish_reason for it in mine if it.finish_reason] == [choice.finish_reason]
        scores = [score for it in mine if it.logprobs for score in it.logprobs.content]
        wanted = choice.logprobs.content
        assert [(score.token, score.bytes) for score in scores] == [(score.token, score.bytes) for score in wanted]
        # How full the batch is when a row comes depends on the machine, and in plain torch the last bit on that.
        assert [score.logprob for score in scores] == pytest.approx([score.logprob for score in wanted], abs=1e-5)
        assert all(score.logprob <= 0 for score in scores)


def test_a_stream_counts_its_tokens_where_it_is_asked_to(url: str) -> None:
    for options, counted in (({"include_usage": True}, 1), ({"include_usage": False}, 0), ({}, 0), (None, 0)):
        chunks = streamed(client(url), extra_body={"stream_options": options})
        assert sum(it.usage is not None for it in chunks) == counted, options


def test_streamed_completions_and_where_their_tokens_stand(real: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "seed": 3, "n": 2, "max_tokens": 20, "logprobs": 0}
    reply = client(real).completions.create(**asked)
    chunks = list(client(real).completions.create(**asked, stream=True))
    for choice in reply.choices:
        mine = [it.choices[0] for it in chunks if it.choices[0].index == choice.index]
        assert "".join(it.text for it in mine) == choice.text
        offsets = [offset for it in mine if it.logprobs for offset in it.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset
        places = [0, *itertools.accumulate(map(len, choice.logprobs.tokens))]
        assert offsets == places[:-1]


def test_without_a_seed_every_request_draws_anew(real: str) -> None:
    texts = {whole(client(real), max_tokens=20).choices[0].message.content for _ in range(3)}
    assert len(texts) == 3


def test_stop_strings_end_a_choice_and_its_row(url: str) -> None:
    reply = whole(client(url), stop=[" END", "nothing"])
    assert reply.choices[0].message.content == "<think>\nsix is é∞</think>\n\\boxed{6} abc"
    assert reply.choices[0].finish_reason == "stop"
    chunks = streamed(client(url), stop="</think>", n=2)
    for index in (0, 1):
        text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices[0].index == index)
        assert text == "<think>\nsix is é∞"


def test_stop_tokens_end_a_choice(url: str) -> None:
    reply = whole(client(url), extra_body={"stop_token_ids": [ord("b"), ord("E")], "ignore_eos": True})
    assert reply.choices[0].message.content == "<think>\nsix is é∞</think>\n\\"
    assert reply.choices[0].finish_reason == "stop"


def test_a_stop_string_ends_the_row_and_the_count() -> None:
    """What the engine made after the token that completed the text is neither shown nor counted."""
    opened = Slow(lambda request: [*CHAT.encode("one END and " + "on and " * 500)], burst=5)
    with serving(lambda: opened, CHAT) as (url, _):
        reply = whole(client(url), stop="END", logprobs=False)
        assert (reply.choices[0].message.content, reply.usage.completion_tokens) == ("one ", len("one END"))
        wait_for(lambda: opened.cancelled)


def test_the_end_of_turn_is_no_text_and_a_budget_is_told(url: str) -> None:
    reply = whole(client(url))
    assert reply.choices[0].message.content.endswith(" END more")
    assert reply.choices[0].finish_reason == "stop"
    short = whole(client(url), max_completion_tokens=9)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("<think>\ns", "length")
    assert short.usage.completion_tokens == 9


def test_the_thought_apart() -> None:
    with serving(lambda: FakeEngine(recite, burst=3), CHAT, reasoning="separate") as (url, _):
        message = whole(client(url)).choices[0].message
        assert (message.reasoning_content, message.content) == ("six is é∞", "\\boxed{6} abc END more")
        deltas = [it.choices[0].delta for it in streamed(client(url))]
        assert "".join(getattr(it, "reasoning_content", None) or "" for it in deltas) == "six is é∞"
        said = [it.model_dump(exclude_unset=True) for it in deltas]
        assert not [it for it in said if "" in (it.get("content"), it.get("reasoning_content")) and "role" not in it]
        assert "".join(it.content or "" for it in deltas) == "\\boxed{6} abc END more"
        # What the client got is what it sends back in the next turn.
        again = [*ASK, {"role": "assistant", "content": "6", "reasoning_content": "six"}, *ASK]
        assert whole(client(url), messages=again).choices[0].finish_reason == "stop"


def test_half_a_tag_at_the_end_is_text() -> None:
    chat = cast(Chat, Talk(single_think_end=False))
    with serving(lambda: FakeEngine(lambda _: list(b"<think>six</thi")), chat, reasoning="separate") as (url, _):
        message = whole(client(url)).choices[0].message
        assert (message.reasoning_content, message.content) == ("six</thi", "")


def test_a_thought_that_the_prompt_has_opened() -> None:
    with serving(lambda: FakeEngine(lambda _: CHAT.encode("six</think>6")), CHAT, reasoning="separate") as (url, _):
        opened = whole(client(url), messages=[{"role": "user", "content": "opened"}]).choices[0].message
        assert (opened.reasoning_content, opened.content) == ("six", "6")
        plain = whole(client(url)).choices[0].message
        assert (plain.reasoning_content, plain.content) == ("", "six</think>6")


def test_completions_go_on_with_a_text(url: str) -> None:
    reply = client(url).completions.create(model="tiny", prompt="once", logprobs=0)
    assert reply.choices[0].text == "<think>\nsix is �"  # 16 tokens, where OpenAI's default ends, are 16 bytes here
    assert reply.choices[0].finish_reason == "length"
