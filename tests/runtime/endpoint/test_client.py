"""Streams as the wire brings them, and refusals: the client alone, on a scripted server."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.endpoint.replies import DONE, event, frame, refusal
from tests.runtime.endpoint.scripted_server import (
    CUT,
    HOLD,
    Reply,
    Script,
    ScriptedServer,
    document,
    free_socket,
    in_turn,
    page,
    said,
    scripted,
)
from tests.serve.serving import wait_for
from trtkit.errors import MissingDependency
from trtkit.runtime.endpoint.client import Chunk, Client, Event, Lost, Refused


def words(text: str, finish: str | None = None, **more: Any) -> bytes:
    return event(frame([{"index": 0, "text": text, "finish_reason": finish, **more}]))


@contextlib.contextmanager
def speaking(script: Script, *, most: int = 8, key: str | None = None) -> Iterator[tuple[Client, ScriptedServer]]:
    with scripted(script) as server, Client(f"{server.root}/v1", key=key, most=most) as client:
        yield client, server


def heard(client: Client, handle: int, *, only: bool = True) -> list[Event]:
    """All events up to the end of a request; ``only`` its own may come."""
    found: list[Event] = []
    while all(it.handle != handle or (isinstance(it, Chunk) and it.said.finish is None) for it in found):
        new = client.events(5.0)
        assert new, "nothing comes"
        found += new
    assert not only or {it.handle for it in found} == {handle}
    return found


def ask(client: Client) -> list[Event]:
    return heard(client, client.start({"prompt": [1]}))


def text_of(events: list[Event]) -> str:
    return "".join(it.said.text for it in events if isinstance(it, Chunk))


def lost(script: Script) -> Lost:
    """How a request is lost."""
    with speaking(script) as (client, _):
        *_, last = ask(client)
    assert isinstance(last, Lost)
    return last


def test_a_stream() -> None:
    with speaking(lambda body: said(words("a"), words("b", "length"), event(frame([], usage={})), DONE)) as (client, s):
        chunks = ask(client)
        assert [(it.said.text, it.said.finish) for it in chunks if isinstance(it, Chunk)] == [
            ("a", None),
            ("b", "length"),
        ]
        assert s.asked[0].path == "/v1/completions"
        assert s.asked[0].headers["content-type"] == "application/json"
        assert "authorization" not in s.asked[0].headers
        assert client.events(0.0) == []
        assert client.events(0.01) == []


def test_the_key_is_shown() -> None:
    with speaking(lambda body: said(words("a", "stop")), key="secret") as (client, server):
        ask(client)
        client.get(f"{client.url}/models", 5)
        assert [it.headers["authorization"] for it in server.asked] == ["Bearer secret"] * 2


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_may_be_cut_anywhere(size: int) -> None:
    """In the middle of a word, of a character's bytes, of a line's end."""
    body = (
        b": ping\n\n" + words("né∞") + b": ping - 2026\r\n\r\n" + words("\N{GRINNING FACE}!").replace(b"\n", b"\r\n")
        + b"event: message\nid: 7\nretry: 10\n" + words("ü").replace(b"data: ", b"data:") + b"\n\n\n"
        + words("\ufffd", "stop") + DONE
    )  # fmt: skip
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    with speaking(lambda _: said(*parts)) as (client, _):
        assert text_of(ask(client)) == "né∞\N{GRINNING FACE}!ü\ufffd"


def test_what_comes_behind_the_end_is_not_read() -> None:
    """Nor is an event behind the last words another end."""
    stream = said(words("a", "stop"), words("") * 3, DONE, b"data: {broken\n\n")
    with speaking(lambda _: stream, most=1) as (client, _):
        for _ in range(3):  # what is left of one comes before the next
            assert all(isinstance(it, Chunk) for it in heard(client, client.start({"prompt": [1]}), only=False))


def test_a_first_event_may_repeat_a_long_prompt() -> None:
    ids = list(range(100_000, 300_000))
    body = words("a", prompt_token_ids=ids) + words("b", "stop")
    assert len(body) > 1 << 20
    parts = [body[start : start + (1 << 16)] for start in range(0, len(body), 1 << 16)]
    with speaking(lambda _: said(*parts)) as (client, _):
        assert text_of(ask(client)) == "ab"


def test_a_line_without_end_is_given_up() -> None:
    """No server says that much at once: it does not fill the memory."""
    why = lost(lambda _: said(b"data: ", *[b"x" * (1 << 20)] * 20)).why
    assert why
    assert "\n" not in why


@pytest.mark.parametrize("end", [[], [CUT], [DONE]])
def test_a_stream_without_an_end_is_lost(end: list[Any]) -> None:
    with speaking(lambda _: said(words("a"), words("b"), *end)) as (client, _):
        *chunks, last = ask(client)
        assert text_of(chunks) == "ab"
        assert isinstance(last, Lost)
        assert last.why
        assert last.after == 0


def test_a_stream_that_is_cut_behind_its_end_is_none_the_worse() -> None:
    with speaking(lambda _: said(words("a", "stop"), CUT)) as (client, server):
        ask(client)
        wait_for(lambda: server.open_now == 0)
        assert [it for it in client.events(0.05) if isinstance(it, Chunk)] == []


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"", b"null", b"[]", b"5", b'"x"', b"{}", b'{"choices": 5}', b'{"choices": [null]}',
        b'{"choices": [[]]}', b'{"choices": {"a": 1}}', b'{"choices": [{"token_ids": 5}]}',
        b'{"choices": [{"token_ids": [1e999]}]}', b'{"choices": [{"logprobs": [1]}]}',
        b'{"choices": [{"logprobs": {"token_logprobs": ["x"]}}]}', b"\xff\xfe", b"[" * 100_000,
    ],
    ids=lambda line: line.decode("latin-1")[:24] or "nothing",
)  # fmt: skip
def test_an_event_that_is_no_completion_loses_the_request(line: bytes) -> None:
    """It is told, not waited for: nobody else would end that sample."""
    assert lost(lambda _: said(words("a"), b"data: " + line + b"\n\n", HOLD)).why


@pytest.mark.parametrize(
    "content",
    [
        {"error": {"message": "out of memory", "type": "InternalServerError", "param": None, "code": 500}},
        {"object": "error", "message": "out of memory", "type": "InternalServerError", "param": None, "code": 500},
        {"error": "out of memory"},
        {"error": {"message": "out of memory"}, "choices": []},
    ],
)
def test_an_error_in_the_stream_loses_the_request(content: Any) -> None:
    assert lost(lambda _: said(words("a"), event(content), DONE)).why == "out of memory"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_another_try_may_not_meet(status: int) -> None:
    assert lost(lambda _: refusal(status, "come back")).why == f"{status}: come back"


@pytest.mark.parametrize(
    ("given", "after"), [("7", 7.0), ("", 0.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("-3", 0.0), ("1.5", 0.0)]
)
def test_how_long_the_server_wants_to_be_left_alone(given: str, after: float) -> None:
    it = lost(lambda _: refusal(429, "come back", **({"Retry-After": given} if given else {})))
    assert (it.after, it.why) == (after, "429: come back")


@pytest.mark.parametrize(
    ("reply", "status", "why"),
    [
        (refusal(400, "the prompt is too long"), 400, "the prompt is too long"),
        (document(422, {"detail": [{"msg": "no"}]}), 422, "[{'msg': 'no'}]"),
        (refusal(401, "who are you?"), 401, "who are you?"),
        (page("<h1>\nnothing here</h1>", 404), 404, "<h1> nothing here</h1>"),
        (Reply(status=403), 403, "no reason given"),
        (Reply(status=400, body=[b"\xff\xfe"]), 400, "\ufffd\ufffd"),
    ],
)
def test_what_the_server_does_not_want_is_not_tried_again(reply: Reply, status: int, why: str) -> None:
    with speaking(lambda _: reply) as (client, server):
        (event,) = ask(client)
        assert isinstance(event, Refused)
        assert (event.status, event.why) == (status, why)
        assert len(server.asked) == 1


def test_nobody_listens() -> None:
    with contextlib.closing(free_socket()) as bound, Client(f"http://127.0.0.1:{bound.getsockname()[1]}/v1", key=None,
                                                            most=1) as client:  # fmt: skip
        (event,) = ask(client)
        assert isinstance(event, Lost)
        assert "refused" in event.why.lower() or "connect" in event.why.lower()
        with pytest.raises(OSError, match="onnect"):
            client.get(f"{client.url}/models", 5)


def test_pages() -> None:
    hello = {"/v1/models": page("hé"), "/odd": Reply(headers={"Content-Type": "text/plain"}, body=[b"\xff!"])}
    with scripted(pages=hello) as server, Client(f"{server.root}/v1", key=None, most=1) as client:
        assert client.get(f"{client.url}/models", 5) == (200, "hé")
        assert client.get(f"{server.root}/odd", 5) == (200, "\ufffd!")
        assert client.get(f"{server.root}/none", 5)[0] == 404
        server.pages = {"/never": said(HOLD)}
        with pytest.raises(OSError, match="no answer in time"):
            client.get(f"{server.root}/never", 0.05)
        with pytest.raises(OSError, match=r"."):
            client.get("http://a..b:80/v1", 5)


def test_no_more_than_most_are_open() -> None:
    """The others wait here, and come when one ends or is hung up on."""
    gate = threading.Event()
    script = in_turn(said(HOLD), *[said(gate, words("a", "stop"))] * 5)
    with speaking(script, most=3) as (client, server):
        first = client.start({"prompt": [1]})
        wait_for(lambda: len(server.asked) == 1)
        handles = [client.start({"prompt": [1]}) for _ in range(5)]
        wait_for(lambda: len(server.asked) == 3)
        assert client.events(0.05) == []
        assert server.most_open == 3
        client.stop(first)
        wait_for(lambda: len(server.asked) == 4)
        gate.set()
        found: list[Event] = []
        while len(found) < 5:
            found += client.events(5)
        assert {it.handle for it in found} == set(handles)
        assert (server.most_open, server.hung_up) == (3, 1)


def test_a_request_that_is_stopped_before_it_is_sent_is_never_sent() -> None:
    with speaking(lambda _: said(words("a", "stop"))) as (client, server):
        client.stop(client.start({"prompt": [1]}, delay=60))
        client.stop(client.start({"prompt": [2]}))
        client.stop(12345)
        ask(client)
        assert [it["prompt"] for it in server.bodies] in ([[1]], [[2], [1]])
        assert client.events(0.0) == []


def test_a_delayed_request_does_not_hold_a_place() -> None:
    with speaking(lambda _: said(words("a", "stop")), most=1) as (client, server):
        client.start({"prompt": [7]}, delay=60)
        assert text_of(ask(client)) == "a"
        assert [it["prompt"] for it in server.bodies] == [[1]]


def test_closing_hangs_up_and_leaves_nothing() -> None:
    before = set(threading.enumerate())
    with scripted(lambda _: said(words("a"), HOLD)) as server:
        between = set(threading.enumerate())
        client = Client(f"{server.root}/v1", key=None, most=2)
        for delay in (0, 0, 0, 60):
            client.start({"prompt": [1]}, delay=delay)
        found: list[Event] = []
        while len(found) < 2:
            found += client.events(5)
        client.close()
        client.close()
        assert not [it for it in threading.enumerate() if it.name == "endpoint"]
        wait_for(lambda: set(threading.enumerate()) <= between)  # those that look up names end by themselves
        wait_for(lambda: server.hung_up == 2)
    assert set(threading.enumerate()) <= before
    del client
    gc.collect()  # what is left open would warn now


def test_a_wait_lasts_until_each_of_the_rows_has_spoken() -> None:
    """So that a step of the solver has a word of every row, as a step of an engine has."""
    gate = threading.Event()
    replies = [said(words("a", "stop")), said(gate, words("b", "stop"))]
    with speaking(in_turn(*replies)) as (client, server):
        first = client.start({"prompt": [1]})
        wait_for(lambda: len(server.asked) == 1)
        second = client.start({"prompt": [1]})
        wait_for(lambda: len(server.asked) == 2 and client._events.qsize() == 1)
        opening = threading.Timer(0.2, gate.set)
        opening.start()
        assert [event.handle for event in client.events(5.0, [first, second])] == [first, second]
        opening.join()


def test_a_wait_for_nobody_ends_with_the_first_word_and_any_wait_with_its_time() -> None:
    gate = threading.Event()
    with speaking(in_turn(said(words("a", "stop")), said(gate, words("b", "stop")))) as (client, server):
        first = client.start({"prompt": [1]})
        wait_for(lambda: len(server.asked) == 1)
        silent = client.start({"prompt": [1]})
        assert [event.handle for event in client.events(5.0)] == [first]
        began = time.monotonic()
        assert client.events(0.1, [silent]) == []
        assert 0.09 < time.monotonic() - began < 3
        gate.set()


def test_aiohttp_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependency, match=r"trtkit\[endpoint\]"):
        Client("http://127.0.0.1:1/v1", key=None, most=1)


def test_bodies_arrive_as_they_were() -> None:
    body = {"prompt": random.Random(1).choices(range(10**6), k=50_000), "stop": ["né\n"], "temperature": 0.1}
    with speaking(lambda _: said(words("a", "stop"))) as (client, server):
        heard(client, client.start(body))
        assert json.dumps(server.bodies) == json.dumps([body])
