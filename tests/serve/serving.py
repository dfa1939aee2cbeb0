"""Servers for tests: the real HTTP server on a free port, in a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from openai import OpenAI

from tests.fakes import EOS_ID, FakeChat, FakeEngine
from trtkit.chat import Chat
from trtkit.errors import InputError
from trtkit.recipe import EngineManifest, Limits, Recipe
from trtkit.runtime.api import Engine, Request, StepOutput
from trtkit.runtime.sources import DirectorySource, Source
from trtkit.serve.app import make_app
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.server import HttpServer, bound_socket
from trtkit.serve.service import Service
from trtkit.serve.voting import Voting
from trtkit.solve.options import SolveOptions

MANIFEST = EngineManifest(
    recipe=Recipe(model="org/tiny", precision="bf16", limits=Limits(batch=16, prompt_tokens=200, total_tokens=256)),
    backend="torch", versions={}, checkpoint_digest={}, quality=None, created="2026-01-01T00:00:00Z",
)  # fmt: skip


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


CHAT = cast(Chat, Talk())
ASK = [{"role": "user", "content": "say it"}]


def recite(request: Request) -> Sequence[int]:
    """A thought, an answer, an end."""
    return [*CHAT.encode("<think>\nsix is é∞</think>\n\\boxed{6} abc END more"), EOS_ID]


class Slow(FakeEngine):
    def step(self) -> list[StepOutput]:
        time.sleep(0.02)
        return super().step()


@contextlib.contextmanager
def serving(
    open_engine: Callable[[], Engine],
    chat: Chat,
    *,
    voting: SolveOptions | None = None,
    manifest: EngineManifest = MANIFEST,
    source: Source | None = None,
    port: int = 0,
    name: str = "tiny",
    **options: Any,
) -> Iterator[tuple[str, Service]]:
    """(base URL, service) of a server that takes requests."""
    ready, ends = threading.Event(), threading.Event()
    with EngineThread(open_engine) as engine, Voting(engine, chat) as votes:
        service = Service(
            engine=engine, voting=votes, chat=chat, name=name,
            source=source or DirectorySource(Path("engine"), manifest),
            options=voting or SolveOptions(samples=8, max_tokens=100), **options,
        )  # fmt: skip
        listening = bound_socket("127.0.0.1", port)
        port = listening.getsockname()[1]
        server = HttpServer(make_app(service), on_ready=ready.set, on_overtime=engine.turn_out, until=ends)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(30)
            yield f"http://127.0.0.1:{port}", service
        finally:
            ends.set()
            thread.join(30)
            engine.close()
            assert not thread.is_alive()


_clients: list[OpenAI] = []


def client(url: str, key: str = "any") -> OpenAI:
    """OpenAI's own client, which tries nothing twice; see :func:`close_clients`."""
    _clients.append(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60))
    return _clients[-1]


def close_clients() -> None:
    while _clients:
        _clients.pop().close()


def call(url: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    """(status, text) of a GET, or of a POST with a JSON body."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    with contextlib.closing(connection):
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@contextlib.contextmanager
def sent(url: str, body: bytes) -> Iterator[socket.socket]:
    """A connection on which a chat request was sent and nothing was read; the client goes away at the end."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    head.append(f"Content-Length: {len(body)}")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        yield connection


def wait_for(holds: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def whole(to: OpenAI, **asked: Any) -> Any:
    return to.chat.completions.create(**{"model": "tiny", "messages": ASK, **asked})


def streamed(to: OpenAI, **asked: Any) -> list[Any]:
    return list(to.chat.completions.create(**{"model": "tiny", "messages": ASK, "stream": True, **asked}))
