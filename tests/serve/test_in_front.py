"""Votes in front of a server that has none: what clients get from the one is what they get from the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.fakes import FakeEngine
from tests.on_server import CHAT, impatient, practice_engine, remote, served
from tests.serve.serving import ASK, Slow, call, client, recite, sent, serving, streamed, wait_for, whole
from tests.solve.scripted import say
from trtkit.chat import load_chat
from trtkit.cli.app import run
from trtkit.runtime.endpoint.dialects import OTHER
from trtkit.runtime.endpoint.remote import Remote, connect
from trtkit.runtime.endpoint.server import endpoint_named
from trtkit.runtime.load import OpenOptions
from trtkit.serve import run as serve_run
from trtkit.serve.run import ServeOptions, Serving, run_serve
from trtkit.serve.server import HttpServer
from trtkit.serve.service import Service
from trtkit.solve.options import SolveOptions


@contextlib.contextmanager
def in_front(there: Remote, **options: Any) -> Iterator[tuple[str, Service]]:
    """Another server, whose engine is that one."""
    with serving(there.open, there.chat, source=there, name="front", **options) as found:
        yield found


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[str, str]]:
    """A scripted engine's server, and the one in front of it."""
    with serving(lambda: FakeEngine(say, rows=6, burst=3), CHAT) as (url, _), in_front(remote(url)) as (front, _):
        yield url, front


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[threading.Event]:
    """Ends the servers that ``run_serve`` starts, as a signal does."""
    found: queue.Queue[threading.Event] = queue.Queue()

    def starting(app: Any, *, until: threading.Event, **told: Any) -> HttpServer:
        found.put(until)
        return HttpServer(app, until=until, **told)

    monkeypatch.setattr(serve_run, "HttpServer", starting)
    return found


def test_single_samples_are_those_of_the_server_behind_it(real: str, model_dir: Path) -> None:
    """Of a real engine: text, ids, log-probabilities, endings and counts, whole and streamed."""
    chat = load_chat(model_dir)
    asked: dict[str, Any] = {"prompt": ["one and", "two"], "n": 2, "top_p": 0.9, "max_tokens": 12, "logprobs": 0}
    asked |= {"seed": 11, "extra_body": {"return_token_ids": True, "min_p": 0.02, "top_k": 50}}
    with in_front(remote(real, chat)) as (front, _):
        inner, outer = (
            client(url).completions.create(**asked, model=model).model_dump()
            for url, model in ((real, "tiny"), (front, "front"))
        )
        for one, other in zip(inner["choices"], outer["choices"], strict=True):
            scores = [it.pop("logprobs")["token_logprobs"] for it in (one, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-4)
            assert one == other
        assert inner["usage"] == outer["usage"]
        greedy = {"temperature": 0, "max_tokens": 24, "stop": "e"}
        texts = [
            "".join(chunk.choices[0].delta.content or "" for chunk in streamed(client(url), model=model, **greedy))
            for url, model in ((real, "tiny"), (front, "front"))
        ]
        assert texts[0] == texts[1]
    assert len({choice["text"] for choice in inner["choices"]}) == 4


def test_votes_are_those_of_the_server_behind_it(pair: tuple[str, str]) -> None:
    votes = []
    for url, model in zip(pair, ("tiny:maj", "front:maj"), strict=True):
        reply = whole(client(url), model=model, seed=4, max_tokens=100, extra_body={"samples": 12})
        kept = {name: reply.vote[name] for name in ("answer", "votes", "samples", "stopped_early")}
        votes.append((reply.choices[0].message.content, kept))
    assert votes[0] == votes[1]
    assert votes[0][0] == "\\boxed{7}"


def test_what_the_list_of_models_says(pair: tuple[str, str], tmp_path: Path) -> None:
    """So that there can be another one in front of it."""
    status, text = call(pair[1], "/v1/models")
    cards = json.loads(text)["data"]
    assert status == 200
    assert [card["id"] for card in cards] == ["front", "front:maj"]
    for card in cards:
        assert (card["root"], card["max_model_len"], card["max_rows"]) == ("org/tiny", 4096, 6)
        assert card["owned_by"] == "trtkit"
        assert "precision" not in card
    there = remote(pair[1])
    assert (there.model, there.server.total_tokens, there.server.rows) == ("front", 4096, 6)
    assert there.told == f"front at {pair[1]}/v1 (trtkit)"
    with in_front(there) as (third, _):
        assert whole(client(third), model="front:maj", seed=4).choices[0].message.content == "\\boxed{7}"


def test_what_the_server_behind_it_cannot_do_is_refused(pair: tuple[str, str]) -> None:
    there = remote(pair[0])
    other = dataclasses.replace(there, server=dataclasses.replace(there.server, dialect=OTHER))
    with in_front(other) as (front, _):
        body: dict[str, Any] = {"prompt": "x", "logprobs": 0}
        status, text = call(front, "/v1/completions", body)
        assert status == 400
        error = json.loads(text)["error"]
        assert "reports no token ids" in error["message"]
        assert error["type"] == "invalid_request_error"
        status, _ = call(front, "/v1/completions", {"prompt": "x", "max_tokens": 3})
        assert status == 200
    long = {"model": "front", "prompt": "x" * 5000}
    status, text = call(pair[1], "/v1/completions", long)
    assert status == 400
    assert "the engine takes 4096" in text


def test_a_server_that_fails_is_an_error_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch, 0.3)

    def opened() -> FakeEngine:
        return FakeEngine(recite, burst=3)

    with contextlib.ExitStack() as inner:
        url, _ = inner.enter_context(serving(opened, CHAT))
        there = remote(url)
        with in_front(there) as (front, service):
            text = whole(client(front), model="front").choices[0].message.content
            assert "\\boxed{6}" in text
            inner.close()
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match="the server has not gone on") as told:
                    whole(client(front), model="front")
                assert isinstance(told.value.body, dict)
                assert told.value.body["type"] == "server_error"
            with pytest.raises(openai.InternalServerError, match="the server has not gone on"):
                whole(client(front), model="front:maj")
            assert call(front, "/health")[0] == 200
            assert not service.engine.broken
            with serving(opened, CHAT, port=int(url.rpartition(":")[2])):
                assert whole(client(front), model="front").choices[0].message.content == text


@pytest.mark.parametrize("model", ["front", "front:maj"])
def test_a_client_that_hangs_up_ends_its_samples_there_too(model: str) -> None:
    slow = Slow(lambda _: [97] * 3000)
    with serving(lambda: slow, CHAT) as (url, inner), in_front(remote(url)) as (front, outer):
        body = {"messages": ASK, "model": model, "max_tokens": 2000, **({"n": 3} if model == "front" else {})}
        with sent(front, json.dumps(body).encode()):
            wait_for(lambda: inner.engine.unfinished >= 3)
        wait_for(lambda: outer.engine.unfinished == 0)
        wait_for(lambda: inner.engine.unfinished == 0)
    assert len(slow.cancelled) >= 3


def test_run_serve_takes_a_server(ends: queue.Queue[threading.Event]) -> None:
    ready: queue.Queue[Serving] = queue.Queue()
    with serving(lambda: FakeEngine(say, rows=6, burst=3), CHAT) as (url, inner):
        options = ServeOptions(name="front", port=0, voting=SolveOptions(samples=12, max_tokens=100))
        stats = []

        def work() -> None:
            stats.append(run_serve(remote(url), OpenOptions(rows=3), options, on_ready=ready.put))

        thread = threading.Thread(target=work)
        thread.start()
        it = ready.get(timeout=30)
        try:
            assert (it.models, it.rows, it.total_tokens) == (("front", "front:maj"), 3, 4096)
            assert whole(client(it.url), model="front:maj", seed=4).vote["answer"] == "7"
        finally:
            ends.get(timeout=5).set()
            thread.join(30)
        wait_for(lambda: inner.engine.unfinished == 0)
    assert stats[0].new_tokens > 0
    assert stats[0].peak_rows <= 3


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: queue.Queue[threading.Event]) -> None:
    """What it says when it is ready, and that it ends."""
    directory = practice_engine(tmp_path / "engine")

    def end() -> None:
        ends.get(timeout=30).set()

    with served(directory, lambda: FakeEngine(recite), name="Org/Tiny-2") as url:
        ending = threading.Thread(target=end)
        ending.start()
        assert run(["serve", "--endpoint", url, "--port", "0", "--batch", "5", "-n", "3", "--json"]) == 0
        ending.join()
        assert connect(endpoint_named(url)).card == {"root": str(directory)}
    said = capsys.readouterr()
    *lines, last = said.out.splitlines()
    document = json.loads(last)
    assert document["engine"] == f"{url}/v1"
    assert (document["models"], document["rows"], document["total_tokens"]) == (["tiny-2", "tiny-2:maj"], 5, 4096)
    facts = "\n".join(lines)
    assert f"Org/Tiny-2 at {url}/v1 (trtkit)" in facts
    assert "tiny-2:maj answers by the vote of 3" in facts
    assert lines[-1].startswith(f"next: curl {document['url']}/chat/completions")
    assert said.err.splitlines()[-1] == "stopped: 0 tokens generated", "the server's steps are its own"
    assert "Traceback" not in said.err
