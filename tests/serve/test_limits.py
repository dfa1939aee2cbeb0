"""How much is under way: a limit that holds however fast clients are, and an end that does not wait for them."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.serving import ASK, CHAT, Slow, call, sent, serving, wait_for
from tests.serve.test_engine_thread import GatedEngine
from trtkit.runtime.api import Request
from trtkit.serve.server import HttpServer


def statuses(connections: Iterable[socket.socket]) -> list[int]:
    found = []
    for connection in connections:
        connection.settimeout(20)
        found.append(int(connection.recv(100).split()[1]))
    return sorted(found)


def test_clients_who_come_during_one_step_are_counted_too() -> None:
    opened = GatedEngine(lambda request: CHAT.encode("ab"))
    body = json.dumps({"messages": ASK, "max_tokens": 2}).encode()
    with serving(lambda: opened, CHAT, most_unfinished=4) as (url, service), contextlib.ExitStack() as stack:
        first = stack.enter_context(sent(url, body))
        wait_for(lambda: service.engine.unfinished == 1)
        more = [stack.enter_context(sent(url, body)) for _ in range(8)]
        wait_for(lambda: len(select.select(more, [], [], 0)[0]) == 5)
        turned_away = select.select(more, [], [], 0)[0]
        assert statuses(turned_away) == [429] * 5
        opened.gate.release(100)
        assert statuses([first, *(it for it in more if it not in turned_away)]) == [200] * 4
        wait_for(lambda: service.engine.unfinished == 0)


def test_the_end_waits_for_what_is_nearly_done_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: Request) -> Sequence[int]:
        return CHAT.encode("brief" if b"brief" in bytes(request.prompt) else "x" * 4000)

    monkeypatch.setattr("trtkit.serve.server._LAST_WORDS_SECONDS", 1)
    engine = Slow(answer, rows=32)
    with contextlib.ExitStack() as clients, ThreadPoolExecutor() as pool:
        with serving(lambda: engine, CHAT) as (url, service):
            asking = [
                clients.enter_context(sent(url, json.dumps({"messages": ASK, **more}).encode()))
                for more in ({}, {"stream": True}, {"model": "tiny:maj"})
            ]
            wait_for(lambda: service.engine.unfinished == 10)
            brief = pool.submit(call, url, "/v1/completions", {"prompt": "brief"})
            wait_for(lambda: service.engine.unfinished == 11)
            began = time.monotonic()
        assert 1 <= time.monotonic() - began < 10  # of the 80 that the samples would take
        status, text = brief.result(10)
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, "brief")
        # The others are told why; the log needs no traceback for each of them.
        said = [b"".join(iter(lambda client=client: client.recv(65536), b"")).decode() for client in asking]
    assert [text.count('"the server is shutting down"') for text in said] == [1, 1, 1]
    assert "data: [DONE]" in said[1]
    assert "Exception" not in caplog.text
    assert engine.closed


def test_a_second_signal_ends_what_is_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[HttpServer] = []

    class Known(HttpServer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            servers.append(self)

    monkeypatch.setattr("tests.serve.serving.HttpServer", Known)
    engine = Slow(lambda request: CHAT.encode("x" * 4000))
    with contextlib.ExitStack() as clients, serving(lambda: engine, CHAT) as (url, service):
        asking = clients.enter_context(sent(url, json.dumps({"messages": ASK}).encode()))
        wait_for(lambda: service.engine.unfinished == 1)
        began = time.monotonic()
        servers[0].handle_exit(signal.SIGTERM, None)
        wait_for(lambda: not servers[0].servers[0].is_serving())
        servers[0].handle_exit(signal.SIGTERM, None)
        asking.settimeout(20)
        assert "the server is shutting down" in b"".join(iter(lambda: asking.recv(65536), b"")).decode()
        assert time.monotonic() - began < 2
