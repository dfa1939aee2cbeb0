"""Runs and sessions on a server: counted as with the engine behind it, interrupted, under a clock, after failures."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.fakes import FakeEngine
from tests.on_server import CHAT, Known, attempts, check_same, counted, impatient, journal, remote
from tests.serve.serving import serving
from tests.solve.scripted import places_in, say
from tests.solve.test_solver_clock import asked_to_answer, endless
from trtkit.chat import Chat
from trtkit.errors import UsageError
from trtkit.runtime.api import Engine, Request, StepOutput
from trtkit.runtime.endpoint.remote import Remote
from trtkit.runtime.load import OpenOptions
from trtkit.solve.observer import Observer
from trtkit.solve.options import SolveOptions
from trtkit.solve.policy import policy_named
from trtkit.solve.problems import Problem
from trtkit.solve.records import Attempt
from trtkit.solve.run import Outcome, Places, run_solve
from trtkit.solve.session import open_session
from trtkit.solve.vote import Tally


def engine() -> FakeEngine:
    return FakeEngine(say, rows=6, burst=3)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(engine, CHAT) as (url, _):
        yield url


def solve(there: Remote, places: Places, options: SolveOptions, name: str = "run", **more: Any) -> Outcome:
    where = dataclasses.replace(places, engine=there.place, out=places.out.with_name(name))
    return run_solve(where, there.open, there.chat, options, **more)


def circling(request: Request) -> Sequence[int]:
    """Some samples go in circles, long before their budget is spent."""
    if asked_to_answer(request) or request.seed % 2:
        return say(request)
    return CHAT.encode("So we try once more. " * 150)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (say, {}),
        (say, {"max_tokens": 30, "stop": ("agree(3)",), "together": 3}),
        (say, {"stop": ("none",), "force_close": False, "stop_at": "eos"}),
        (circling, {"stop": ("none",), "max_tokens": 2500}),
    ],
    ids=["all", "made to answer", "as it ends", "circles"],
)  # fmt: skip
def test_votes_are_counted_as_with_the_engine_itself(
    tmp_path: Path, script: Callable[[Request], Sequence[int]], options: dict[str, Any]
) -> None:
    """Whatever the bursts are: those of a server come otherwise."""
    places = places_in(tmp_path, 3)
    chosen = SolveOptions(**{"samples": 9, "outstanding": 20, "save_text": True, **options})
    run_solve(places, lambda: FakeEngine(script, rows=6, burst=5), CHAT, chosen)
    with serving(lambda: FakeEngine(script, rows=6, burst=2), CHAT) as (url, _):
        solve(remote(url), places, chosen, "there")
    check_same(places.out, tmp_path / "there")
    samples = attempts(tmp_path / "there").values()
    endings = {sample["ending"] for sample in samples}
    if script is circling:
        assert "loop" in endings
    elif "max_tokens" in options:
        assert any(sample.get("forced") for sample in samples)
    else:
        assert endings == ({"eos", "length"} if "stop_at" in options else {"think", "eos", "length"})


class Interrupted(Observer):
    """Ctrl-C after so many samples."""

    def __init__(self, samples: int) -> None:
        self._left = samples

    def attempted(self, problem: Problem, attempt: Attempt, tally: Tally) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_the_same_model_wherever_it_is(url: str, tmp_path: Path) -> None:
    places, options = places_in(tmp_path, 4), SolveOptions(samples=9, outstanding=20)
    solve(remote(url), places, options, "whole")
    with pytest.raises(KeyboardInterrupt):
        solve(remote(url), places, options, observer=Interrupted(9))
    head = json.loads((places.out / "run.json").read_text())
    place = dict(remote(url).place)
    assert head["engine"] == place
    assert len(place.pop("tokenizer")) == 64
    assert place == {"path": f"{url}/v1", "model": "tiny", "template": "abc"}
    kept = attempts(places.out)
    with serving(engine, CHAT) as (other, _):
        solve(remote(other), places, options)
    assert counted(places.out) == counted(tmp_path / "whole")
    rows = [(row["problem"], row["index"]) for row in journal(places.out) if row["kind"] == "attempt"]
    assert len(rows) == len(set(rows)) > len(kept) >= 9


@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_go_on_with_seeds_or_without_and_says_that_some_samples_have_none(
    url: str, tmp_path: Path, first: bool
) -> None:
    """A server may die of the first seed: the run that it left is no other one."""
    places, options = places_in(tmp_path, 2), SolveOptions(samples=9, outstanding=20)
    with pytest.raises(KeyboardInterrupt):
        solve(remote(url, seeds=first), places, options, observer=Interrupted(3))
    head = places.out / "run.json"
    assert json.loads(head.read_text())["engine"].get("seeds") == (None if first else "no")
    outcome = solve(remote(url, seeds=not first), places, options)
    assert outcome.summary.problems == 2
    assert json.loads(head.read_text())["engine"] == dict(remote(url, seeds=False).place)
    solve(remote(url), places, options)
    assert json.loads(head.read_text())["engine"]["seeds"] == "no"


def test_another_model_is_another_run(url: str, tmp_path: Path) -> None:
    """Every difference is named, from the server to a directory and back."""
    places, options = places_in(tmp_path, 2), SolveOptions(samples=2)
    made = solve(remote(url), places, options)

    def refused(**changes: Any) -> list[str]:
        with pytest.raises(UsageError, match="a different run") as told:
            run_solve(dataclasses.replace(places, **changes), engine, CHAT, options)
        return list(told.value.offenders)

    other = cast(Chat, Known("def"))
    with serving(engine, CHAT, name="large") as (large, _):
        assert refused(engine=remote(large).place) == ['engine.model: "tiny" in that run, "large" now']
        assert refused(engine=remote(large, other).place) == [
            'engine.model: "tiny" in that run, "large" now', 'engine.template: "abc" in that run, "def" now',
        ]  # fmt: skip
    here = refused()
    told = ["engine.model", "engine.template", "engine.tokenizer", "engine"]
    assert [one.partition(":")[0] for one in here] == told
    assert here[0] == 'engine.model: "tiny" in that run, not there now'
    again = solve(remote(url), places, options)
    assert again.summary.tokens == made.summary.tokens

    run_solve(dataclasses.replace(places, out=tmp_path / "local"), engine, CHAT, options)
    there = refused(engine=remote(url).place, out=tmp_path / "local")
    assert sorted(one.partition(":")[0] for one in there) == sorted(told)


def test_another_tokenizer_is_another_run(url: str, tmp_path: Path) -> None:
    """Though its chat template is the same."""
    places, options = places_in(tmp_path, 1), SolveOptions(samples=2)
    solve(remote(url), places, options)

    class Spelled(Known):
        def encode(self, text: str) -> tuple[int, ...]:
            return super().encode(text.replace("x", "y"))

    with pytest.raises(UsageError, match="a different run") as told:
        solve(remote(url, cast(Chat, Spelled())), places, options)
    assert [one.partition(":")[0] for one in told.value.offenders] == ["engine.tokenizer"]


class Slow(FakeEngine):
    """Steps take so many seconds; with ``stuck``, for ever once it has made some."""

    def __init__(self, script: Any, seconds: float, stuck: threading.Event | None = None) -> None:
        super().__init__(script, rows=6, burst=8)
        self._seconds, self._stuck = seconds, stuck

    def step(self) -> list[StepOutput]:
        if self._stuck is not None and any(b"problem 0" in bytes(r.prompt[:40]) for r, _ in self._left.values()):
            self._stuck.wait(20)
        time.sleep(self._seconds)
        return super().step()


def under_a_clock(seconds: float, **options: Any) -> SolveOptions:
    chosen = dict(policy_named("competition", time_limit=seconds))
    return SolveOptions(**{"samples": 4, "policy": "competition", "time_limit": seconds, **chosen, **options})


def test_a_slow_server_makes_every_problem_answer_in_time(tmp_path: Path) -> None:
    """Its samples never end by themselves. A fifth of a second from word to word: every other step brings nothing."""
    places = places_in(tmp_path, 2)
    with serving(lambda: Slow(endless, 0.2), CHAT) as (url, _):
        there, began = remote(url), time.monotonic()
        outcome = solve(there, places, under_a_clock(4.0))
        taken = time.monotonic() - began
    assert taken < 10.0
    solutions = [verdict.solution for verdict in outcome.verdicts]
    assert [solution.answer and solution.answer.key for solution in solutions] == ["7", "7"]
    assert all(sample.forced for solution in solutions for sample in solution.attempts)
    used = [solution.used_seconds or 0.0 for solution in solutions]
    assert sum(used) == pytest.approx(taken, abs=1.5)
    assert max(used) < 0.8 * taken, "one of them took the time of the other"


def test_a_server_that_hangs_costs_one_problem_its_share(tmp_path: Path) -> None:
    places, stuck = places_in(tmp_path, 3), threading.Event()

    class Freed(Observer):
        """The server hangs as long as the first problem is being worked on."""

        def solved(self, problem: Problem, solution: Any) -> None:
            stuck.set()

    right = CHAT.encode("\\boxed{7}</think>")
    with serving(lambda: Slow(lambda _: right, 0.0, stuck), CHAT) as (url, _):
        there, began = remote(url), time.monotonic()
        try:
            outcome = solve(there, places, under_a_clock(4.0), observer=Freed())
        finally:
            stuck.set()
        assert time.monotonic() - began < 10.0
    first, *rest = [verdict.solution for verdict in outcome.verdicts]
    assert (first.answer and first.answer.key, first.attempts) == ("0", ())  # the policy's default
    assert 1.0 < (first.used_seconds or 0.0) < 3.6, "the others had time of their own"
    assert [solution.answer and solution.answer.key for solution in rest] == ["7", "7"]


def test_a_server_that_is_away_under_a_clock_is_waited_for_no_longer(tmp_path: Path) -> None:
    places = places_in(tmp_path, 2)
    with serving(engine, CHAT) as (url, _):
        there = remote(url)
    began = time.monotonic()
    outcome = solve(there, places, under_a_clock(1.2))
    assert 0.8 < time.monotonic() - began < 10
    assert outcome.summary.defaulted == 2


class Picky(FakeEngine):
    """Breaks on some problems."""

    def __init__(self, script: Any) -> None:
        super().__init__(script, rows=6, burst=3)

    def step(self) -> list[StepOutput]:
        if any(b"break" in bytes(token for token in r.prompt if token < 256) for r, _ in self._left.values()):
            raise RuntimeError("CUDA error")
        return super().step()


def test_a_session_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure costs one problem; the next session on the directory answers from it."""
    impatient(monkeypatch)
    opened: list[FakeEngine] = []

    def opening() -> Engine:
        opened.append(Picky(say))
        return opened[-1]

    settings: dict[str, Any] = {"problems": 4, "samples": 5, "out": tmp_path / "run", "default_answer": "3"}
    with serving(opening, CHAT) as (url, _):
        there = remote(url)
        with open_session(there, **settings, opening=OpenOptions(rows=2)) as session:
            assert session.answer("a", "What is 3 + 4?") == "7"
            broken = session.ask("b", "break it")
            assert broken.error is not None
            assert "EngineError: " in broken.error
            assert "the server has not gone on with b/" in broken.error
            assert "CUDA error" in broken.error
            assert broken.answer is not None
            assert broken.answer.key == "3"
            assert session.answer("c", "What is 4 + 3?") == "7"
        assert journal(tmp_path / "run")[0]["lanes"] == 2, "the rows that it was opened with"
        submitted = len(opened[-1].submitted)
        head = json.loads((tmp_path / "run" / "run.json").read_text())
        assert head["engine"] == there.place
        with open_session(there, **settings) as session:
            assert [session.answer(name, text) for name, text in (("a", "What is 3 + 4?"), ("b", "break it"))] == [
                "7", "3",
            ]  # fmt: skip
            assert len(opened[-1].submitted) == submitted
        directory = tiny_engine_dir(tmp_path / "engine")
        save_chat_files(directory)
        for place in (directory, str(directory)):
            with pytest.raises(UsageError, match="a different run"):
                open_session(place, **settings)
