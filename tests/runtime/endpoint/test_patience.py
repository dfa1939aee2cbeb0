"""How long a server that does not go on is waited for."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.runtime.endpoint.replies import refusal
from tests.runtime.endpoint.running import Opened, drain, told
from tests.runtime.endpoint.scripted_server import CUT, Reply, said
from tests.runtime.endpoint.test_trouble import EOS, asked, part
from trtkit.errors import EngineError
from trtkit.runtime.api import FinishReason, StepOutput
from trtkit.runtime.endpoint import engine as endpoint_engine


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_trouble_that_lasts_ends_the_run_with_a_reason(opened: Opened) -> None:
    clock = Clock()
    engine, server = opened(lambda body: refusal(503, "still loading"), patience=60.0, clock=clock)
    engine.submit(asked())
    while len(server.bodies) < 3:
        assert not list(engine.step())
    clock.now += 59
    while len(server.bodies) < 6:
        assert not list(engine.step())
    clock.now += 2
    with pytest.raises(EngineError, match=r"not gone on with a for 61 s: 503: still loading") as caught:
        drain(engine)
    assert "goes on from here" in str(caught.value.hint)
    assert server.root in str(caught.value.where)
    assert not engine.has_work, "it is let go of"
    engine.submit(asked())
    assert engine.has_work


def test_patience_begins_anew_with_every_word(opened: Opened) -> None:
    clock = Clock()
    busy = refusal(503, "x")
    left = [busy, said(part(5), CUT), busy, said(part(6), CUT), said(part(7, EOS, finish="stop"))]

    def script(body: Any) -> Reply:
        clock.now += 40
        return left.pop(0)

    engine, _ = opened(script, patience=60.0, clock=clock)
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 6, 7, EOS], FinishReason.STOP)


@pytest.mark.parametrize(("status", "names"), [(429, "a"), (503, "ab")])
def test_a_server_that_is_busy_with_others_is_waited_for(opened: Opened, status: int, names: str) -> None:
    """It says so itself (429), or other samples go on."""
    clock = Clock()

    def script(body: Any) -> Reply:
        clock.now += 20
        if body["prompt"][0] == 1:
            return refusal(status, "too many") if len(server.bodies) < 8 else said(part(9, finish="length"))
        return said(part(6), CUT)

    engine, server = opened(script, patience=60.0, clock=clock)
    for place, name in enumerate(names, start=1):
        engine.submit(replace(asked(max_tokens=99), id=name, prompt=(place,)))
    outputs: list[StepOutput] = []
    while not any(it.finish for it in outputs):
        outputs += engine.step()
    assert told(it for it in outputs if it.request_id == "a") == ([9], FinishReason.LENGTH)


def test_a_server_that_refuses_more_is_asked_for_fewer_at_once(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes two at a time: the others wait until one has ended, and do not ask again and again meanwhile."""
    monkeypatch.setattr(endpoint_engine, "_WAIT_SECONDS", 0.005)
    ends: list[threading.Event] = []

    def script(body: Any) -> Reply:
        if server.open_now >= 2:
            return refusal(429, "full")
        ends.append(threading.Event())
        return said(part(5), ends[-1], part(6, finish="length"))

    engine, server = opened(script)
    for number in range(8):
        engine.submit(replace(asked(), id=str(number)))
    done: list[str] = []
    while engine.has_work:
        for _ in range(8):
            done += [it.request_id for it in engine.step() if it.finish is FinishReason.LENGTH]
        next((end for end in ends if not end.is_set()), threading.Event()).set()
    assert sorted(done) == [str(number) for number in range(8)]
    assert len(server.bodies) < 25, "each one that is taken has another try behind it"


def test_under_a_clock_a_server_that_has_worked_is_waited_for(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()

    def script(body: Any) -> Reply:
        clock.now += 50
        return said(part(5, finish="length")) if len(server.bodies) in (1, 9) else refusal(503, "starting")

    engine, server = opened(script, patience=60.0, clock=clock, patient=True)
    engine.submit(asked())
    assert told(drain(engine))[0] == [5]
    engine.submit(asked())
    assert told(drain(engine))[0] == [5]
    assert len(server.bodies) == 9
    assert [it.getMessage() for it in caplog.records if "Ctrl-C" in it.getMessage()] == [
        "the server has not gone on for 100 s (503: starting); under a time limit it is waited for: Ctrl-C ends "
        "the run, and the same command goes on from there"
    ]
    engine, _ = opened(script, patience=60.0, clock=clock, patient=True, server=server)
    engine.submit(asked())
    with pytest.raises(EngineError, match="starting"):
        drain(engine)


def test_patience_begins_anew_with_every_part(opened: Opened) -> None:
    """What was paused in trouble, and cancelled in trouble, does not bring the trouble along."""
    clock = Clock()
    busy = True

    def script(body: Any) -> Reply:
        return refusal(503, "x") if busy else said(part(5, finish="length"))

    engine, server = opened(script, patience=60.0, clock=clock)
    engine.submit(replace(asked(), hold=True))
    while len(server.bodies) < 2:
        engine.step()
    engine.pause("a")
    assert not engine.has_work
    clock.now += 1000
    engine.extend("a", [4], max_tokens=3)
    count = len(server.bodies)
    while len(server.bodies) < count + 2:
        engine.step()
    engine.cancel("a")
    assert [it.finish for it in engine.step()] == [FinishReason.CANCELLED]
    clock.now += 1000
    engine.submit(asked())
    count = len(server.bodies)
    while len(server.bodies) < count + 2:
        engine.step()
    busy = False
    assert told(drain(engine))[0] == [5]
