"""``Client``: streamed completions of a server, all at once, on a thread of their own."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtkit.closing import Closing
from trtkit.errors import MissingDependency
from trtkit.runtime.endpoint.dialects import Said, complaint_of, read_chunk

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Chunk", "Client", "Event", "Lost", "Refused"]

_CONNECT_SECONDS = 10
_SILENCE_SECONDS = 900
"""Longest wait for a server's next word. A request may wait for others to end, so it is long."""
_BUSY = 429
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Statuses that another try may not meet."""
_LONGEST_LINE = 1 << 23
"""Bytes of one event: some servers repeat the prompt's ids in the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New words."""

    handle: int
    said: Said


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The stream ended before the completion did. Another try may do better."""

    handle: int
    why: str
    after: float = 0.0
    """Seconds that the server wants to be left alone for."""
    busy: bool = False
    """It works for others at the moment (429), so it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The server does not want this request, whenever it comes."""

    handle: int
    status: int
    why: str


Event = Chunk | Lost | Refused


class Client(Closing):
    """Requests to one server."""

    def __init__(self, url: str, *, key: str | None, most: int) -> None:
        """``url`` ends with ``/v1``; ``most`` requests are open at once, the others wait here.

        Raises :class:`MissingDependency` without aiohttp.
        """
        try:
            import aiohttp
        except ModuleNotFoundError:
            raise MissingDependency(
                "speaking to a server takes aiohttp", hint="pip install 'trtkit[endpoint]'"
            ) from None
        self._aiohttp, self.url = aiohttp, url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._most, self._gate = most, asyncio.Semaphore(most)
        self._fewer = 0
        """So many requests less, because a server that is busy refuses more."""
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._handles = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        library = self._aiohttp
        session: aiohttp.ClientSession = library.ClientSession(
            headers=self._headers,
            connector=library.TCPConnector(limit=0),
            timeout=library.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS),
            read_bufsize=_LONGEST_LINE // 2,
            trust_env=True,
        )
        return session

    def get(self, url: str, seconds: float) -> tuple[int, str]:
        """(status, text). Raises :class:`OSError` with words when the server cannot be reached in ``seconds``."""
        return asyncio.run_coroutine_threadsafe(self._get(url, seconds), self._loop).result()

    async def _get(self, url: str, seconds: float) -> tuple[int, str]:
        try:
            async with asyncio.timeout(seconds), self._session.get(url) as response:
                return response.status, await response.text(errors="replace")
        except (self._aiohttp.ClientError, OSError, ValueError) as problem:  # TimeoutError is an OSError
            raise OSError(_words(problem)) from None

    def start(self, body: Mapping[str, Any], *, delay: float = 0.0) -> int:
        """Send a completion off, ``delay`` seconds from now; its handle."""
        handle = next(self._handles)
        self._loop.call_soon_threadsafe(self._launch, handle, body, delay)
        return handle

    def _launch(self, handle: int, body: Mapping[str, Any], delay: float) -> None:
        task = self._loop.create_task(self._run(handle, body, delay))
        self._tasks[handle] = task
        task.add_done_callback(lambda _: self._tasks.pop(handle, None))

    def stop(self, handle: int) -> None:
        """Hang up, which ends it on the server too. Events that are there already still come."""
        self._loop.call_soon_threadsafe(self._hang_up, handle)

    def _hang_up(self, handle: int) -> None:
        task = self._tasks.get(handle)
        if task is not None:
            task.cancel()

    def events(self, seconds: float, handles: Collection[int] = ()) -> list[Event]:
        """What has come since the last call, and what comes until each of ``handles`` has said something, or anything
        has where there are none; ``seconds`` are the longest wait."""
        found: list[Event] = []
        missing, deadline = set(handles), time.monotonic() + seconds
        while missing or not found or not self._events.empty():
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            found.append(event)
            missing.discard(event.handle)
        return found

    async def _run(self, handle: int, body: Mapping[str, Any], delay: float) -> None:
        await asyncio.sleep(delay)
        await self._gate.acquire()
        event: Event | None = None
        try:
            async with self._session.post(f"{self.url}/completions", json=body) as response:
                event = await self._listen(handle, response)
        except Exception as problem:  # servers may say anything, and a sample of which nothing is told never ends
            event = Lost(handle=handle, why=_words(problem))
        finally:
            if isinstance(event, Lost) and event.busy and self._fewer + 1 < self._most:
                self._fewer += 1
            else:
                self._gate.release()
        if event is not None:
            self._events.put(event)

    async def _listen(self, handle: int, response: aiohttp.ClientResponse) -> Event | None:
        """Pass on what a completion says; how it failed, if it did."""
        if response.status != 200:
            why = complaint_of(await response.text(errors="replace"), json.loads)
            if response.status not in _PASSING:
                return Refused(handle=handle, status=response.status, why=why)
            after = response.headers.get("Retry-After", "")
            return Lost(
                handle=handle, why=f"{response.status}: {why}", after=float(after) if after.isdigit() else 0.0,
                busy=response.status == _BUSY,
            )  # fmt: skip
        if self._fewer:  # it takes them again
            self._fewer -= 1
            self._gate.release()
        finished = False
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            document = json.loads(data)
            if document.get("error") is not None or document.get("object") == "error":
                return Lost(handle=handle, why=complaint_of(data.decode(), json.loads))
            said = read_chunk(document)
            if said is not None:
                finished = finished or said.finish is not None
                self._events.put(Chunk(handle=handle, said=said))
        return None if finished else Lost(handle=handle, why="the stream ended early")

    def close(self) -> None:
        """Hang up on everything."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()


def _words(problem: BaseException) -> str:
    """What went wrong, also of errors without words of their own."""
    if isinstance(problem, TimeoutError):
        return "no answer in time"
    problem = getattr(problem, "os_error", problem)  # aiohttp's own words speak of TLS, also where there is none
    words = problem.strerror or str(problem) if isinstance(problem, OSError) else f"{type(problem).__name__}: {problem}"
    return " ".join(words.split())
