"""A request's rows leave the engine however the request ends."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from tests.fakes import FakeEngine
from tests.serve.serving import CHAT, Slow, wait_for
from trtkit.errors import RequestError
from trtkit.runtime.api import Request, SamplingParams
from trtkit.serve.app import _events
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.generation import Asked, Generation
from trtkit.serve.replies import ChatReplies


class Picky(Slow):
    """Knows tokens below 1000, and talks on and on."""

    def __init__(self) -> None:
        super().__init__(lambda request: [97] * 4000)

    def submit(self, request: Request) -> None:
        if max(request.prompt) >= 1000:
            raise RequestError(f"token id {max(request.prompt)} lies outside the vocabulary")
        super().submit(request)


def asked(*prompts: Sequence[int]) -> Asked:
    return Asked(
        name="it", prompts=tuple(map(tuple, prompts)), choices=2, sampling=SamplingParams(), max_tokens=4000, seed=1
    )


def test_where_one_prompt_is_refused_the_others_do_not_run() -> None:
    async def ask(engine: EngineThread) -> None:
        with pytest.raises(RequestError, match="token id 1000"):
            await Generation(engine, CHAT, asked([5, 6], [7, 1000])).begin()

    with EngineThread(Picky) as engine:
        asyncio.run(ask(engine))
        wait_for(lambda: engine.unfinished == 0)


def test_a_stream_that_is_left_at_its_first_word_runs_no_more() -> None:
    async def ask(engine: EngineThread) -> None:
        generation = Generation(engine, CHAT, asked([5, 6]))
        await generation.begin()
        events = _events(generation, ChatReplies(id="it", created=0, model="tiny"), counts=False)
        assert '"role":"assistant"' in await anext(events)
        assert engine.unfinished == 2
        await events.aclose()

    with EngineThread(Picky) as engine:
        asyncio.run(ask(engine))
        wait_for(lambda: engine.unfinished == 0)


class Ahead(FakeEngine):
    """Has the rest of a sample under way when it is cancelled."""

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def test_what_comes_for_a_sample_whose_text_has_ended_is_passed_over() -> None:
    said: dict[int, str] = {0: "", 1: ""}

    async def ask(engine: EngineThread) -> None:
        generation = Generation(engine, CHAT, dataclasses.replace(asked([5, 6]), stops=("bc",)))
        await generation.begin()
        async for piece in generation.pieces():
            said[piece.index] += piece.text + (f" ({piece.finish})" if piece.finish else "")

    engines = [Ahead(lambda request: CHAT.encode("abcdefgh" if request.id.endswith("/0") else "x" * 40))]
    with EngineThread(engines.pop) as engine:
        asyncio.run(ask(engine))
        wait_for(lambda: engine.unfinished == 0)
    assert said == {0: "a (stop)", 1: "x" * 40 + " (length)"}
