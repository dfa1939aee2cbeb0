"""One engine for many callers: nobody waits for nothing, whatever fails."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.fakes import FakeChat, FakeEngine
from trtkit.errors import EngineError, RequestError
from trtkit.runtime.api import FinishReason, Request, SamplingParams, StepOutput
from trtkit.serve.engine_thread import EngineThread

CHAT = FakeChat()
SECONDS = 20.0


def asking(name: str, text: str = "hello", *, hold: bool = False, max_tokens: int = 100) -> Request:
    return Request(
        id=name, prompt=tuple(text.encode()), sampling=SamplingParams(), max_tokens=max_tokens, seed=0, hold=hold
    )


class Caller:
    """Somebody who waits for outputs."""

    def __init__(self) -> None:
        self.inbox: queue.Queue[tuple[Sequence[StepOutput], EngineError | None]] = queue.Queue()

    def __call__(self, outputs: Sequence[StepOutput], problem: EngineError | None) -> None:
        self.inbox.put((outputs, problem))

    def to_the_end(self) -> tuple[str, FinishReason | None]:
        tokens: list[int] = []
        while True:
            outputs, problem = self.inbox.get(timeout=SECONDS)
            if problem is not None:
                raise problem
            for output in outputs:
                tokens += output.tokens
                if output.finish is not None:
                    return CHAT.decode(tokens), output.finish


def echo(request: Request) -> Sequence[int]:
    return list(reversed(request.prompt))


class GatedEngine(FakeEngine):
    """Steps only when it is let."""

    def __init__(self, script: Callable[[Request], Sequence[int]], **options: Any) -> None:
        super().__init__(script, **options)
        self.gate = threading.Semaphore(0)
        self.stepped = threading.Semaphore(0)

    def step(self) -> list[StepOutput]:
        assert self.gate.acquire(timeout=SECONDS)
        outputs = super().step()
        self.stepped.release()
        return outputs

    def let(self, steps: int) -> None:
        """Make so many steps, and wait for them."""
        for _ in range(steps):
            self.gate.release()
        for _ in range(steps):
            assert self.stepped.acquire(timeout=SECONDS)


def test_many_callers_get_their_own_outputs() -> None:
    with EngineThread(lambda: FakeEngine(echo, rows=4, burst=2)) as engine:
        callers = {f"text {number}": Caller() for number in range(40)}

        def ask(text: str) -> None:
            engine.submit(asking(text, text), callers[text]).result(SECONDS)

        threads = [threading.Thread(target=ask, args=(text,)) for text in callers]
        for thread in threads:
            thread.start()
        for text, caller in callers.items():
            assert caller.to_the_end() == (text[::-1], FinishReason.LENGTH)
        assert engine.unfinished == 0


def test_a_refusal_reaches_the_one_who_asked() -> None:
    with EngineThread(lambda: FakeEngine(echo, max_total_tokens=8)) as engine:
        with pytest.raises(RequestError, match="too long"):
            engine.submit(asking("a", "x" * 9), Caller()).result(SECONDS)
        assert engine.unfinished == 0
        caller = Caller()
        engine.submit(asking("b", "ok"), caller).result(SECONDS)
        assert caller.to_the_end()[0] == "ko"


@pytest.mark.parametrize("hold", [False, True])
def test_cancel_ends_a_request(hold: bool) -> None:
    opened = GatedEngine(echo)
    with EngineThread(lambda: opened) as engine:
        caller = Caller()
        engine.submit(asking("a", hold=hold), caller).result(SECONDS)
        opened.let(2)
        engine.cancel("a")
        opened.gate.release(3)
        assert caller.to_the_end()[1] is FinishReason.CANCELLED
        assert engine.unfinished == 0
        engine.stats().result(SECONDS)
        gone = weakref.ref(caller)
        del caller
        gc.collect()
        assert gone() is None


def test_a_cancelled_resting_request_is_forgotten() -> None:
    with EngineThread(lambda: FakeEngine(echo)) as engine:
        caller = Caller()
        engine.submit(asking("a", hold=True), caller).result(SECONDS)
        assert caller.to_the_end()[1] is FinishReason.LENGTH
        engine.cancel("a")
        engine.stats().result(SECONDS)
        gone = weakref.ref(caller)
        del caller
        gc.collect()
        assert gone() is None  # a server that runs for weeks keeps nothing of it
        again = Caller()
        engine.submit(asking("a", "free"), again).result(SECONDS)
        assert again.to_the_end()[0] == "eerf"
        assert engine.unfinished == 0


def test_a_cancelled_paused_request_is_forgotten() -> None:
    """The engine reports it as cancelled later, when nobody waits for that any more."""
    opened = GatedEngine(echo)
    with EngineThread(lambda: opened) as engine:
        caller = Caller()
        engine.submit(asking("a", hold=True), caller).result(SECONDS)
        opened.gate.release(2)
        engine.pause("a").result(SECONDS)
        engine.cancel("a")
        opened.gate.release(1000)
        other = Caller()
        engine.submit(asking("b"), other).result(SECONDS)
        assert other.to_the_end()[0] == "olleh"
        assert engine.unfinished == 0


class Breaking(FakeEngine):
    def step(self) -> list[StepOutput]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_failed_engine_is_opened_anew_and_its_requests_are_told() -> None:
    engines = [Breaking(echo), FakeEngine(echo)]
    left = list(engines)
    with EngineThread(lambda: left.pop(0)) as engine:
        callers = [Caller(), Caller()]
        engine.submit(asking("a"), callers[0])
        with pytest.raises(EngineError, match="illegal memory access"):
            callers[0].to_the_end()
        engine.submit(asking("b"), callers[1]).result(SECONDS)
        assert callers[1].to_the_end()[0] == "olleh"
        assert engines[0].closed
        assert not engine.broken
    assert engines[1].closed


class Fragile(FakeEngine):
    """Fails where it is to break."""

    def step(self) -> list[StepOutput]:
        if any(request.prompt == tuple(b"break") for request, _ in self._left.values()):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().step()


def test_what_rested_in_a_failed_engine_is_forgotten() -> None:
    with EngineThread(lambda: Fragile(echo)) as engine:
        for _ in range(2):
            caller = Caller()
            engine.submit(asking("a", hold=True), caller).result(SECONDS)
            assert caller.to_the_end()[0] == "olleh"
            engine.submit(asking("b", "break"), caller)
            with pytest.raises(EngineError, match="illegal memory access"):
                caller.to_the_end()
            assert engine.unfinished == 0


class Jammed(Breaking):
    def close(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_failed_engine_that_does_not_close_is_replaced_too() -> None:
    left = [Jammed(echo), FakeEngine(echo)]
    with EngineThread(lambda: left.pop(0)) as engine:
        callers = [Caller(), Caller()]
        engine.submit(asking("a"), callers[0])
        with pytest.raises(EngineError, match="illegal memory access"):
            callers[0].to_the_end()
        engine.submit(asking("b"), callers[1]).result(SECONDS)
        assert callers[1].to_the_end()[0] == "olleh"


class Weights:
    """What fills a GPU."""


def test_nothing_of_a_failed_engine_is_held_while_the_next_one_is_opened() -> None:
    """A GPU has no room for the weights of both: the traceback must not keep those of the first."""
    held: list[weakref.ref[Weights]] = []

    class Full(FakeEngine):
        def step(self) -> list[StepOutput]:
            weights, cache = Weights(), Weights()
            held.extend((weakref.ref(weights), weakref.ref(cache)))
            try:
                self.verify(weights)
            except RuntimeError as problem:
                raise EngineError("out of memory") from problem
            return []

        def verify(self, weights: Weights) -> None:
            raise RuntimeError("CUDA out of memory")

    left: list[FakeEngine] = [Full(echo), FakeEngine(echo)]
    still_there: list[int] = []

    def open_engine() -> FakeEngine:
        still_there.append(sum(each() is not None for each in held))
        return left.pop(0)

    with EngineThread(open_engine) as engine:
        callers = [Caller(), Caller()]
        engine.submit(asking("a"), callers[0])
        with pytest.raises(EngineError, match="out of memory"):
            callers[0].to_the_end()
        engine.submit(asking("b"), callers[1]).result(SECONDS)
        assert callers[1].to_the_end()[0] == "olleh"
    assert len(held) == 2
    assert still_there == [0, 0]


def test_an_engine_that_cannot_be_opened_again_refuses_everything() -> None:
    broken = threading.Event()
    left = [Breaking(echo)]
    with EngineThread(lambda: left.pop(0), on_broken=broken.set) as engine:
        caller = Caller()
        engine.submit(asking("a"), caller)
        with pytest.raises(EngineError, match="illegal memory access"):
            caller.to_the_end()
        assert broken.wait(SECONDS)
        assert engine.broken
        with pytest.raises(EngineError, match="cannot be opened again"):
            engine.submit(asking("b"), Caller())
        engine.cancel("a")
    assert engine.unfinished == 0


def test_whoever_asks_while_it_breaks_is_told_too() -> None:
    opening, go_on = threading.Event(), threading.Event()
    left = [Breaking(echo)]

    def open_engine() -> FakeEngine:
        if not left:
            opening.set()
            assert go_on.wait(SECONDS)
        return left.pop()

    with EngineThread(open_engine) as engine:
        engine.submit(asking("a"), Caller())
        assert opening.wait(SECONDS)
        late = engine.submit(asking("b"), Caller())
        go_on.set()
        with pytest.raises(EngineError, match="cannot be opened again"):
            late.result(SECONDS)
    assert engine.unfinished == 0


def test_opening_fails_where_it_was_asked_for() -> None:
    def fail() -> Any:
        raise EngineError("no such engine")

    with pytest.raises(EngineError, match="no such engine"):
        EngineThread(fail)


def test_closing_ends_everything() -> None:
    opened = GatedEngine(echo)
    engine = EngineThread(lambda: opened)
    caller = Caller()
    engine.submit(asking("a"), caller).result(SECONDS)
    opened.gate.release(1000)
    engine.close()
    engine.close()
    assert opened.closed
    with pytest.raises(EngineError, match="shutting down"):
        engine.submit(asking("b"), Caller())
    outcome = "open"
    try:
        outcome = caller.to_the_end()[0]
    except EngineError as problem:
        outcome = problem.message
    assert outcome in ("olleh", "the server is shutting down")
