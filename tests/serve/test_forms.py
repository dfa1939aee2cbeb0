"""The form of replies, where OpenAI's client is lenient and others are not; what models and metrics tell."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import EOS_ID, FakeEngine
from tests.serve.serving import ASK, CHAT, MANIFEST, call, recite, serving
from tests.solve.scripted import say
from trtkit.runtime.api import EngineStats, StepOutput


def events(text: str) -> list[Any]:
    """The documents of a stream of server-sent events, which ends as OpenAI's do."""
    *lines, last, nothing = text.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    assert [line for line in lines if not line.startswith("data: ") or "\n" in line] == []
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    ("path", "asked", "prefix", "whole_kind", "chunk_kind"),
    [
        ("/v1/chat/completions", {"messages": ASK}, "chatcmpl-", "chat.completion", "chat.completion.chunk"),
        ("/v1/chat/completions", {"messages": ASK, "model": "tiny:maj"}, "chatcmpl-", "chat.completion",
         "chat.completion.chunk"),
        ("/v1/completions", {"prompt": ["x", "yz"]}, "cmpl-", "text_completion", "text_completion"),
    ],
)  # fmt: skip
def test_every_document_says_what_it_belongs_to(
    url: str, path: str, asked: dict[str, Any], prefix: str, whole_kind: str, chunk_kind: str
) -> None:
    began = int(time.time())
    status, text = call(url, path, {**asked, "seed": 1})
    assert status == 200
    reply = json.loads(text)
    status, text = call(url, path, {**asked, "seed": 1, "stream": True, "stream_options": {"include_usage": True}})
    assert status == 200
    *chunks, last = events(text)
    assert reply["object"] == whole_kind
    assert {it["object"] for it in [*chunks, last]} == {chunk_kind}
    assert len({it["id"] for it in [*chunks, last]}) == 1
    assert reply["id"] != last["id"]
    for it in (reply, *chunks, last):
        assert it["id"].startswith(prefix)
        assert began <= it["created"] <= time.time()
        assert it["model"] == asked.get("model", "tiny")
    assert (last["choices"], last["usage"]) == ([], reply["usage"])
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    assert [it for it in chunks if it.get("usage") or len(it["choices"]) != 1] == []
    for choice in reply["choices"]:
        mine = [it["choices"][0] for it in chunks if it["choices"][0]["index"] == choice["index"]]
        assert [it["finish_reason"] for it in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        if whole_kind != "text_completion":
            assert (mine[0]["delta"], choice["message"]["role"]) == ({"role": "assistant", "content": ""}, "assistant")
            assert [it for it in mine[1:] if "role" in it["delta"]] == []


def test_a_stream_ends_with_its_reason_where_the_last_token_is_no_text() -> None:
    with serving(lambda: FakeEngine(recite), CHAT) as (url, _):
        for path, asked in (
            ("chat/completions", {"messages": ASK}),
            ("completions", {"prompt": "x", "max_tokens": 99}),
        ):
            chunks = events(call(url, f"/v1/{path}", {**asked, "stream": True})[1])
            assert [it["choices"][0]["finish_reason"] for it in chunks] == [None] * (len(chunks) - 1) + ["stop"]


class Scoring(FakeEngine):
    """Tells the log-probability of its tokens, the first one's -0.5, the next one's -1, ..."""

    told = 0

    def step(self) -> list[StepOutput]:
        outputs = []
        for output in super().step():
            places = range(self.told, self.told + len(output.tokens))
            outputs.append(replace(output, logprobs=tuple(-(place + 1) / 2 for place in places)))
            self.told += len(output.tokens)
        return outputs


@pytest.mark.parametrize(("stop", "scored"), [("END", "one END"), ("</think>", "one END and "), (None, "one END and ")])
def test_log_probabilities_are_of_the_tokens_that_count(stop: str | None, scored: str) -> None:
    """Up to the end of a stop text, and without the token that ends a turn."""
    said = [*CHAT.encode("one END and "), EOS_ID if stop is None else CHAT.encode("</think>")[0], *b"more"]
    for stream in (False, True):
        with serving(lambda: Scoring(lambda _: said, burst=5), CHAT) as (url, _):
            asked = {"prompt": "x", "logprobs": 0, "stop": stop, "max_tokens": 99, "stream": stream}
            text = call(url, "/v1/completions", asked)[1]
        choices = [it["choices"][0] for it in (events(text) if stream else [json.loads(text)])]
        found = [it["logprobs"] for it in choices if it["logprobs"]]
        assert "".join(token for it in found for token in it["tokens"]) == scored
        logprobs = [logprob for it in found for logprob in it["token_logprobs"]]
        assert logprobs == [-(place + 1) / 2 for place in range(len(scored))]


def test_the_vote_stands_in_the_stream_too() -> None:
    asked: dict[str, Any] = {"model": "tiny:maj", "messages": ASK}
    with serving(lambda: FakeEngine(say), CHAT) as (url, _):
        reply = json.loads(call(url, "/v1/chat/completions", asked)[1])
        chunks = events(call(url, "/v1/chat/completions", {**asked, "stream": True})[1])
    votes = [it["vote"] for it in (reply, *chunks) if "vote" in it]
    assert len(votes) == 2
    assert votes[0].keys() == {"answer", "votes", "samples", "cancelled", "tokens", "seconds", "stopped_early"}
    assert {**votes[0], "seconds": 0} == {**votes[1], "seconds": 0}
    assert votes[0]["tokens"] == reply["usage"]["completion_tokens"]
    assert reply["usage"]["prompt_tokens"] == len("solve|say it") + len("reason|say it")


def test_log_probabilities_come_with_the_bytes_of_their_tokens(real: str) -> None:
    """Of whole characters; what a torn one's parts read as is not what they are."""
    asked = {"messages": ASK, "logprobs": True, "seed": 1, "max_tokens": 40, "ignore_eos": True}
    content = json.loads(call(real, "/v1/chat/completions", asked)[1])["choices"][0]["logprobs"]["content"]
    assert {it["bytes"] is None for it in content} == {True, False}
    for it in content:
        assert it.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert it["bytes"] == (None if "\N{REPLACEMENT CHARACTER}" in it["token"] else list(it["token"].encode()))
        assert it["logprob"] <= 0


def test_models_tell_what_they_are(url: str) -> None:
    listed = json.loads(call(url, "/v1/models")[1])
    assert listed["object"] == "list"
    for card in listed["data"]:
        assert json.loads(call(url, f"/v1/models/{card['id']}")[1]) == card
        assert (card["object"], card["max_model_len"], card["precision"]) == ("model", 4096, MANIFEST.recipe.precision)
        assert (card["root"], card["owned_by"]) == (MANIFEST.recipe.model, "trtkit")
        assert card["max_rows"] == 8
        assert 0 <= time.time() - card["created"] < 3600


def test_the_schema_has_the_fields_that_openai_has_not(url: str) -> None:
    schemas = json.loads(call(url, "/openapi.json")[1])["components"]["schemas"]
    for body in ("ChatBody", "CompletionBody"):
        fields = schemas[body]["properties"]
        kinds = {name: fields[name]["anyOf"][0]["type"] for name in ("return_token_ids", "stop_token_ids", "seed")}
        assert kinds == {"return_token_ids": "boolean", "stop_token_ids": "array", "seed": "integer"}


class Counting(FakeEngine):
    """Has counted something of everything."""

    def stats(self) -> EngineStats:
        return EngineStats(
            steps=1, prompt_tokens=2, prefill_tokens=3, new_tokens=4, row_steps=5, preemptions=6,
            accepted_by_depth=(7, 8), seconds={"decode": 9.5, "prefill": 10.0}, kv_blocks=11, kv_blocks_free=12,
        )  # fmt: skip


def test_every_counter_is_told() -> None:
    with serving(lambda: Counting(recite), CHAT) as (url, _), urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
        assert answer.headers["content-type"].startswith("text/plain; version=")
    found = {
        (sample.name.removeprefix("trtkit_").removesuffix("_total"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found == {
        ("steps",): 1, ("prompt_tokens",): 2, ("prefill_tokens",): 3, ("generated_tokens",): 4, ("row_steps",): 5,
        ("preemptions",): 6, ("accepted_row_steps", "1"): 7, ("accepted_row_steps", "2"): 8,
        ("phase_seconds", "decode"): 9.5, ("phase_seconds", "prefill"): 10, ("unfinished_rows",): 0,
        ("kv_blocks",): 11, ("kv_blocks_free",): 12,
    }  # fmt: skip
