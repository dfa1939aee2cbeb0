"""Many clients who ask, wait, leave and err at once: everybody is answered, and nothing stays behind in the engine."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.serve.serving import ASK, serving, wait_for
from trtkit.chat import load_chat
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.options import SolveOptions


async def _whole(client: AsyncOpenAI, source: random.Random) -> None:
    count = source.randint(1, 4)
    reply = await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, n=count)
    assert len(reply.choices) == count


async def _stream(client: AsyncOpenAI, source: random.Random) -> None:
    ends = 0
    async for chunk in await client.chat.completions.create(
        model="tiny", messages=ASK, stream=True, max_tokens=20, n=2
    ):
        ends += chunk.choices[0].finish_reason is not None
    assert ends == 2


async def _leave(client: AsyncOpenAI, source: random.Random) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True, n=3)
    for _ in range(source.randint(1, 10)):
        await anext(stream, None)
    await stream.close()


async def _vote(client: AsyncOpenAI, source: random.Random) -> None:
    more: dict[str, Any] = {"samples": 6, "seconds": source.choice([0.05, 5.0])}
    reply = await client.chat.completions.create(model="tiny:maj", messages=ASK, max_tokens=20, extra_body=more)
    assert reply.choices[0].finish_reason == "stop"


async def _give_up(client: AsyncOpenAI, source: random.Random) -> None:
    asked = client.chat.completions.create(model="tiny:maj", messages=ASK, extra_body={"samples": 8})
    try:
        await asyncio.wait_for(asked, source.random() * 0.2)
    except TimeoutError:
        return


async def _err(client: AsyncOpenAI, source: random.Random) -> None:
    try:
        await client.completions.create(model="tiny", prompt=[[5, 6], [7, 99_999]])
    except openai.BadRequestError:
        return
    raise AssertionError("a token that the model does not know was taken")


# The client's own generators do not always end quietly when a stream is left.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nobody_is_forgotten_and_nothing_stays_behind(model_dir: Path) -> None:
    source, kinds = random.Random(3), [_whole, _stream, _leave, _vote, _give_up, _err]

    async def crowd(url: str) -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
            seats = asyncio.Semaphore(24)

            async def one(number: int) -> None:
                async with seats:
                    await kinds[number % len(kinds)](client, source)

            await asyncio.gather(*(one(number) for number in range(60)))

    options = OpenOptions(device="cpu", threads=1, rows=12)
    voting = SolveOptions(samples=8, max_tokens=60)
    with serving(lambda: open_engine(model_dir, options), load_chat(model_dir), voting=voting) as (url, service):
        asyncio.run(crowd(url))
        wait_for(lambda: service.engine.unfinished == 0)
        stats = service.engine.stats().result(20)
        assert stats.kv_blocks_free == stats.kv_blocks
