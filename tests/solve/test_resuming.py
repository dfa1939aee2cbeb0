"""Runs that end early, whatever ends them, and go on: the votes are those of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.solve.scripted import (
    CHAT,
    SlowEngine,
    answers,
    options_with,
    outcomes,
    rows,
    run,
    write_engine,
    write_problems,
)
from trtkit.errors import UsageError
from trtkit.interrupts import sigterm_as_interrupt
from trtkit.runtime.api import EngineStats, StepOutput
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.counters import Counters
from trtkit.solve.answers import Answer
from trtkit.solve.engine_figures import engine_figures
from trtkit.solve.grading import Grader
from trtkit.solve.journal import read_history
from trtkit.solve.options import SolveOptions
from trtkit.solve.run import Places, run_solve

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_finished_run_is_shown_again_without_an_engine(places: Places) -> None:
    first = run(places)

    def no_engine() -> SlowEngine:
        raise AssertionError("the engine must not be opened")

    again = run_solve(places, no_engine, CHAT, SolveOptions(samples=9, outstanding=20, stop=()))
    timing = {"seconds": 0, "tokens_per_second": 0}
    assert again.summary.document() | timing == first.summary.document() | timing
    assert [v.solution.tally for v in again.verdicts] == [v.solution.tally for v in first.verdicts]


class Stopping(SlowEngine):
    """Interrupts itself after some steps."""

    def __init__(self, after: int) -> None:
        super().__init__(0.0)
        self.after = after

    def step(self) -> list[StepOutput]:
        if self.steps == self.after:
            raise KeyboardInterrupt
        return super().step()


def test_resuming_gives_what_an_unbroken_run_gives(places: Places, tmp_path: Path) -> None:
    unbroken = Places(problems=places.problems, engine=places.engine, out=tmp_path / "unbroken")
    run(unbroken)
    options = SolveOptions(samples=9, outstanding=20, stop=())
    interruptions = 0
    for after in (0, 5, 9, 14, 20, 30, 50):
        try:
            run_solve(places, lambda after=after: Stopping(after), CHAT, options)
        except KeyboardInterrupt:
            interruptions += 1
            partial = answers(places)
            assert partial == [pair for pair in answers(unbroken) if pair in partial]
    assert interruptions >= 5
    outcome = run(places)
    assert answers(places) == answers(unbroken)
    assert_same_samples(places, unbroken)
    for verdict in outcome.verdicts:
        solution = verdict.solution
        assert len(solution.attempts) == solution.tally.finished
        assert solution.tokens >= sum(attempt.tokens for attempt in solution.attempts)


@pytest.mark.parametrize("stop", ["agree(3)", "beta(0.8)"])
def test_a_machine_with_other_rows_goes_on_in_the_order_of_the_first(places: Places, tmp_path: Path, stop: str) -> None:
    """Which samples a rule sees must not change with the batch of the session that goes on."""

    class Narrow(SlowEngine):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.max_rows = self._rows = 2

    unbroken = Places(problems=places.problems, engine=places.engine, out=tmp_path / "unbroken")
    run(unbroken, options_with(stop))
    with pytest.raises(KeyboardInterrupt):
        run_solve(places, lambda: Stopping(20), CHAT, options_with(stop))
    run_solve(places, Narrow, CHAT, options_with(stop))
    assert outcomes(places) == outcomes(unbroken)


def assert_same_samples(places: Places, unbroken: Places) -> None:
    """Which samples were counted may differ, what a sample says may not; and none is there twice."""
    said = {}
    for one in (places, unbroken):
        history = read_history(one.out / "journal.jsonl")
        said[one.out] = {
            (problem, attempt.index): (attempt.tokens, attempt.box, attempt.finish, attempt.variant)
            for problem, attempts in history.attempts.items()
            for attempt in attempts
        }
        lines = [row for row in rows(one.out / "journal.jsonl") if row["kind"] == "attempt"]
        assert len(lines) == len(said[one.out])
    mine, theirs = said[places.out], said[unbroken.out]
    common = mine.keys() & theirs.keys()
    assert len(common) > len(theirs) / 2
    assert all(mine[key] == theirs[key] for key in common)


@pytest.mark.parametrize(
    ("moments", "count", "stop"),
    [
        (6, 8, "beta(0.8)"),
        pytest.param(20, 40, "none", marks=pytest.mark.slow),
        pytest.param(20, 40, "certificate(0.2)+ladder", marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_random_moments_changes_nothing(moments: int, count: int, stop: str, tmp_path: Path) -> None:
    """Whatever a rule looks at, it stops the resumed run at the same vote."""
    problems = write_problems(tmp_path / "problems.jsonl", count)
    engine = write_engine(tmp_path / "engine")
    unbroken = Places(problems=problems, engine=engine, out=tmp_path / "unbroken")
    broken = Places(problems=problems, engine=engine, out=tmp_path / "broken")
    run(unbroken, options_with(stop))
    rng = random.Random(4)
    journal = broken.out / "journal.jsonl"
    size = (unbroken.out / "journal.jsonl").stat().st_size
    command = [
        sys.executable,
        "-m",
        "tests.solve.scripted",
        str(problems),
        str(engine),
        str(broken.out),
        "0.004",
        stop,
    ]
    kills, kept = 0, b""
    for _ in range(moments):
        wait_for = (journal.stat().st_size if journal.exists() else 0) + rng.randint(1, 2 * size // (3 * moments))
        child = subprocess.Popen(command, cwd=ROOT)
        while child.poll() is None and (not journal.exists() or journal.stat().st_size < wait_for):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.004)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
        written = journal.read_bytes()
        assert written.startswith(kept), "what was journaled must stay as it is"
        kept = written
        if child.returncode == 0:
            break
    assert kills == moments, "all of them hit a run that was not over"
    before = read_history(journal).attempts
    run(broken, options_with(stop))
    after = read_history(journal).attempts
    assert all(set(attempts) <= set(after[problem]) for problem, attempts in before.items())
    assert outcomes(broken) == outcomes(unbroken)
    assert any(row["stopped_early"] not in (None, "unassailable") for row in outcomes(broken)) == (stop != "none")
    assert_same_samples(broken, unbroken)


def test_sigterm_ends_a_run_in_good_order(places: Places) -> None:
    class Terminated(SlowEngine):
        def step(self) -> list[StepOutput]:
            if self.steps == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        run_solve(places, lambda: Terminated(0.0), CHAT, SolveOptions(samples=9, outstanding=20, stop=()))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (places.out / "solutions.jsonl").exists()
    assert run(places).summary.problems == 6


def test_another_run_is_refused_with_every_difference(places: Places) -> None:
    run(places)
    journal = (places.out / "journal.jsonl").read_bytes()
    write_problems(places.problems, 5)
    (places.engine / "engine.json").write_text('{"version": 1, "other": true}')
    with pytest.raises(UsageError) as caught:
        run(places, SolveOptions(samples=4, outstanding=20, seed=1, stop=("agree(3)",)))
    text = str(caught.value)
    for word in (
        "- problems: the file is another one, or was changed since\n",
        "- engine: it is another one, or was built anew since\n",
        "arguments.samples: 9 in that run, 4 now",
        "arguments.seed",
    ):
        assert word in text
    assert "arguments.stop" in text
    assert "--force-new" in text
    assert "path" not in text
    assert "sha256" not in text
    assert "arguments.max_tokens" not in text
    assert (places.out / "journal.jsonl").read_bytes() == journal
    outcome = run(places, SolveOptions(samples=4, outstanding=20, seed=1), force_new=True)
    assert outcome.summary.problems == 5
    assert len(rows(places.out / "solutions.jsonl")) == 5
    attempts = read_history(places.out / "journal.jsonl").attempts
    assert set(attempts) == {f"p{n}" for n in range(5)}, "nothing of the old run votes in the new one"
    assert all(attempt.index < 4 for each in attempts.values() for attempt in each)


def test_what_a_resumed_run_may_have_different(
    places: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(places)
    run(places, SolveOptions(samples=9, outstanding=5, stop=()))
    about = json.loads((places.out / "run.json").read_text())
    about["versions"]["torch"] = "0.1"
    (places.out / "run.json").write_text(json.dumps(about))
    run(places)
    assert "began with other versions" in caplog.text
    moved = places.problems.rename(tmp_path / "moved.jsonl")
    run(Places(problems=moved, engine=places.engine, out=places.out))


def test_a_journal_of_unknown_origin_is_refused(places: Places) -> None:
    places.out.mkdir()
    (places.out / "journal.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"no run\.json"):
        run(places)


def test_a_run_of_an_older_version_is_gone_on_with(places: Places) -> None:
    """It had no clock, no forced answers and no loop kill; asked for that again, it resumes."""
    old = SolveOptions(samples=9, outstanding=20, stop=(), kill_loops=False, force_close=False)
    run(places, old)
    about = json.loads((places.out / "run.json").read_text())
    for name in list(about["arguments"]):
        if name in ("kill_loops", "force_close", "weighting", "policy", "default_answer") or "time" in name:
            del about["arguments"][name]
    (places.out / "run.json").write_text(json.dumps(about))
    journal = places.out / "journal.jsonl"
    new_fields = ("ending", "forced", "share", "used", "bank", "cancelled", "loading", "counted")
    older = [{k: v for k, v in row.items() if k not in new_fields} for row in rows(journal) if row["kind"] != "stats"]
    journal.write_text("".join(json.dumps(row) + "\n" for row in older))
    before = answers(places)
    run(places, old)
    assert answers(places) == before
    with pytest.raises(UsageError, match="kill_loops: false in that run, true now"):
        run(places)


def test_a_settled_problem_keeps_its_other_votes_when_one_was_damaged_on_the_disk(places: Places) -> None:
    first = {verdict.solution.problem_id: verdict.solution for verdict in run(places).verdicts}
    journal, before = places.out / "journal.jsonl", answers(places)
    lines = journal.read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if '"attempt"' in line and '"box": "7"' in line)
    damaged = json.loads(lines[place])["problem"]
    lines[place] = lines[place][:-9]
    journal.write_text("".join(line + "\n" for line in lines))
    again = {verdict.solution.problem_id: verdict.solution for verdict in run(places).verdicts}
    assert answers(places) == before
    assert len(again[damaged].attempts) == len(first[damaged].attempts) - 1


def test_past_the_limit_a_resumed_run_answers_without_an_engine(places: Places) -> None:
    options = SolveOptions(samples=9, outstanding=20, stop=(), time_limit=60.0, default_answer="210")

    def no_engine() -> SlowEngine:
        raise AssertionError("opening the engine would only make it later")

    with pytest.raises(KeyboardInterrupt):
        run_solve(places, lambda: Stopping(30), CHAT, options)
    early = read_history(places.out / "journal.jsonl").attempts
    assert 0 < len(early) < 6
    outcome = run_solve(places, no_engine, CHAT, options, began=time.monotonic() - 60.0)
    document = outcome.summary.document()
    solved = {row["id"]: row for row in rows(places.out / "solutions.jsonl")}
    for problem, row in solved.items():
        voted = problem in early and any(attempt.box for attempt in early[problem])
        assert row["defaulted"] == (not voted)
        assert (row["answer"] == "210") == (not voted)
    assert document["answered"] + document["defaulted"] == 6
    assert document["defaulted"] > 0
    assert document["out_of_time"] == sum(row["stopped_early"] == "time limit" for row in solved.values()) > 0
    again = run_solve(places, no_engine, CHAT, options)
    assert [v.solution.answer for v in again.verdicts] == [v.solution.answer for v in outcome.verdicts]


def test_past_the_limit_nobody_is_asked_whether_answers_are_equal(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take seconds for each pair. What was told then is told again later, when there would be time."""
    options = SolveOptions(samples=4, outstanding=20, stop=(), time_limit=60.0)
    with pytest.raises(KeyboardInterrupt):
        run_solve(places, lambda: Stopping(0), CHAT, options)
    problem = rows(places.problems)[0]["id"]
    boxes = [r"\sqrt{12}", r"2\sqrt{3}", r"2\sqrt 3", r"\pi"]
    lines = [
        {"kind": "attempt", "problem": problem, "index": index, "variant": "solve", "tokens": 90 - index,
         "finish": "stop", "box": box, "seconds": 1.0, "clock": 1.0}
        for index, box in enumerate(boxes)
    ]  # fmt: skip
    with (places.out / "journal.jsonl").open("a") as journal:
        journal.writelines(json.dumps(line) + "\n" for line in lines)
    asked: list[str] = []

    def same(grader: Grader, one: Answer, other: Answer) -> bool:
        asked.append(one.key)
        return True

    monkeypatch.setattr(Grader, "same", same)
    for began in (time.monotonic() - 60.0, None):
        outcome = run_solve(places, lambda: SlowEngine(0.0), CHAT, options, began=began)
        solution = next(v.solution for v in outcome.verdicts if v.problem.id == problem)
        assert [(vote.answer.raw, vote.count) for vote in solution.tally.ranked] == [
            (r"2\sqrt 3", 2), (r"\pi", 1), (r"\sqrt{12}", 1),
        ]  # fmt: skip
    assert asked == []


def test_the_time_of_a_run_is_without_that_of_holding_its_answers_against_known_ones(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal = Grader.equal

    def slow(grader: Grader, gold: Answer, answer: Answer) -> bool:
        time.sleep(0.05)
        return equal(grader, gold, answer)

    monkeypatch.setattr(Grader, "equal", slow)
    began = time.monotonic()
    summary = run(places).summary
    assert summary.seconds < time.monotonic() - began - 1.0


def test_the_engines_counters_add_up_over_sessions(places: Places, caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Stopping):
        def stats(self) -> EngineStats:
            return EngineStats(
                steps=self.steps, new_tokens=120 * self.steps, row_steps=100 * self.steps,
                accepted_by_depth=(15 * self.steps, 5 * self.steps), seconds={"verify": 2.0},
            )  # fmt: skip

    options = SolveOptions(samples=9, outstanding=20, stop=())
    with pytest.raises(KeyboardInterrupt):
        run_solve(places, lambda: Counting(7), CHAT, options)
    outcome = run_solve(places, lambda: Counting(10**6), CHAT, options)
    assert outcome.summary.engine is not None
    engine = outcome.summary.engine.document()
    assert (engine["tokens_per_step"], engine["accepted_by_depth"]) == (1.2, [0.15, 0.05])
    assert engine["phase_seconds"] == {"verify": 4.0}
    assert "1.20 tokens per drafting step" in caplog.text, "a draft head that does not pay is named"


def test_a_head_that_never_drafted_is_not_called_poor() -> None:
    """What is known of a large batch from earlier runs can keep the engine from drafting at all."""
    never = EngineStats(steps=50, new_tokens=3200, row_steps=3200, accepted_by_depth=(0, 0, 0), peak_rows=64)
    often = EngineStats(
        steps=50, new_tokens=1000, row_steps=400, drafted_row_steps=400, accepted_by_depth=(300, 200, 100),
        peak_rows=8, preemptions=3,
    )  # fmt: skip
    alone, both = engine_figures([never]), engine_figures([never, often])
    assert (alone.drafting, alone.accepted_by_depth, alone.warning) == (0.0, (), None)
    assert (both.drafting, both.accepted_by_depth, both.warning) == (400 / 3600, (0.75, 0.5, 0.25), None)
    assert (both.peak_rows, both.preemptions) == (64, 3)
    assert engine_figures([]).tokens_per_step is None


def test_drafting_counts_the_rows_of_the_steps_that_drafted() -> None:
    counters = Counters(max_length=3)
    counters.step(6, [3, 1], drafted=True)
    counters.step(10, [], drafted=False)
    counters.step(4, [4, 2, 1], drafted=True)
    figures = engine_figures([counters.stats(BlockAllocator(1))])
    assert (figures.drafting, figures.accepted_by_depth) == (0.5, (0.7, 0.3, 0.1))
    assert figures.peak_rows == 10
