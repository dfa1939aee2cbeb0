"""Servers that fail in the middle: samples go on from where they were heard of last, or the run ends with a reason."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.engines import request, run_all
from tests.runtime.endpoint.replies import STREAMS, event, frame, refusal, vllm
from tests.runtime.endpoint.running import Opened, drain, told
from tests.runtime.endpoint.scripted_server import (
    CUT,
    HOLD,
    Reply,
    document,
    free_socket,
    in_turn,
    page,
    said,
    scripted,
)
from tests.serve.serving import wait_for
from trtkit.chat import Chat
from trtkit.errors import EngineError
from trtkit.runtime.api import FinishReason, Request
from trtkit.runtime.endpoint import engine as endpoint_engine

EOS = 258


def part(*tokens: int, finish: str | None = None, text: str = "") -> bytes:
    return event(frame([{"index": 0, "text": text, "token_ids": list(tokens), "finish_reason": finish}]))


def asked(**more: Any) -> Request:
    return request("a", (1, 2, 3), **{"seed": 5, "max_tokens": 9, "stop_ids": (EOS,), **more})


LOSSES: dict[str, Reply] = {
    "cut": said(part(5, 6), CUT),
    "cut in a line": said(part(5, 6), part(7)[:-9], CUT),
    "without an end": said(part(5, 6)),
    "done without an end": said(part(5, 6), b"data: [DONE]\n\n"),
    "an error": said(part(5, 6), event({"error": {"message": "CUDA error", "code": 500}}), b"data: [DONE]\n\n"),
    "aborted": said(part(5, 6), part(finish="abort")),
    "timed out": said(part(5, 6), part(finish="timeout")),
    "no JSON": said(part(5, 6), b"data: {oops\n\n"),
}


@pytest.mark.parametrize("why", LOSSES)
def test_a_sample_that_is_lost_goes_on_from_there(opened: Opened, chat: Chat, why: str) -> None:
    engine, server = opened(in_turn(LOSSES[why], said(part(7), part(8, 9, EOS, finish="stop"))))
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 6, 7, 8, 9, EOS], FinishReason.STOP)
    first, second = server.bodies
    assert second == {**first, "prompt": [1, 2, 3, 5, 6], "max_tokens": 7, "seed": second["seed"]}
    assert second["seed"] != first["seed"]


def test_tokens_of_an_aborted_event_are_made_again(opened: Opened) -> None:
    """They may be what the abort has left of a token."""
    engine, server = opened(in_turn(said(part(5), part(6, finish="abort")), said(part(7, finish="length"))))
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 7], FinishReason.LENGTH)
    assert server.bodies[1]["prompt"] == [1, 2, 3, 5]


def test_every_try_has_a_seed_of_its_own_but_where_noise_is_by_position(opened: Opened) -> None:
    for dialect, seeds in (("vllm", 5), ("trtkit", 1)):
        replies = [
            refusal(503, "loading"), refusal(503, "loading"), said(part(5), CUT), said(part(6), CUT),
            said(part(7, finish="length")),
        ]  # fmt: skip
        engine, server = opened(in_turn(*replies), dialect=dialect)
        engine.submit(asked())
        assert told(drain(engine))[0] == [5, 6, 7]
        assert len({it["seed"] for it in server.bodies}) == seeds
        assert [it["max_tokens"] for it in server.bodies] == [9, 9, 9, 8, 7]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_is_busy_is_asked_again(opened: Opened, chat: Chat, status: int) -> None:
    engine, server = opened(in_turn(*[refusal(status, "later")] * 3, vllm(chat, [[5, 6]], "length")))
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 6], FinishReason.LENGTH)
    assert len(server.bodies) == 4


def test_waits_grow_and_are_as_long_as_the_server_wants(
    opened: Opened, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a quarter of a minute, whatever it says."""
    monkeypatch.setattr(endpoint_engine, "_FIRST_DELAY_SECONDS", 0.5)
    monkeypatch.setattr(endpoint_engine, "_LONGEST_DELAY_SECONDS", 15.0)
    replies = [refusal(503, "x")] * 7 + [refusal(429, "x", **{"Retry-After": it}) for it in ("2", "9999")]
    engine, _ = opened(in_turn(*replies[-2:], *replies[:7], said(part(5), CUT), vllm(chat, [[6]], "length")))
    delays: list[float] = []
    start = engine._client.start

    def start_now(body: Any, *, delay: float = 0.0) -> int:
        delays.append(delay)
        return start(body)

    monkeypatch.setattr(engine._client, "start", start_now)
    engine.submit(asked())
    assert told(drain(engine))[0] == [5, 6]
    assert delays == [0.0, 2.0, 15.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0, 0.5]


def test_a_server_that_comes_up_later_is_found(opened: Opened, chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(free_socket()) as bound, contextlib.ExitStack() as stack:
        with caplog.at_level(logging.WARNING):
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
            engine, _ = opened(lambda body: said(), url=url)
            for name in "ab":
                engine.submit(request(name, (1,), max_tokens=9))
            while not caplog.records:
                assert not list(engine.step())
        server = stack.enter_context(scripted(lambda body: vllm(chat, [[5, 6]], "length"), on=bound))
        outputs = drain(engine)
        assert sorted((it.request_id, it.tokens) for it in outputs) == [("a", (5, 6)), ("b", (5, 6))]
        assert len(server.bodies) == 2
    assert len([it for it in caplog.records if it.name == "trtkit"]) == 1, "it is said once"
    assert "goes on from where it was" in caplog.text


@pytest.mark.parametrize(
    ("reply", "words", "hint"),
    [
        (refusal(400, "max_tokens is too large"), r"\(400\): max_tokens is too large", "--max-tokens"),
        (document(422, {"detail": "top_k: unknown"}), r"\(422\): top_k: unknown", "--top-k 0"),
        (refusal(401, "Unauthorized"), r"\(401\): Unauthorized", "TRTKIT_ENDPOINT_KEY"),
        (refusal(403, "Forbidden"), r"\(403\): Forbidden", "TRTKIT_ENDPOINT_KEY"),
        (page("<html>Not Found", 404), r"\(404\): <html>Not Found", "chat alone"),
    ],
)
def test_a_refusal_ends_the_run_with_the_servers_words(opened: Opened, reply: Reply, words: str, hint: str) -> None:
    engine, server = opened(lambda body: reply)
    engine.submit(asked())
    with pytest.raises(EngineError, match=words) as caught:
        drain(engine)
    assert hint in str(caught.value.hint)
    assert len(server.bodies) == 1
    assert not engine.has_work


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_takes_others_may_refuse_one(opened: Opened, status: int) -> None:
    """It ends alone: a prompt may be too long for a server that does not say how long they may be."""
    long = [9] * 50

    def reply(body: dict[str, Any]) -> Reply:
        return refusal(status, "too long") if body["prompt"] == long else said(part(5), part(6, finish="length"))

    engine, _ = opened(reply)
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 6], FinishReason.LENGTH)
    engine.submit(replace(asked(), id="long", prompt=tuple(long)))
    engine.submit(replace(asked(), id="other"))
    outputs = drain(engine)
    assert told(it for it in outputs if it.request_id == "long") == ([], FinishReason.LENGTH)
    assert told(it for it in outputs if it.request_id == "other") == ([5, 6], FinishReason.LENGTH)


def test_a_key_that_is_not_taken_any_more_ends_the_run(opened: Opened) -> None:
    replies = iter([said(part(5, finish="length")), refusal(401, "expired")])
    engine, _ = opened(lambda body: next(replies))
    engine.submit(asked())
    drain(engine)
    engine.submit(asked())
    with pytest.raises(EngineError, match="expired"):
        drain(engine)


def test_a_sample_that_is_lost_at_its_limit_has_ended(opened: Opened) -> None:
    """The server had only not said so yet."""
    for hold in (False, True):
        engine, server = opened(lambda body: said(part(5, 6), part(7), CUT))
        engine.submit(replace(asked(max_tokens=3), hold=hold))
        assert told(drain(engine)) == ([5, 6, 7], FinishReason.LENGTH)
        assert len(server.bodies) == 1
        if hold:
            engine.extend("a", [8], max_tokens=3, drop=1)
            assert told(drain(engine)) == ([5, 6, 7], FinishReason.LENGTH)
            assert server.bodies[1]["prompt"] == [1, 2, 3, 5, 6, 8]
        else:
            engine.submit(asked())


def test_a_part_that_was_extended_goes_on_from_its_own_beginning(opened: Opened) -> None:
    engine, server = opened(
        in_turn(
            said(part(5, 6, 7, finish="length")), said(part(20, 21), CUT), said(part(22, finish="length")),
            said(part(30, finish="length")),
        )
    )  # fmt: skip
    engine.submit(replace(asked(max_tokens=3), hold=True))
    assert told(drain(engine))[0] == [5, 6, 7]
    engine.extend("a", [11, 12], max_tokens=4, drop=2)
    assert told(drain(engine))[0] == [20, 21, 22]
    engine.extend("a", [], max_tokens=1)
    assert told(drain(engine))[0] == [30]
    assert [(it["prompt"], it["max_tokens"]) for it in server.bodies] == [
        ([1, 2, 3], 3), ([1, 2, 3, 5, 11, 12], 4), ([1, 2, 3, 5, 11, 12, 20, 21], 2),
        ([1, 2, 3, 5, 11, 12, 20, 21, 22], 1),
    ]  # fmt: skip
    assert len({it["seed"] for it in server.bodies}) == 4, "every part draws anew"
    assert engine.stats().prompt_tokens == 3 + 6 + 9, "what is lost is not asked for"


@pytest.mark.parametrize("kind", ["llamacpp", "other"])
def test_text_that_is_lost_goes_on_behind_its_tokens(opened: Opened, chat: Chat, kind: str) -> None:
    words = chat.encode("né! x")
    stream = STREAMS[kind](chat, [words[:2], words[2:4], words[4:]], "length").body
    engine, server = opened(
        in_turn(said(stream[0], stream[1], CUT), STREAMS[kind](chat, [words[4:]], "length")), dialect=kind
    )
    engine.submit(asked())
    assert told(drain(engine)) == (list(words), FinishReason.LENGTH)
    assert server.bodies[1]["prompt"] == [1, 2, 3, *words[:4]]
    assert server.bodies[1]["max_tokens"] == 5


def test_others_go_on_when_one_is_lost(opened: Opened) -> None:
    """And each goes on from its own words."""
    seen: dict[int, int] = {}

    def script(body: Any) -> Reply:
        first = body["prompt"][0]
        seen[first] = seen.get(first, 0) + 1
        at = len(body["prompt"]) - 1
        end = [CUT] if seen[first] <= first % 3 else [part(200, finish="length")]
        return said(part(first + 10 * at), *end)

    engine, _ = opened(script)
    tokens, _ = run_all(engine, [request(str(i), (i,), max_tokens=50) for i in range(9)])
    assert tokens == {str(i): [*(i + 10 * at for at in range(i % 3 + 1)), 200] for i in range(9)}


def test_the_last_words_of_what_was_let_go_of_are_not_heard(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled and paused while the server still talks; new words come under new handles."""
    gate = threading.Event()
    talk = said(part(5), gate, part(6), part(7, finish="length"))
    engine, server = opened(in_turn(talk, talk, said(part(8, finish="length")), said(part(9, finish="length"))))
    engine.submit(replace(asked(), hold=True))
    engine.submit(request("b", (2,), max_tokens=9))
    heard = []
    while len(heard) < 2:
        heard += engine.step()
    monkeypatch.setattr(engine._client, "stop", lambda handle: None)
    engine.pause("a")
    engine.cancel("b")
    gate.set()
    engine.extend("a", [], max_tokens=3)
    outputs = drain(engine)
    assert [(it.request_id, it.tokens, it.finish) for it in outputs] == [
        ("b", (), FinishReason.CANCELLED), ("a", (8,), FinishReason.LENGTH),
    ]  # fmt: skip
    assert server.bodies[2]["prompt"] == [1, 2, 3, 5]


def test_what_is_lost_is_hung_up_on(opened: Opened) -> None:
    """An abort that is no end of its stream: the row is not held twice."""
    engine, server = opened(in_turn(said(part(finish="abort"), HOLD), said(part(7, finish="length"))), rows=1)
    engine.submit(asked())
    assert told(drain(engine))[0] == [7]
    assert (server.hung_up, server.most_open) == (1, 1)


def test_a_step_has_a_word_of_every_row_that_has_begun(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a little later than the others is waited for; a row that has not begun, or has ended, is not."""
    monkeypatch.setattr(endpoint_engine, "_WAIT_SECONDS", 20.0)
    gate = threading.Event()
    replies = {1: said(part(5), part(6, finish="length")), 2: said(part(7), gate, part(8, finish="length"))}
    engine, server = opened(lambda body: replies[body["prompt"][0]])
    engine.submit(replace(asked(), id="late", prompt=(2,)))
    heard: list[str] = []
    while not heard:
        heard += [it.request_id for it in engine.step()]
    assert heard == ["late"]
    engine.submit(replace(asked(), id="quick", prompt=(1,)))
    wait_for(lambda: len(server.bodies) == 2)
    opening = threading.Timer(0.03, gate.set)
    opening.start()
    outputs = list(engine.step())
    opening.join()
    assert {it.request_id for it in outputs} == {"late", "quick"}
    assert {it.finish for it in outputs} == {FinishReason.LENGTH}
