"""A solver on a shared engine comes to what it comes to on an engine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines import random_prompts, request, tiny_engine_dir
from tests.fakes import FakeEngine
from tests.serve.test_engine_thread import SECONDS, Breaking, GatedEngine, asking, echo
from tests.solve.scripted import CHAT, say
from trtkit.errors import EngineError, RequestError
from trtkit.runtime.api import Engine, FinishReason, Request
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.engine_view import EngineView
from trtkit.solve.ends import Ending
from trtkit.solve.grading import Grader
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.solver import Solver

PROBLEMS = [Problem(id=f"p{number}", text=f"problem {number}") for number in range(6)]


def solved(engine: Engine, options: SolveOptions) -> list[Any]:
    with Grader() as grader:
        return [told(solution) for solution in Solver(engine, CHAT, options, grader).solve(PROBLEMS)]


def told(solution: Solution) -> Any:
    attempts = [(it.index, it.tokens, it.box, it.forced, it.ending) for it in solution.attempts]
    return solution.answer, attempts, solution.stopped_early


@pytest.mark.parametrize("max_tokens", [20, 400])
def test_the_same_votes_from_the_same_samples(max_tokens: int) -> None:
    """Also where samples are made to answer (a budget of 20), and while others use the engine too."""
    options = SolveOptions(samples=12, max_tokens=max_tokens)
    alone = solved(FakeEngine(say, rows=6, burst=3), options)
    with EngineThread(lambda: FakeEngine(say, rows=6, burst=3)) as engine:
        for number in range(5):
            engine.submit(asking(f"other/{number}", "x" * 50), lambda *_: None)
        with EngineView(engine, "mine") as view:
            assert solved(view, options) == alone
        forced = {ending for _, attempts, _ in alone for *_, forced, ending in attempts if forced}
        assert (Ending.LENGTH in forced) == (max_tokens == 20)
        assert Ending.THINK in forced, "a thought without an answer"


def test_what_the_engine_did_meanwhile_is_taken_back() -> None:
    opened = GatedEngine(echo, burst=2)
    with EngineThread(lambda: opened) as engine:
        view = EngineView(engine, "mine")
        view.submit(asking("a", "abcdefghijklmnop", hold=True))
        opened.let(1)
        assert [output.tokens for output in until_something(view)] == [tuple(b"po")]
        opened.let(3)  # six tokens that nobody has seen
        opened.gate.release(1)  # for the command to get its turn
        view.pause("a")
        assert not view.has_work
        assert engine.unfinished == 0
        view.extend("a", b"!", max_tokens=4, drop=1)
        dropped = opened.extended[0][2]
        assert dropped - 1 in (6, 8)
        opened.gate.release(1000)
        assert CHAT.decode([token for output in until_end(view) for token in output.tokens]) == "!pon"
        view.cancel("a")


def test_a_row_that_ended_meanwhile_can_still_be_paused() -> None:
    opened = GatedEngine(echo, burst=2)
    with EngineThread(lambda: opened) as engine:
        view = EngineView(engine, "mine")
        view.submit(asking("a", "abcd", hold=True))
        opened.let(2)
        view.pause("a")
        view.extend("a", b"!", max_tokens=2)
        assert opened.extended == [("mine/a", tuple(b"!"), 4)]
        opened.gate.release(1000)
        assert [output.finish for output in until_end(view)][-1] is FinishReason.LENGTH


def test_what_nobody_has_seen_is_taken_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither lost by an extension that is refused, nor taken back from the one after it."""
    opened = GatedEngine(echo, burst=2)
    with EngineThread(lambda: opened) as engine:
        view = EngineView(engine, "mine")
        view.submit(asking("a", "abcd", hold=True))
        opened.let(2)
        view.pause("a")
        assert engine.unfinished == 0

        def refuse(*_: object, **__: object) -> None:
            raise RequestError("too long")

        with monkeypatch.context() as refusing:
            refusing.setattr(opened, "extend", refuse)
            with pytest.raises(RequestError, match="too long"):
                view.extend("a", b"!", max_tokens=2)
        opened.gate.release(1000)
        for dropped in (4, 0):
            view.extend("a", b"!", max_tokens=2)
            assert opened.extended[-1] == ("mine/a", tuple(b"!"), dropped)
            assert [output.finish for output in until_end(view)][-1] is FinishReason.LENGTH


def test_what_cannot_be_paused_is_refused() -> None:
    with EngineThread(lambda: FakeEngine(echo)) as engine:
        view = EngineView(engine, "mine")
        with pytest.raises(RequestError):
            view.pause("nobody")
        view.submit(asking("a", hold=True))
        with pytest.raises(RequestError, match="in use"):
            view.submit(asking("a"))


def test_what_the_engine_refuses_is_refused_whatever_it_took_before() -> None:
    with EngineThread(lambda: FakeEngine(echo, max_total_tokens=20)) as engine:
        view = EngineView(engine, "mine")
        view.submit(asking("a", "short"))
        with pytest.raises(RequestError, match="too long"):
            view.submit(asking("b", "x" * 30))
        assert [output.request_id for output in until_end(view)][-1] == "a"


def test_nothing_is_left_of_a_view_that_is_closed() -> None:
    opened = GatedEngine(echo)
    with EngineThread(lambda: opened) as engine:
        with EngineView(engine, "mine") as view:
            for name in ("paused", "running"):
                view.submit(asking(name, hold=True))
            opened.gate.release(1)
            view.pause("paused")
        opened.gate.release(1000)
        engine.stats().result(SECONDS)
        assert sorted(opened.cancelled) == ["mine/paused", "mine/running"]


def test_failures_and_giving_up_end_a_step() -> None:
    left = [Breaking(echo), FakeEngine(echo)]
    with EngineThread(lambda: left.pop(0)) as engine:
        view = EngineView(engine, "mine")
        view.submit(asking("a"))
        with pytest.raises(EngineError, match="illegal memory access"):
            until_end(view)
        other = EngineView(engine, "other")
        other.submit(asking("a", "x" * 90))
        other.abandon()
        with pytest.raises(EngineError, match="nobody waits"):
            until_end(other)


def test_a_real_engine_that_ran_ahead_goes_on_the_same(tmp_path: Path) -> None:
    """Pause, take back, extend on the torch runtime: the tokens are those of an engine that waits for its caller."""
    directory = tiny_engine_dir(tmp_path / "engine")
    prompt = random_prompts(1, [20])[0]
    asked = held(request("a", prompt, seed=5, max_tokens=60))

    def play(engine: Engine, ahead: int) -> list[int]:
        engine.submit(asked)
        seen: list[int] = []
        while len(seen) < 6:
            seen += [token for output in engine.step() for token in output.tokens]
        if ahead:
            shared.gate(ahead)
        engine.pause("a")
        engine.extend("a", (7, 8, 9), max_tokens=30, drop=len(seen) - 6)
        more: list[int] = []
        while engine.has_work:
            more += [token for output in engine.step() for token in output.tokens]
        engine.cancel("a")
        return seen[:6] + more

    with open_engine(directory, OpenOptions(device="cpu", threads=1)) as engine:
        alone = play(engine, 0)

    class Shared:
        """Waits until the engine is so many tokens ahead of what its caller has seen."""

        def gate(self, tokens: int) -> None:
            before = thread.stats().result(SECONDS).new_tokens
            while thread.stats().result(SECONDS).new_tokens < before + tokens:
                pass

    shared = Shared()
    with EngineThread(lambda: open_engine(directory, OpenOptions(device="cpu", threads=1))) as thread:
        assert play(EngineView(thread, "mine"), 10) == alone


def held(asked: Request) -> Request:
    return Request(
        id=asked.id,
        prompt=asked.prompt,
        sampling=asked.sampling,
        max_tokens=asked.max_tokens,
        seed=asked.seed,
        hold=True,
    )


def until_something(view: EngineView) -> list[Any]:
    while not (outputs := view.step()):
        pass
    return list(outputs)


def until_end(view: EngineView) -> list[Any]:
    outputs = []
    while view.has_work:
        outputs += view.step()
    return outputs
