"""The server as its clients see it, through OpenAI's own client and over bare sockets."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
import transformers
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.chat_files import save_chat_files
from tests.engines import request, run_all, tiny_engine_dir
from tests.fakes import EOS_ID, FakeChat, FakeEngine
from tests.serve.serving import call, client, close_clients, sent, serving
from tests.serve.test_engine_thread import Breaking
from tests.solve.scripted import say
from trtkit.chat import Chat, load_chat
from trtkit.errors import InputError
from trtkit.runtime.api import Request, StepOutput
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.grading import Grader
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.prompts import sample_seed
from trtkit.solve.solver import Solver


class Talk(FakeChat):
    """Turns are ``role:content|``; the answer begins after ``>``."""

    def conversation(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if messages[-1]["role"] != "user":
            raise InputError("the chat template refuses these messages: the user must come last")
        return tuple("".join(f"{it['role']}:{it['content']}|" for it in messages).encode() + b">")

    def thinking(self, prompt: Sequence[int]) -> bool:
        return b"opened" in bytes(prompt)


CHAT = cast(Chat, Talk())
ASK = [{"role": "user", "content": "say it"}]


def recite(request: Request) -> Sequence[int]:
    """A thought, an answer, an end."""
    return [*CHAT.encode("<think>\nsix is é∞</think>\n\\boxed{6} abc END more"), EOS_ID]


class Slow(FakeEngine):
    def step(self) -> list[StepOutput]:
        time.sleep(0.02)
        return super().step()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_clients()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(lambda: FakeEngine(recite, burst=3), CHAT) as (url, _):
        yield url


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine_dir(tmp_path_factory.mktemp("served") / "engine")
    save_chat_files(directory)
    return directory


@pytest.fixture(scope="module")
def real(model_dir: Path) -> Iterator[str]:
    options = OpenOptions(device="cpu", threads=1, dtype="float32")
    with serving(lambda: open_engine(model_dir, options), load_chat(model_dir)) as (url, _):
        yield url


def whole(to: OpenAI, **asked: Any) -> Any:
    return to.chat.completions.create(**{"model": "tiny", "messages": ASK, **asked})


def streamed(to: OpenAI, **asked: Any) -> list[Any]:
    return list(to.chat.completions.create(**{"model": "tiny", "messages": ASK, "stream": True, **asked}))


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
        request(f"{place}/{choice}", prompt, seed=sample_seed(11, str(place), choice), max_tokens=16,
                temperature=1.0, top_p=0.9, min_p=0.02, stop_ids=chat.eos_ids)
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
        assert scores == choice.logprobs.content
        assert all(score.logprob <= 0 for score in scores)


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


def test_the_voted_model_answers_as_the_solver_does() -> None:
    options = SolveOptions(samples=12, max_tokens=100, seed=4)
    with Grader() as grader:
        engine = FakeEngine(say, rows=6, burst=3)
        alone = Solver(engine, CHAT, options, grader).solve([Problem(id="problem", text="say it")])[0]
    assert alone.answer is not None
    with serving(lambda: FakeEngine(say, rows=6, burst=3), CHAT) as (url, _):
        for _ in range(2):
            reply = whole(client(url), model="tiny:maj", seed=4, max_tokens=100, extra_body={"samples": 12})
            assert reply.choices[0].message.content == f"\\boxed{{{alone.answer.key}}}"
            assert reply.vote["samples"] == len(alone.attempts)
            assert reply.vote["votes"] == [[vote.answer.key, vote.count] for vote in alone.tally.ranked]
            assert reply.vote["stopped_early"] == alone.stopped_early
            assert reply.usage.completion_tokens >= sum(attempt.tokens for attempt in alone.attempts)
        chunks = streamed(client(url), model="tiny:maj", seed=4, max_tokens=100, extra_body={"samples": 12})
        text = "".join(it.choices[0].delta.content or "" for it in chunks)
        assert text == f"\\boxed{{{alone.answer.key}}}"


class Watched(Slow):
    """Knows how many samples of a vote it had at once."""

    most = 0

    def step(self) -> list[StepOutput]:
        votes = [request for request, _ in self._left.values() if b"user:" not in bytes(request.prompt)]
        self.most = max(self.most, len(votes))
        return super().step()


@pytest.mark.parametrize("others", [False, True])
def test_a_vote_beside_others_runs_few_samples_at_once(others: bool) -> None:
    def answer(request: Request) -> Sequence[int]:
        return [97] * 4000 if b"user:" in bytes(request.prompt) else CHAT.encode("\\boxed{7}</think>")

    engine = Watched(answer, rows=32)
    with serving(lambda: engine, CHAT) as (url, service):
        with sent(url, json.dumps({"messages": ASK, "n": 16}).encode()) if others else contextlib.nullcontext():
            wait_for(lambda: service.engine.unfinished == (16 if others else 0))
            reply = whole(client(url), model="tiny:maj", extra_body={"samples": 16})
        assert (reply.vote["answer"], reply.vote["samples"]) == ("7", 8)
        assert engine.most == (8 if others else 16)


def test_a_vote_keeps_to_its_time() -> None:
    def endless(request: Request) -> Sequence[int]:
        if bytes(token for token in request.prompt if token < 256).endswith(b"\\boxed{"):
            return CHAT.encode("9}")
        return CHAT.encode("x" * 4000)

    with serving(lambda: Slow(endless), CHAT, voting=SolveOptions(samples=4, max_tokens=3900)) as (url, service):
        reply = whole(client(url), model="tiny:maj", extra_body={"seconds": 1.5})
        assert reply.vote["seconds"] < 10  # of the 80 that the samples would take
        assert reply.vote["answer"] == "9"  # they were made to answer
        assert service.engine.unfinished == 0


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
        ({"samples": 4}, ["only with the model tiny:maj"]),
        ({"model": "tiny:maj", "n": 2, "stop": "x"}, ["stop, n: not for the voted model"]),
        ({"model": "tiny:maj", "messages": [{"role": "system", "content": "x"}, *ASK]}, ["one user message"]),
        ({"stop": ""}, ["stop"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options: only with stream"]),
        ({"max_tokens": 0}, ["max_tokens: Input should be greater"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_all_at_once(url: str, asked: dict[str, Any], said: list[str]) -> None:
    status, text = call(url, "/v1/chat/completions", {"model": "tiny", "messages": ASK, **asked})
    assert status == 400
    error = json.loads(text)["error"]
    assert error["type"] == "invalid_request_error"
    assert [part for part in said if part not in error["message"]] == []


def test_so_many_choices_and_no_more(url: str) -> None:
    status, text = call(url, "/v1/completions", {"prompt": ["x"] * 100, "n": 3})
    assert status == 400
    assert "300 choices in all: at most 256" in text
    status, text = call(url, "/v1/completions", {"prompt": [[1, 99999]], "max_tokens": 1})
    assert status == 200  # the scripted engine knows no vocabulary
    status, text = call(url, "/v1/completions", {"model": "tiny:maj", "prompt": "x"})
    assert (status, "POST /v1/chat/completions" in text) == (400, True)


def test_what_the_engine_refuses_is_a_bad_request(real: str) -> None:
    for stream in (False, True):
        status, text = call(real, "/v1/completions", {"prompt": [[1, 99999]], "stream": stream})
        assert status == 400
        assert "token id 99999 lies outside the vocabulary" in text


def test_what_asks_for_nothing_is_no_error(url: str) -> None:
    idle = {"frequency_penalty": 0, "logit_bias": None, "tools": [], "user": "me", "response_format": {"type": "text"}}
    assert whole(client(url), extra_body=idle).choices[0].finish_reason == "stop"


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


def test_too_much_is_turned_away() -> None:
    with serving(lambda: Slow(lambda request: [97] * 4000), CHAT, most_unfinished=4) as (url, service):
        with sent(url, json.dumps({"messages": ASK, "n": 3}).encode()):
            wait_for(lambda: service.engine.unfinished == 3)
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


def wait_for(holds: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)
