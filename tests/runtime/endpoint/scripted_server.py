"""An HTTP server that says what a test has written down, byte for byte, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

HOLD: Final = "hold"
"""Say no more until the client hangs up."""
CUT: Final = "cut"
"""Close the connection in the middle of the body."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. Every part of ``body`` is a chunk of its own: events may be cut anywhere."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Sequence[bytes | threading.Event | Literal["hold", "cut"]] = ()
    """Bytes to send, events to wait for, :data:`HOLD`, :data:`CUT`."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    headers: Mapping[str, str]
    body: Any


Script = Callable[[dict[str, Any]], Reply]


def said(*parts: bytes | threading.Event | Literal["hold", "cut"]) -> Reply:
    """A stream of events."""
    return Reply(headers={"Content-Type": "text/event-stream"}, body=parts)


def document(status: int, content: object, **headers: str) -> Reply:
    """A JSON document."""
    return Reply(
        status=status, headers={"Content-Type": "application/json", **headers}, body=[json.dumps(content).encode()]
    )


def page(text: str, status: int = 200) -> Reply:
    """A web page."""
    return Reply(status=status, headers={"Content-Type": "text/html"}, body=[text.encode()])


def in_turn(*replies: Reply) -> Script:
    """The first request gets the first reply, and so on."""
    left = list(replies)
    return lambda body: left.pop(0)


class ScriptedServer:
    """Answers ``POST /v1/completions`` by a script, and ``GET`` with pages. Lives in a thread; see :func:`scripted`."""

    def __init__(self, script: Script, pages: Mapping[str, Reply], listening: socket.socket) -> None:
        self.script, self.pages = script, pages
        self.asked: list[Asked] = []
        """All requests so far, in the order in which they came."""
        self.open_now = self.most_open = self.hung_up = 0
        self.port: int = listening.getsockname()[1]
        self._listening = listening
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted server")
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(20)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Of the completions that were asked for."""
        return [it.body for it in self.asked if it.body is not None]

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, sock=self._listening)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the connection is over."""
        method, path, _ = (await reader.readline() or b"- - -").decode().split()
        headers: dict[str, str] = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if method == "-":
            return False
        body = json.loads(await reader.readexactly(int(headers["content-length"]))) if method == "POST" else None
        self.asked.append(Asked(path, headers, body))
        if method == "POST" and path == "/v1/completions":
            reply = self.script(body)
        else:
            reply = self.pages.get(path, document(404, {"detail": "Not Found"}))
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            return await self._send(reply, reader, writer)
        finally:
            self.open_now -= 1

    async def _send(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = [f"HTTP/1.1 {reply.status} Whatever", "Transfer-Encoding: chunked"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        for part in reply.body:
            if isinstance(part, threading.Event):
                await writer.drain()
                while not part.is_set():
                    await asyncio.sleep(0.002)
            elif part == CUT:
                await writer.drain()
                return False
            elif part == HOLD:
                await writer.drain()
                assert not await reader.read(), "the client says something in the middle of an answer"
                self.hung_up += 1
                return False
            elif part:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = list(self._connections)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


def free_socket() -> socket.socket:
    """Bound to a port, on which connections are refused as long as nobody listens."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound


@contextlib.contextmanager
def scripted(
    script: Script = lambda body: said(), pages: Mapping[str, Reply] | None = None, *, on: socket.socket | None = None
) -> Iterator[ScriptedServer]:
    """A server while the block runs."""
    server = ScriptedServer(script, pages or {}, on or free_socket())
    try:
        yield server
    finally:
        server.close()
