"""However a server cuts what it says into events, and wherever connections end: the tokens are those that it draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import request, run_all
from tests.examples import examples, slow
from tests.runtime.endpoint.replies import event, frame, refusal
from tests.runtime.endpoint.scripted_server import CUT, Reply, ScriptedServer, said, scripted
from trtkit.chat import Chat
from trtkit.runtime.api import FinishReason, Request
from trtkit.runtime.endpoint.client import Client
from trtkit.runtime.endpoint.dialects import DIALECTS, OTHER
from trtkit.runtime.endpoint.engine import EndpointEngine
from trtkit.runtime.endpoint.server import Server

STOP, EOS = 260, 258


class Drawing:
    """A server whose token at a position depends on the request's first token and the position alone.

    What its connections go through is chance: how many tokens are in an event, where the body is cut into packets,
    whether it ends before the sample does.
    """

    def __init__(self, kind: str, chat: Chat, seed: int) -> None:
        self.kind, self.chat, self.seed = kind, chat, seed
        self.tries: dict[int, int] = {}

    def token(self, first: int, position: int) -> int:
        step = (first * 31 + position * 7 + position * position) % 94  # bytes that are characters
        return STOP if step == 13 else step

    def answer(self, body: dict[str, Any]) -> Reply:
        prompt, finish = body["prompt"], "length"
        tries = self.tries[prompt[0]] = self.tries.get(prompt[0], 0) + 1
        chance = random.Random(f"{self.seed} {prompt[0]} {tries}")
        fails = tries < 7
        if fails and chance.random() < 0.1:
            return refusal(chance.choice([429, 500, 503]), "busy")
        tokens: list[int] = []
        for position in range(len(prompt), len(prompt) + body["max_tokens"]):
            tokens.append(self.token(prompt[0], position))
            if tokens[-1] == STOP:
                finish = "stop"
                break
        events: list[bytes] = []
        while tokens:
            size = chance.randint(1, 9)
            events.append(self.event(tokens[:size], None if tokens[size:] else finish))
            tokens = tokens[size:]
        whole = b"".join(events) + b"data: [DONE]\n\n"
        end = chance.choice([CUT, b""]) if fails and chance.random() < 0.7 else None
        if end is not None:
            whole = whole[: chance.randint(0, len(whole))]
        packet = chance.randint(1, 400)
        packets = [whole[start : start + packet] for start in range(0, len(whole), packet)]
        return said(*packets, end or b"")

    def event(self, tokens: list[int], finish: str | None) -> bytes:
        stopped = finish == "stop"
        said_by_text = tokens[:-1] if stopped else tokens
        choice: dict[str, Any] = {"index": 0, "text": self.chat.decode(said_by_text), "finish_reason": finish}
        if self.kind == "vllm":
            choice |= {"token_ids": tokens, "stop_reason": STOP if stopped else None}
        if self.kind == "tensorrt_llm":
            choice |= {"text": "", "token_ids": said_by_text, "stop_reason": STOP if stopped else None}
        return event(frame([choice]))

    def wanted(self, it: Request) -> tuple[list[int], FinishReason]:
        tokens: list[int] = []
        while len(tokens) < it.max_tokens:
            tokens.append(self.token(it.prompt[0], len(it.prompt) + len(tokens)))
            if tokens[-1] == STOP:
                return tokens, FinishReason.STOP
        return tokens, FinishReason.LENGTH


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted() as running:
        yield running


@pytest.mark.parametrize("kind", ["vllm", slow("tensorrt_llm"), slow("other")])
@examples(30)
@given(seed=st.integers(0, 10**9))
def test_the_tokens_are_the_scripts(server: ScriptedServer, chat: Chat, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    drawing = Drawing(kind, chat, seed)
    server.script = drawing.answer
    rows = chance.randint(1, 3)
    asked = [
        request(str(i), (first,) * chance.randint(1, 5), stop_ids=(STOP, EOS), max_tokens=chance.randint(1, 60), seed=i)
        for i, first in enumerate(chance.sample(range(1, 90), 4))
    ]
    client = Client(f"{server.root}/v1", key=None, most=rows)
    found = Server(model="tiny", dialect=DIALECTS.get(kind, OTHER))
    with EndpointEngine(client, found, chat, rows=rows, total_tokens=4096) as engine:
        tokens, finish = run_all(engine, asked)
    assert {it.id: (tokens[it.id], finish[it.id]) for it in asked} == {it.id: drawing.wanted(it) for it in asked}
