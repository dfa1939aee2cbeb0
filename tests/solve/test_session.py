"""Problems one at a time under one clock: answers, time, failures, and what is left for the next session."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.solve.scripted import CHAT, write_engine
from tests.solve.test_solver_clock import TimedEngine, endless
from trtkit.errors import UsageError
from trtkit.report.read import read_runs
from trtkit.runtime.api import Request, StepOutput
from trtkit.runtime.load import OpenOptions
from trtkit.solve.options import SolveOptions
from trtkit.solve.policy import policy_named
from trtkit.solve.problems import read_problems
from trtkit.solve.run_head import PROBLEMS_FILE
from trtkit.solve.session import Session, open_session


def right(request: Request) -> Sequence[int]:
    return CHAT.encode("\\boxed{7}</think>")


class World:
    """The engines that were opened, on one clock."""

    def __init__(self, directory: Path, script: Callable[[Request], Sequence[int]] = right) -> None:
        self.now, self.script, self.directory = 50.0, script, directory
        self.engines: list[TimedEngine] = []
        self.breaks: set[str] = set()
        self.opens = True

    def engine(self) -> Any:
        world = self
        if not self.opens:
            raise RuntimeError("no device")

        class Engine(TimedEngine):
            def step(self) -> list[StepOutput]:
                if any(name.partition("/")[0] in world.breaks for name in self._left):
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                outputs = super().step()
                world.now += self._seconds
                return outputs

            def cancel(self, request_id: str) -> None:
                if request_id.partition("/")[0] in world.breaks:
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                super().cancel(request_id)

        self.engines.append(Engine(self.script))
        return self.engines[-1]

    def session(self, problems: int, *, out: Path | None = None, began: float | None = None, **options: Any) -> Session:
        limit = options.get("time_limit")
        chosen = {} if limit is None else dict(policy_named("competition", time_limit=limit))
        return Session(
            self.engine, CHAT, SolveOptions(**{"samples": 4, **chosen, **options}),
            problems=problems, engine=self.directory, out=out, began=began, clock=lambda: self.now,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(write_engine(tmp_path / "engine"))


def test_problems_are_answered_as_they_come(world: World) -> None:
    with world.session(3) as session:
        assert session.answer("a", "What is 3 + 4?") == "7"
        assert session.answer("b", "What is 4 + 3?") == "7"
        assert session.answer("a", "What is 3 + 4?") == "7"
        assert list(session.solutions) == ["a", "b"]
        with pytest.raises(UsageError, match="another text"):
            session.ask("a", "What is 5 + 2?")
    assert session.answer("a", "What is 3 + 4?") == "7"
    with pytest.raises(UsageError, match="session is closed"):
        session.ask("c", "What is 5 + 2?")
    assert len(world.engines) == 1


def test_the_time_is_dealt_out_over_the_problems_that_are_expected(world: World) -> None:
    """Ten problems in 1000 s that never end by themselves: each is given about 100, and none more than the rest."""
    world.script = endless
    with world.session(10, time_limit=1000.0) as session:
        spent = []
        for number in range(10):
            began = world.now
            solution = session.ask(f"p{number}", f"problem {number}")
            spent.append(world.now - began)
            assert solution.answer is not None
            assert solution.answer.key == "7"
        assert sum(spent) <= 1000
        assert min(spent) > 60
        assert max(spent) < 170


def test_pauses_between_problems_are_nobodys_but_pass(world: World) -> None:
    world.script = endless
    with world.session(4, time_limit=400.0) as session:
        first = session.ask("a", "problem a")
        world.now += 150
        second = session.ask("b", "problem b")
        assert second.used_seconds is not None
        assert first.used_seconds is not None
        assert second.used_seconds < 100, "the pause is no part of it"
        assert second.share_seconds is not None
        assert first.share_seconds is not None
        assert second.share_seconds < first.share_seconds, "but it is gone"
        world.now += 1000
        late = session.ask("c", "problem c")
        assert (late.answer and late.answer.key, late.stopped_early, late.tokens) == ("0", "time limit", 0)


def test_more_problems_than_expected_are_answered_too(world: World) -> None:
    with world.session(1, time_limit=500.0) as session:
        assert [session.answer(name, name) for name in "abc"] == ["7", "7", "7"]


def test_an_engine_that_fails_costs_one_problem(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.breaks = {"b"}
    with world.session(3, time_limit=500.0) as session:
        assert session.answer("a", "problem a") == "7"
        broken = session.ask("b", "problem b")
        assert broken.answer is not None
        assert broken.answer.key == "0"
        assert "illegal memory access" in str(broken.error)
        world.breaks = set()
        assert session.answer("c", "problem c") == "7"
        assert session.ask("b", "problem b") is broken
        assert [engine.closed for engine in world.engines] == [True, False], "two would not fit on the device"
    assert len(world.engines) == 2
    assert "problem b" in caplog.text


def test_votes_that_were_counted_before_the_failure_decide(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_is_slow(request: Request) -> Sequence[int]:
        return right(request) if request.id.endswith(("/0", "/1")) else endless(request)

    world.script = one_is_slow
    steps = 0

    with world.session(2, time_limit=500.0, samples=5) as session:
        engine = world.engines[-1]
        step = engine.step

        def fail_later() -> list[StepOutput]:
            nonlocal steps
            steps += 1
            if steps == 40:
                raise RuntimeError("out of memory")
            return step()

        monkeypatch.setattr(engine, "step", fail_later)
        solution = session.ask("a", "problem a")
        assert solution.answer is not None
        assert (solution.answer.key, solution.tally.finished) == ("7", 2)
        assert solution.error is not None


@pytest.mark.parametrize("name", ["journal.jsonl", PROBLEMS_FILE])
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    out = tmp_path / "run"
    full, aside = out / name, tmp_path / "aside"
    with world.session(4, out=out, samples=5) as session:
        session.ask("a", "problem a")
        full.rename(aside)
        full.mkdir()  # nothing can be appended to it
        for problem in "bc":
            solution = session.ask(problem, f"problem {problem}")
            assert (solution.error, solution.tally.finished) == (None, 5)
        assert caplog.text.count("cannot be written") > 0
        full.rmdir()
        aside.rename(full)
        session.ask("d", "problem d")
    (run,) = read_runs([out])
    assert [(result.id, result.text) for result in run.results] == [(name, f"problem {name}") for name in "abcd"]
    with world.session(4, out=out, samples=5) as again:
        assert {name: len(solution.attempts) for name, solution in again.solutions.items()} == dict.fromkeys("abcd", 5)


def test_a_problem_that_no_prompt_holds_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with world.session(2, time_limit=400.0) as session:
        assert session.answer("long", "3 + 4 " * 200_000) == "0"
        assert session.answer("b", "problem b") == "7"
    assert [line for line in caplog.messages if "long" in line] == [
        "problem long: the problem text has 1,200,000 characters, more than fit into any prompt; answered 0"
    ]


def test_a_session_that_was_not_closed_is_read_wherever_it_lies(world: World, tmp_path: Path) -> None:
    with world.session(2, out=tmp_path / "run") as session:
        session.ask("a", "problem a")
        (run,) = read_runs([tmp_path / "run"])
        assert [result.text for result in run.results] == ["problem a"]
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    (run,) = read_runs([moved])
    assert [result.text for result in run.results] == ["problem a"]


def test_a_disk_that_stays_full_costs_the_files_only(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with world.session(2, out=tmp_path / "run") as session:
        session.ask("a", "problem a")
        monkeypatch.setattr(os, "fsync", full)
        assert session.answer("b", "problem b") == "7"
        assert list(session.solutions) == ["a", "b"]
    assert [engine.closed for engine in world.engines] == [True]
    assert "No space left" in caplog.text
    monkeypatch.undo()
    with world.session(2, out=tmp_path / "run") as again:
        assert list(again.solutions) == ["a"], "and what was written is whole"


def test_an_engine_that_cannot_be_opened_again_still_gives_the_default(world: World) -> None:
    world.breaks = {"a"}
    with world.session(2, time_limit=500.0) as session:
        session.ask("a", "problem a")
        world.opens = False
        assert session.answer("b", "problem b") == "0"
        world.opens, world.breaks = True, set()
        assert session.answer("c", "problem c") == "7"


def test_the_directory_is_that_of_a_run_and_another_session_goes_on(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with world.session(4, out=out, time_limit=400.0) as session:
        session.ask("a", "problem a")
        session.ask("b", "problem b")
    (run,) = read_runs([out])
    assert [(result.id, result.text) for result in run.results] == [
        ("a", "problem a"), ("b", "problem b"),
    ]  # fmt: skip
    rows = [json.loads(line) for line in (out / "solutions.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"]) for row in rows] == [("a", "7"), ("b", "7")]
    assert json.loads((out / "summary.json").read_text())["problems"] == 2

    with world.session(4, out=out, time_limit=400.0) as session:
        steps = world.engines[-1].steps
        assert session.answer("b", "problem b") == "7"
        assert world.engines[-1].steps == steps
        session.ask("c", "problem c")
    assert [json.loads(line)["id"] for line in (out / PROBLEMS_FILE).read_text().splitlines()] == ["a", "b", "c"]
    later = [json.loads(line) for line in (out / "solutions.jsonl").read_text().splitlines()]
    assert len(later) == 3
    assert later[:2] == rows, "what was settled stays as it was told, the clock's figures too"
    with pytest.raises(UsageError, match="different run"):
        world.session(4, out=out, time_limit=400.0, samples=5)


def test_a_session_that_starts_again_deals_the_time_out_as_if_it_had_not_stopped(world: World, tmp_path: Path) -> None:
    world.script, shares = endless, []
    for number, restarts in enumerate((False, True)):
        out = tmp_path / f"run{number}"
        session = world.session(5, out=out, time_limit=400.0)
        for name in "ab":
            session.ask(name, f"problem {name}")
        if restarts:
            session.close()
            session = world.session(5, out=out, time_limit=400.0)
        shares.append(session.ask("c", "problem c").share_seconds)
        session.close()
    assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_time_before_the_session_counts(world: World) -> None:
    """Of 400 s, 4 are the reserve and 100 are gone: 74 for each of four problems, and an empty bank."""
    with world.session(4, began=world.now - 100.0, time_limit=400.0) as session:
        assert session.ask("a", "problem a").share_seconds == pytest.approx(74.0)
    with pytest.raises(UsageError, match="0 problems"):
        world.session(0)


def test_a_session_that_died_within_a_problem_asks_it_again(world: World, tmp_path: Path) -> None:
    def interrupted(request: Request) -> Sequence[int]:
        if request.id.startswith("b/"):
            raise KeyboardInterrupt
        return right(request)

    world.script = interrupted
    with world.session(3, out=tmp_path / "run") as session:
        session.ask("a", "problem a")
        with pytest.raises(KeyboardInterrupt):
            session.ask("b", "problem b")
    world.script = right
    with world.session(3, out=tmp_path / "run") as session:
        assert list(session.solutions) == ["a"]
        assert session.answer("b", "problem b") == "7"


@pytest.mark.parametrize("torn", [1, 9, 1000])
def test_what_a_crash_has_torn_is_asked_again(world: World, tmp_path: Path, torn: int) -> None:
    out = tmp_path / "run"
    with world.session(3, out=out) as session:
        session.answer("a", "What is 3 + 4?")
        session.answer("b", "What is 4 + 3 €?")
    path = out / PROBLEMS_FILE
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: max(first, len(whole) - torn)])
    with world.session(3, out=out) as session:
        assert [session.answer(name, f"What is {text}?") for name, text in (("b", "4 + 3 €"), ("c", "7"))] == ["7", "7"]
    assert path.read_bytes().startswith(whole)
    assert [row.id for row in read_problems(path)] == ["a", "b", "c"]


def test_a_problem_that_was_interrupted_can_be_asked_again_in_the_same_session(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's stop button. The samples under way are no finished ones, and their time is not dealt out twice."""
    world.script, steps = endless, 0
    with world.session(3, time_limit=300.0) as session:
        first = session.ask("a", "problem a")
        engine = world.engines[-1]
        step = engine.step

        def stopped() -> list[StepOutput]:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(engine, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            session.ask("b", "problem b")
        world.script = right
        solution = session.ask("b", "problem b")
        assert (solution.answer and solution.answer.key, solution.error) == ("7", None)
        assert solution.tally.finished >= 2
        assert not any(attempt.forced for attempt in solution.attempts)
        assert first.share_seconds is not None
        assert solution.share_seconds is not None
        assert solution.share_seconds < first.share_seconds * 1.1, "one more is to come"
        assert session.answer("c", "problem c") == "7"
    assert len(world.engines) == 2, "a step was cut in two"


def test_ids_and_texts_that_no_file_can_hold(world: World, tmp_path: Path) -> None:
    """Half of a surrogate pair made every later problem fail; blank ones kept the session from being opened again."""
    out = tmp_path / "run"
    odd: list[tuple[Any, str]] = [("half", "is \ud83d 7?"), (5, "five"), ("blank", " \n"), ("", "no id"), ("z", "z")]
    with world.session(9, out=out) as session:
        assert [session.answer(name, text) for name, text in odd] == ["7"] * 5
        assert {solution.error for solution in session.solutions.values()} == {None}
    with world.session(9, out=out) as session:
        steps = world.engines[-1].steps
        assert [session.answer(name, text) for name, text in odd] == ["7"] * 5
        assert world.engines[-1].steps == steps, "all were answered before"
    (run,) = read_runs([out])
    assert len(run.results) == 5


def test_a_session_is_opened_on_an_engine_directory(tmp_path: Path) -> None:
    directory = tiny_engine_dir(tmp_path, "qwen2")
    save_chat_files(directory)
    with pytest.raises(UsageError, match="does not know") as unknown:
        open_session(directory, problems=1, sample=2)
    assert unknown.value.offenders == ("sample",)
    opening = OpenOptions(device="cpu", dtype="float32", rows=2)
    with open_session(
        directory, problems=2, time_limit="10m", opening=opening, samples=2, max_tokens=4, force_close=False
    ) as session:
        assert session.answer("a", "What is 1 + 1?") == "0", "random weights: the policy's default answer"
        assert len(session.ask("a", "What is 1 + 1?").attempts) == 2
    out = tmp_path / "run"
    with open_session(
        directory, problems=1, opening=opening, samples=2, max_tokens=4, force_close=False, out=out
    ) as session:
        assert session.answer("a", "What is 1 + 1?") is None, "no limit, no policy"
    assert len((out / "solutions.jsonl").read_text().splitlines()) == 1
    with open_session(directory, problems=1, time_limit=60, opening=opening, began=time.monotonic() - 70) as session:
        assert session.ask("a", "What is 1 + 1?").stopped_early == "time limit", "it began before the engine was opened"
    with pytest.raises(UsageError, match="works under a clock"):
        open_session(directory, problems=1, policy="competition")


def test_closing_twice_is_fine(world: World, tmp_path: Path) -> None:
    session = world.session(1, out=tmp_path / "run")
    session.ask("a", "problem a")
    steps = world.engines[-1].steps
    session.close()
    session.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines if line["kind"] == "stats"] == [steps]
