"""The voted model over HTTP: what a solver of its own would answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

import pytest

from tests.fakes import FakeEngine
from tests.serve.serving import (
    ASK,
    CHAT,
    Slow,
    client,
    sent,
    serving,
    streamed,
    wait_for,
    whole,
)
from tests.solve.scripted import say
from trtkit.runtime.api import Request, StepOutput
from trtkit.solve.grading import Grader
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.solver import Solver


def test_the_voted_model_answers_as_the_solver_does() -> None:
    options = SolveOptions(samples=12, max_tokens=100, seed=4)
    with Grader() as grader:
        engine = FakeEngine(say, rows=6, burst=3)
        alone = Solver(engine, CHAT, options, grader).solve([Problem(id="problem", text="say it")])[0]
    assert alone.answer is not None
    with serving(lambda: FakeEngine(say, rows=6, burst=3), CHAT) as (url, _):
        for _ in range(2):
            reply = whole(client(url), model="tiny:maj", seed=4, max_tokens=100, extra_body={"samples": 12})
            assert reply.choices[0].message.content == f"\\boxed{{{alone.answer.key}}}"
            assert reply.vote["samples"] == len(alone.attempts)
            assert reply.vote["votes"] == [[vote.answer.key, vote.count] for vote in alone.tally.ranked]
            assert reply.vote["stopped_early"] == alone.stopped_early
            assert reply.usage.completion_tokens >= sum(attempt.tokens for attempt in alone.attempts)
        chunks = streamed(client(url), model="tiny:maj", seed=4, max_tokens=100, extra_body={"samples": 12})
        text = "".join(it.choices[0].delta.content or "" for it in chunks)
        assert text == f"\\boxed{{{alone.answer.key}}}"


class Watched(Slow):
    """Knows how many samples of a vote it had at once."""

    most = 0

    def step(self) -> list[StepOutput]:
        votes = [request for request, _ in self._left.values() if b"user:" not in bytes(request.prompt)]
        self.most = max(self.most, len(votes))
        return super().step()


@pytest.mark.parametrize(("others", "at_once"), [(0, 16), (15, 16), (16, 8)])
def test_a_vote_beside_others_runs_few_samples_at_once(others: int, at_once: int) -> None:
    """Others are many when they use half of the rows."""

    def answer(request: Request) -> Sequence[int]:
        return [97] * 4000 if b"user:" in bytes(request.prompt) else CHAT.encode("\\boxed{7}</think>")

    engine = Watched(answer, rows=32)
    with serving(lambda: engine, CHAT) as (url, service):
        with sent(url, json.dumps({"messages": ASK, "n": others}).encode()) if others else contextlib.nullcontext():
            wait_for(lambda: service.engine.unfinished == others)
            reply = whole(client(url), model="tiny:maj", extra_body={"samples": 16})
        assert (reply.vote["answer"], reply.vote["samples"]) == ("7", 8)
        assert engine.most == at_once


def test_a_vote_keeps_to_its_time() -> None:
    def endless(request: Request) -> Sequence[int]:
        if bytes(token for token in request.prompt if token < 256).endswith(b"\\boxed{"):
            return CHAT.encode("9}")
        return CHAT.encode("x" * 4000)

    with serving(lambda: Slow(endless), CHAT, voting=SolveOptions(samples=4, max_tokens=3900)) as (url, service):
        reply = whole(client(url), model="tiny:maj", extra_body={"seconds": 1.5})
        assert reply.vote["seconds"] < 10  # of the 80 that the samples would take
        assert reply.vote["answer"] == "9"  # they were made to answer
        assert service.engine.unfinished == 0


def test_a_problem_does_not_wait_for_another() -> None:
    def answer(request: Request) -> Sequence[int]:
        return [97] * 4000 if b"say it" in bytes(request.prompt) else CHAT.encode("\\boxed{7}</think>")

    body = json.dumps({"model": "tiny:maj", "messages": ASK}).encode()
    with serving(lambda: Slow(answer, rows=32), CHAT) as (url, service), sent(url, body):
        wait_for(lambda: service.engine.unfinished == 8)
        reply = whole(client(url), model="tiny:maj", messages=[{"role": "user", "content": "another"}])
        assert reply.vote["answer"] == "7"
        wait_for(lambda: service.engine.unfinished == 8)
