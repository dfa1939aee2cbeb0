"""What the server refuses and how it says so, who goes away, what fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngine
from tests.serve.serving import (
    ASK,
    CHAT,
    Slow,
    Talk,
    call,
    client,
    recite,
    sent,
    serving,
    streamed,
    wait_for,
    whole,
)
from tests.serve.test_engine_thread import Breaking
from trtkit.chat import Chat


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"strem": True, "temperature": "hot", "n": 0}, ["strem", "did you mean 'stream'", "temperature", "n: "]),
        ({"temperature": -1, "top_p": 3}, ["temperature -1", "top_p 3"]),
        ({"logit_bias": {"5": 3}, "tools": [{"type": "function"}]}, ["logit_bias: not supported", "tools: not"]),
        ({"top_logprobs": 5, "logprobs": True}, ["top_logprobs: not supported"]),
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["type: Input should be 'text'"]),
        ({"messages": [{"role": "assistant", "content": "I"}]}, ["chat template refuses"]),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, ["the engine takes 4096"]),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, ["more than fit into any prompt"]),
        ({"samples": 4, "seconds": 5}, ["samples and seconds: only with the model tiny:maj"]),
        ({"seconds": 5}, ["seconds: only with the model tiny:maj"]),
        ({"model": "tiny:maj", "stop_token_ids": [5], "logprobs": True, "ignore_eos": True, "return_token_ids": True},
         ["stop_token_ids, logprobs, ignore_eos, return_token_ids: not for the voted model"]),
        ({"return_token_ids": 1}, ["return_token_ids: Input should be a valid boolean"]),
        ({"model": "tiny:maj", "messages": [{"role": "user", "content": "x" * 5000}]}, ["the engine takes 4096"]),
        ({"model": "tiny:maj", "messages": [{"role": "assistant", "content": "x"}]}, ["one user message"]),
        ({"model": "tiny:maj", "seconds": 0}, ["seconds: Input should be greater than 0"]),
        ({"model": "tiny:maj", "n": 2, "stop": "x"}, ["stop, n: not for the voted model"]),
        ({"model": "tiny:maj", "messages": [{"role": "system", "content": "x"}, *ASK]}, ["one user message"]),
        ({"stop": ""}, ["stop"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options: only with stream"]),
        ({"max_tokens": 0}, ["max_tokens: Input should be greater"]),
        ({"stop": ["a"] * 17}, ["wrong: stop: Input should be a valid string; stop: List should have at most 16"]),
        ({"messages": [{"role": "user", "content": 5}]}, [" messages.0.content: Input should be a valid string; "]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_all_at_once(url: str, asked: dict[str, Any], said: list[str]) -> None:
    status, text = call(url, "/v1/chat/completions", {"model": "tiny", "messages": ASK, **asked})
    assert status == 400
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert [part for part in said if part not in error["message"]] == []


def test_fields_of_several_kinds_are_named_as_the_request_does(url: str) -> None:
    status, text = call(url, "/v1/completions", {"prompt": [1, "a"], "stop": 5})
    said = json.loads(text)["error"]["message"].removeprefix("the request's body is wrong: ").split("; ")
    assert status == 400
    places = ("prompt: ", "prompt.0: ", "prompt.1: ", "stop: ")
    assert [line for line in said if not line.startswith(places)] == []
    assert len(said) == len({*said})


HALF = "\ud83d"
"""Of an emoji, as JavaScript cuts texts."""


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"messages": [{"role": "user", "content": HALF}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "content.0.text: "),
        ({"messages": [{"role": HALF, "content": "x"}]}, "messages.0.role: "),
        ({"model": "tiny:maj", "messages": [{"role": "user", "content": HALF}]}, "messages.0.content: "),
        ({"stop": [HALF]}, "stop.0: "),
        ({"model": HALF}, "model: "),
        ({HALF: 1}, "\\ud83d: unknown field"),
        ({"stream": True, "stream_options": {HALF: 1}}, "stream_options: "),
    ],
)
def test_half_a_character_is_a_bad_request(real: str, asked: dict[str, Any], place: str) -> None:
    status, text = call(real, "/v1/chat/completions", {"messages": ASK, **asked})
    assert status == 400
    assert place in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("body", [[], 5, "text"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_object_is_a_bad_request(url: str, path: str, body: object) -> None:
    status, text = call(url, path, body)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


def test_so_many_choices_and_no_more(url: str) -> None:
    status, text = call(url, "/v1/completions", {"prompt": ["x"] * 100, "n": 3})
    assert status == 400
    assert "300 choices in all: at most 256" in text
    assert call(url, "/v1/completions", {"prompt": "x", "n": 256, "max_tokens": 1})[0] == 200
    status, text = call(url, "/v1/completions", {"prompt": []})
    assert (status, "prompt: there is none" in text) == (400, True)
    status, text = call(url, "/v1/completions", {"prompt": [[1, 99999]], "max_tokens": 1})
    assert status == 200  # the scripted engine knows no vocabulary
    status, text = call(url, "/v1/completions", {"model": "tiny:maj", "prompt": "x"})
    assert (status, "POST /v1/chat/completions" in text) == (400, True)


def test_what_the_engine_refuses_is_a_bad_request(real: str) -> None:
    for stream in (False, True):
        status, text = call(real, "/v1/completions", {"prompt": [[1, 99999]], "stream": stream})
        assert status == 400
        assert "token id 99999 lies outside the vocabulary" in text


IDLE = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "tools": [],
    "tool_choice": "none", "functions": [], "response_format": {"type": "text"}, "modalities": ["text"],
    "top_logprobs": 0, "echo": False, "best_of": 1, "suffix": "", "skip_special_tokens": False,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False,
    "length_penalty": 1.0, "min_tokens": 0, "add_generation_prompt": True, "chat_template_kwargs": {},
}  # fmt: skip
"""What other servers' clients send without wanting anything."""


def test_what_asks_for_nothing_is_no_error(url: str) -> None:
    more = {"top_k": -1, "user": "me", "tool_choice": "auto", "chat_template_kwargs": {"enable_thinking": True}}
    for idle in (IDLE, dict.fromkeys(IDLE), IDLE | more):
        assert whole(client(url), extra_body=idle).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "asked",
    [{"echo": True}, {"length_penalty": 2}, {"best_of": 2}, {"min_tokens": 1}, {"skip_special_tokens": True},
     {"chat_template_kwargs": {"enable_thinking": False}}, {"suffix": "x"}, {"frequency_penalty": 1}],
)  # fmt: skip
def test_what_asks_for_something_is_not_passed_over(url: str, asked: dict[str, Any]) -> None:
    status, text = call(url, "/v1/completions", {"prompt": "x", **asked})
    assert (status, f"{next(iter(asked))}: not supported" in text) == (400, True)


def test_unknown_models_and_paths(url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'tinny'; did you mean 'tiny'"):
        whole(client(url), model="tinny")
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        client(url).embeddings.create(model="tiny", input="x")
    assert [it.id for it in client(url).models.list()] == ["tiny", "tiny:maj"]
    assert client(url).models.retrieve("tiny:maj").id == "tiny:maj"


def test_a_key_keeps_others_out() -> None:
    with serving(lambda: FakeEngine(recite), CHAT, key="secret") as (url, _):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            whole(client(url, "guess"))
        assert whole(client(url, "secret")).choices[0].finish_reason == "stop"
        assert call(url, "/health")[0] == 200
        assert call(url, "/metrics")[0] == 401
        told = {"bearer secret": 200, "BEARER  secret": 200, "bearer": 401, "bearer guess": 401, "Basic secret": 401}
        for header, status in told.items():
            assert call(url, "/metrics", authorization=header)[0] == status, header


def test_clients_that_go_away_take_their_rows_with_them() -> None:
    opened: list[Slow] = []

    def open_one() -> Slow:
        opened.append(Slow(lambda request: [97] * 4000))
        return opened[-1]

    with serving(open_one, CHAT) as (url, service):
        for extra in ({}, {"stream": True}, {"model": "tiny:maj"}):
            with sent(url, json.dumps({"messages": ASK, **extra}).encode()):
                wait_for(lambda: service.engine.unfinished > 0)
            wait_for(lambda: service.engine.unfinished == 0)
        stream = client(url).chat.completions.create(model="tiny", messages=ASK, stream=True, n=3)
        next(iter(stream))
        assert service.engine.unfinished == 3
        stream.close()
        wait_for(lambda: service.engine.unfinished == 0)
    assert len(opened[0].cancelled) >= 6


def test_a_stream_that_waits_is_begun_and_can_be_left() -> None:
    """Behind a row that takes the whole engine: headers come at once, and who goes away leaves the queue."""
    with serving(lambda: Slow(lambda request: [97] * 4000, rows=1), CHAT) as (url, service):
        first = client(url).chat.completions.create(model="tiny", messages=ASK, stream=True)
        next(iter(first))
        with sent(url, json.dumps({"messages": ASK, "stream": True}).encode()) as connection:
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            assert service.engine.unfinished == 2
        wait_for(lambda: service.engine.unfinished == 1)
        first.close()


def test_too_much_is_turned_away() -> None:
    with serving(lambda: Slow(lambda request: [97] * 4000), CHAT, most_unfinished=4) as (url, service):
        with sent(url, json.dumps({"messages": ASK, "n": 3}).encode()):
            wait_for(lambda: service.engine.unfinished == 3)
            assert "\ntrtkit_unfinished_rows 3.0\n" in call(url, "/metrics")[1]
            with pytest.raises(openai.RateLimitError, match="3 samples run or wait"):
                whole(client(url), n=2)
            with pytest.raises(openai.RateLimitError):
                client(url).completions.create(model="tiny", prompt=["a", "b"])
            whole(client(url), max_tokens=2)
        wait_for(lambda: service.engine.unfinished == 0)
        with sent(url, json.dumps({"messages": ASK, "n": 4}).encode()):
            wait_for(lambda: service.engine.unfinished == 4)
            with pytest.raises(openai.RateLimitError):
                whole(client(url), model="tiny:maj")
        wait_for(lambda: service.engine.unfinished == 0)
        assert whole(client(url), n=5, max_tokens=2).usage.completion_tokens == 10  # alone it may


def test_a_failing_engine_is_told_and_the_next_request_runs() -> None:
    left: list[FakeEngine] = [Breaking(recite), Breaking(recite), FakeEngine(recite)]
    with serving(lambda: left.pop(0), CHAT) as (url, _):
        with pytest.raises(openai.InternalServerError, match="illegal memory access"):
            whole(client(url))
        with pytest.raises(openai.APIError, match="illegal memory access"):
            streamed(client(url))
        assert whole(client(url)).choices[0].finish_reason == "stop"
        assert call(url, "/health")[0] == 200


class Puzzled(Talk):
    """Has a chat template with a fault."""

    def conversation(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return (1, 2) if messages[-1]["content"] == "fine" else (1 // 0,)


def test_what_nobody_foresaw_is_an_error_of_that_request_alone() -> None:
    with serving(lambda: FakeEngine(recite), cast(Chat, Puzzled())) as (url, _):
        for more in ({}, {"stream": True}):
            status, text = call(url, "/v1/chat/completions", {"messages": ASK, **more})
            error = json.loads(text)["error"]
            assert (status, error["type"]) == (500, "server_error")
            assert "ZeroDivisionError" in error["message"]
        assert whole(client(url), messages=[{"role": "user", "content": "fine"}]).choices[0].finish_reason == "stop"


def test_an_engine_that_is_gone_is_unhealthy() -> None:
    left: list[FakeEngine] = [Breaking(recite)]
    with serving(lambda: left.pop(0), CHAT) as (url, service):
        with pytest.raises(openai.InternalServerError, match="illegal memory access"):
            whole(client(url))
        wait_for(lambda: service.engine.broken)
        assert call(url, "/health")[0] == 503
        with pytest.raises(openai.InternalServerError, match="cannot be opened again"):
            whole(client(url))


def test_metrics(real: str) -> None:
    whole(client(real), n=2, max_tokens=5, extra_body={"ignore_eos": True})
    status, text = call(real, "/metrics")
    assert status == 200
    found = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["trtkit_generated_tokens_total"] >= 10
    assert found["trtkit_prefill_tokens_total"] <= found["trtkit_prompt_tokens_total"]
    assert found["trtkit_unfinished_rows"] == 0
    assert found["trtkit_kv_blocks_free"] <= found["trtkit_kv_blocks"]
