"""The solver under a clock, in simulated time: every engine step takes one second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeChat, FakeEngine
from trtkit.runtime.api import FinishReason, Request, StepOutput
from trtkit.solve.answers import Answer
from trtkit.solve.ends import ANSWER_OPENING, Ending
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.solver import Solver

CHAT = FakeChat()
Script = Callable[[Request], Sequence[int]]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


class TimedEngine(FakeEngine):
    """A step with rows in it takes ``step_seconds`` of its own clock."""

    def __init__(self, script: Script, *, step_seconds: float = 1.0, **more: Any) -> None:
        super().__init__(script, **more)
        self.now = 50.0
        self._seconds = step_seconds

    def step(self) -> list[StepOutput]:
        self.now += self._seconds if self._left else 0.0
        return super().step()


def asked_to_answer(request: Request) -> bool:
    return bytes(token for token in request.prompt if token < 256).endswith(ANSWER_OPENING.encode())


def endless(request: Request) -> Sequence[int]:
    """Thinks for ever, and says 7 when it is made to answer."""
    return CHAT.encode("7}. So") if asked_to_answer(request) else b"hm " * 1000


def easy_and_hard(request: Request) -> Sequence[int]:
    """Problems with an even number are solved in ten tokens."""
    if int(request.id[1:].partition("/")[0]) % 2:
        return endless(request)
    return CHAT.encode("\\boxed{7}</think>")


def problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{n}", text=f"problem {n}") for n in range(count)]


def solve(
    grader: Grader,
    engine: TimedEngine,
    count: int,
    journal: Journal | None = None,
    *,
    loading: float = 0.0,
    **options: Any,
) -> list[Solution]:
    settings = {"samples": 4, "order": "sequential"} | options
    chosen = SolveOptions(**settings)
    solver = Solver(engine, CHAT, chosen, grader, journal, clock=lambda: engine.now)
    found = solver.solve(problems(count), loading_seconds=loading)
    assert not engine.has_work
    return found


@pytest.mark.parametrize("order", ["sequential", "pooled"])
@pytest.mark.parametrize("limit", [100.0, 333.0, 1000.0])
def test_a_limit_that_is_too_short_is_kept_and_everything_is_answered(grader: Grader, order: str, limit: float) -> None:
    engine = TimedEngine(endless, rows=4 if order == "sequential" else 12)
    found = solve(grader, engine, 10, order=order, outstanding=12, time_limit=limit, stop=())
    assert engine.now - 50.0 <= limit
    assert [solution.answer and solution.answer.key for solution in found] == ["7"] * 10
    for solution in found:
        assert solution.attempts
        assert all(attempt.forced and attempt.ending is Ending.DEADLINE for attempt in solution.attempts)
        assert solution.stopped_early == "deadline"
        assert solution.share_seconds is not None
        assert solution.used_seconds is not None
        assert solution.used_seconds <= solution.share_seconds + 1.0
    if order == "sequential":
        assert engine.now - 50.0 >= 0.9 * limit, "the time is used"


class SeldomHeard(TimedEngine):
    """Three steps of four bring nothing, as from a server that takes longer for a token than one waits for it."""

    def __init__(self, script: Script, *, silent_from: float = 1e9, **more: Any) -> None:
        super().__init__(script, **more)
        self._calls, self._silent_from = 0, silent_from

    def step(self) -> list[StepOutput]:
        self._calls += 1
        if self._calls % 4 == 0 and self.now < self._silent_from:
            return super().step()
        self.now += self._seconds
        ended = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._ended]
        self._ended.clear()
        return ended


def test_time_in_which_nothing_is_heard_is_time_of_those_who_wait(grader: Grader) -> None:
    """Ten problems in 4000 s, and an answer takes 14 tokens of four seconds each: room is made for it."""

    def long_winded(request: Request) -> Sequence[int]:
        return CHAT.encode("1234567890123}. So") if asked_to_answer(request) else b"hm " * 1000

    engine = SeldomHeard(long_winded, rows=4)
    found = solve(grader, engine, 10, time_limit=4000.0, stop=())
    assert engine.now - 50.0 <= 4000.0
    assert [solution.answer and solution.answer.key for solution in found] == ["1234567890123"] * 10
    used = [solution.used_seconds or 0.0 for solution in found]
    assert min(used) > 250
    assert max(used) < 700
    assert sum(used) == pytest.approx(engine.now - 50.0, abs=80.0)


def test_an_engine_that_falls_silent_costs_each_problem_its_share(grader: Grader) -> None:
    for order in ("sequential", "pooled"):
        engine = SeldomHeard(endless, rows=8, silent_from=50.0)
        found = solve(grader, engine, 4, order=order, outstanding=8, time_limit=400.0, stop=(), default_answer="0")
        assert engine.now - 50.0 <= 400.0
        assert all(solution.defaulted for solution in found)
        assert all(40.0 < (solution.used_seconds or 0.0) < 200.0 for solution in found)


def test_an_outage_does_not_close_problems_early(grader: Grader) -> None:
    """That cancelled samples are reported is no word of the engine. It is away for the first problem and for most of
    the second one's time, and back in time for it."""

    class Away(TimedEngine):
        def step(self) -> list[StepOutput]:
            if not 60.0 < self.now < 257.0:
                return super().step()
            self.now += self._seconds
            ended = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._ended]
            self._ended.clear()
            return ended

    engine = Away(lambda request: CHAT.encode("So \\boxed{7}</think>"), rows=8)
    found = solve(grader, engine, 4, time_limit=500.0, stop=(), default_answer="0")
    assert [solution.answer and solution.answer.key for solution in found] == ["0", "7", "7", "7"]
    assert not any(attempt.forced for solution in found for attempt in solution.attempts)


def test_unused_time_goes_to_those_who_need_it(grader: Grader) -> None:
    engine = TimedEngine(easy_and_hard, rows=4)
    found = solve(grader, engine, 20, time_limit=2000.0, stop=())
    assert engine.now - 50.0 <= 2000.0
    easy, hard = found[10:20:2], found[11:20:2]
    assert all(solution.used_seconds == 10.0 for solution in easy)
    base = 2000.0 / 20 * 350 / 360
    assert all((solution.used_seconds or 0.0) > 1.4 * base for solution in hard), "they draw from the bank"


def test_without_forced_answers_a_box_in_the_unfinished_text_votes(grader: Grader) -> None:
    def boxed_early(request: Request) -> Sequence[int]:
        number = int(request.id.rpartition("/")[2])
        return [*CHAT.encode("\\boxed{5} but wait " if number % 2 else "let me see "), *b"hm " * 1000]

    engine = TimedEngine(boxed_early, rows=4)
    found = solve(grader, engine, 3, time_limit=150.0, stop=(), force_close=False, default_answer="0")
    assert engine.now - 50.0 <= 150.0
    for solution in found:
        assert [(attempt.index, attempt.box, attempt.forced) for attempt in solution.attempts] == [
            (1, "5", False),
            (3, "5", False),
        ]
        assert solution.cancelled == 2
    nothing = solve(
        grader, TimedEngine(lambda request: b"hm " * 1000), 3, time_limit=150.0, force_close=False, default_answer="0"
    )
    assert all(solution.defaulted and solution.answer and solution.answer.key == "0" for solution in nothing)
    assert all(solution.tally.leader is None for solution in nothing)


def test_samples_that_have_not_begun_at_the_deadline_are_dropped(grader: Grader) -> None:
    engine = TimedEngine(endless, rows=2)
    [solution] = solve(grader, engine, 1, samples=6, time_limit=100.0, stop=())
    assert sorted(attempt.index for attempt in solution.attempts) == [0, 1]
    assert solution.cancelled == 4


def test_past_the_limit_everything_is_answered_at_once(grader: Grader, tmp_path: Path) -> None:
    engine = TimedEngine(endless)
    found = solve(grader, engine, 5, time_limit=60.0, loading=61.0, default_answer="210")
    assert engine.submitted == []
    assert [solution.stopped_early for solution in found] == ["time limit"] * 5
    assert all(solution.answer is not None and solution.answer.key == "210" for solution in found)


def test_a_resumed_run_counts_the_time_already_spent(grader: Grader, tmp_path: Path) -> None:
    class Interrupting(TimedEngine):
        def step(self) -> list[StepOutput]:
            if self.now >= 50.0 + 120.0:
                raise KeyboardInterrupt
            return super().step()

    path, limit = tmp_path / "journal.jsonl", 400.0
    first = Interrupting(endless, rows=4)
    with Journal(path, clock=lambda: first.now) as journal, pytest.raises(KeyboardInterrupt):
        solve(grader, first, 10, journal, time_limit=limit, loading=20.0, stop=())
    second = TimedEngine(endless, rows=4)
    with Journal(path, clock=lambda: second.now) as journal:
        assert journal.history.spent_seconds == pytest.approx(140.0, abs=40.0)
        before = journal.history.spent_seconds
        found = solve(grader, second, 10, journal, time_limit=limit, loading=20.0, stop=())
        assert len(journal.history.settled) >= 2
    assert second.now - 50.0 + 20.0 + before <= limit
    assert second.now - 50.0 + 20.0 + before >= 0.9 * limit
    assert all(solution.answer is not None for solution in found)


def test_a_resumed_pooled_run_has_used_only_its_parts_of_the_batch(grader: Grader, tmp_path: Path) -> None:
    """Ten problems that ran side by side for 300 s have used 30 s each, not 300."""

    def one_is_quick(request: Request) -> Sequence[int]:
        quick = request.id.endswith("/0") and not asked_to_answer(request)
        return CHAT.encode("x" * 200 + "\\boxed{8}</think>") if quick else endless(request)

    class Interrupting(TimedEngine):
        def step(self) -> list[StepOutput]:
            if self.now >= 50.0 + 300.0:
                raise KeyboardInterrupt
            return super().step()

    path, pooled = tmp_path / "journal.jsonl", {"order": "pooled", "time_limit": 1000.0, "stop": ()}
    first = Interrupting(one_is_quick, rows=40)
    with Journal(path, clock=lambda: first.now) as journal, pytest.raises(KeyboardInterrupt):
        solve(grader, first, 10, journal, **pooled)
    second = TimedEngine(one_is_quick, rows=40)
    with Journal(path, clock=lambda: second.now) as journal:
        found = solve(grader, second, 10, journal, **pooled)
    assert 500.0 < second.now - 50.0 <= 1000.0 - 300.0
    assert [solution.answer and solution.answer.key for solution in found] == ["7"] * 10
    assert [len(solution.attempts) for solution in found] == [4] * 10


def test_comparing_answers_keeps_the_limit() -> None:
    """Every sample boxes another expression, and each pair of them takes the grader 40 s."""

    class SlowGrader(Grader):
        def equal(self, gold: Answer, answer: Answer) -> bool:
            engine.now += 20.0
            return False

    engine = TimedEngine(lambda request: CHAT.encode(f"\\boxed{{x^{request.id[-1]}}}</think>"), rows=6)
    found = solve(SlowGrader(), engine, 3, samples=6, time_limit=200.0, stop=())
    assert engine.now - 50.0 <= 200.0 + 40.0
    assert found[0].answer is not None


def test_steps_that_take_longer_than_a_share_overrun_by_one_step(grader: Grader) -> None:
    engine = TimedEngine(endless, rows=4, step_seconds=30.0)
    found = solve(grader, engine, 10, time_limit=200.0, default_answer="0")
    assert engine.now - 50.0 <= 200.0 + 30.0
    assert all(solution.answer is not None for solution in found)


def test_closing_takes_a_few_steps_however_short_they_are(grader: Grader) -> None:
    engine = TimedEngine(endless, rows=4, step_seconds=0.1)
    [solution] = solve(grader, engine, 1, time_limit=100.0, stop=(), kill_loops=False)
    assert {attempt.box for attempt in solution.attempts} == {"7"}
    assert 96.0 <= (solution.used_seconds or 0.0) <= 99.0


def test_samples_that_are_answering_already_are_let_finish(grader: Grader) -> None:
    """Made to answer for their length after 30 s, 12 s before the deadline's closing begins; they need 23 s for it."""

    def deliberate(request: Request) -> Sequence[int]:
        return CHAT.encode(" " * 20 + "7}") if asked_to_answer(request) else b"hm " * 1000

    engine = TimedEngine(deliberate, rows=4)
    [solution] = solve(grader, engine, 1, time_limit=60.0, max_tokens=30, stop=())
    assert [(attempt.box, attempt.ending) for attempt in solution.attempts] == [("7", Ending.LENGTH)] * 4
    assert len(engine.extended) == 4


def test_stop_rules_work_on_forced_answers_too(grader: Grader) -> None:
    def slower_and_slower(request: Request) -> Sequence[int]:
        number = int(request.id.rpartition("/")[2])
        return CHAT.encode(" " * number + "7}") if asked_to_answer(request) else b"hm " * 1000

    engine = TimedEngine(slower_and_slower, rows=8)
    [solution] = solve(grader, engine, 1, samples=8, time_limit=100.0, stop=("agree(4)",))
    assert len(solution.attempts) == 4
    assert solution.stopped_early == "agree(4)"


@pytest.mark.parametrize("force", [True, False])
def test_a_spent_budget(grader: Grader, force: bool) -> None:
    engine = TimedEngine(endless, rows=4)
    [solution] = solve(grader, engine, 1, max_tokens=30, force_close=force, stop=())
    assert len(solution.attempts) == 4
    for attempt in solution.attempts:
        assert attempt.ending is Ending.LENGTH
        assert (attempt.forced, attempt.box) == (force, "7" if force else None)
        assert attempt.tokens == 30 + (2 if force else 0)
    assert solution.tokens == sum(attempt.tokens for attempt in solution.attempts)
    assert engine._resting == {}, "nothing is left behind in the engine"


def test_room_for_the_answer_is_left_within_the_engines_limit(grader: Grader) -> None:
    engine = TimedEngine(endless, rows=4, max_total_tokens=200)
    solve(grader, engine, 1)
    opening = len(CHAT.encode("\n</think>" + ANSWER_OPENING))
    request = engine.submitted[0]
    assert len(request.prompt) + request.max_tokens + opening + 48 <= 200


def test_a_sample_that_answered_within_its_budget_is_not_forced(grader: Grader) -> None:
    engine = TimedEngine(lambda request: CHAT.encode("\\boxed{5} or not" + "?" * 100), rows=4)
    [solution] = solve(grader, engine, 1, max_tokens=30, stop=())
    assert engine.extended == []
    assert {(attempt.box, attempt.forced) for attempt in solution.attempts} == {("5", False)}


def test_a_full_vote_leaves_samples_alone(grader: Grader) -> None:
    loop = [*(b"again and again. " * 200), *CHAT.encode("\\boxed{1}</think>")]
    engine = TimedEngine(lambda request: loop, burst=40)
    [solution] = solve(grader, engine, 1, full_vote=True)
    assert {attempt.ending for attempt in solution.attempts} == {Ending.THINK}
    [killed] = solve(grader, TimedEngine(lambda request: loop, burst=40), 1)
    assert {attempt.ending for attempt in killed.attempts} == {Ending.LOOP}
    assert killed.answer is None
    engine = TimedEngine(endless, rows=4)
    [solution] = solve(grader, engine, 1, max_tokens=30, full_vote=True)
    assert not any(attempt.forced for attempt in solution.attempts)


def test_first_box_ends_samples_early(grader: Grader) -> None:
    text = "\\boxed{5} but let me check" + "." * 300 + "\\boxed{6}</think>"
    [solution] = solve(grader, TimedEngine(lambda request: CHAT.encode(text)), 1, stop_at="first-box")
    assert {(attempt.ending, attempt.box) for attempt in solution.attempts} == {(Ending.BOX, "5")}
    [solution] = solve(grader, TimedEngine(lambda request: [*CHAT.encode(text), EOS_ID]), 1)
    assert {(attempt.ending, attempt.box) for attempt in solution.attempts} == {(Ending.THINK, "6")}


def test_a_predictor_gives_hard_problems_more(grader: Grader) -> None:
    engine = TimedEngine(endless, rows=4)
    hard = {"p0": 500.0, "p1": 5000.0, "p2": 2750.0}
    found = solve(grader, engine, 3, time_limit=300.0, difficulty=hard)
    used = [solution.used_seconds or 0.0 for solution in found]
    assert used[0] < used[2] < used[1]
    assert engine.now - 50.0 <= 300.0


def test_weighted_votes_decide(grader: Grader) -> None:
    def script(request: Request) -> Sequence[int]:
        number = int(request.id.rpartition("/")[2])
        return CHAT.encode("\\boxed{5}</think>" if number == 0 else "." * 200 * number + "\\boxed{6}</think>")

    [plain] = solve(grader, TimedEngine(script, rows=4, burst=10), 1, samples=3, stop=())
    assert plain.answer is not None
    assert plain.answer.key == "6"
    [weighted] = solve(grader, TimedEngine(script, rows=4, burst=10), 1, samples=3, stop=(), weighting="length")
    assert weighted.answer is not None
    assert weighted.answer.key == "5"
