from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeChat, FakeEngine
from tests.solve.scripted import say
from trtkit.errors import EngineError, RequestError, UsageError
from trtkit.runtime.api import FinishReason, Request, SamplingParams, StepOutput
from trtkit.solve.answers import AnswerMode
from trtkit.solve.grading import Grader
from trtkit.solve.observer import Observer
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.solver import Solver
from trtkit.solve.stopping import StopRule
from trtkit.solve.vote import Tally


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


def problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{n}", text=f"problem {n}") for n in range(count)]


def scripted(*texts: str, chat: FakeChat) -> Callable[[Request], Sequence[int]]:
    """Sample i of every problem says ``texts[i]``, then goes on babbling as a model would."""

    def script(request: Request) -> Sequence[int]:
        text = texts[int(request.id.rpartition("/")[2]) % len(texts)]
        return [*chat.encode(text), *chat.encode(" and so on" * 20), EOS_ID]

    return script


def solve(
    grader: Grader, engine: FakeEngine, count: int = 1, chat: FakeChat | None = None, **options: Any
) -> list[Solution]:
    chat = chat or FakeChat()
    return Solver(engine, chat, SolveOptions(**options), grader).solve(problems(count))


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("burst", [1, 3, 50])
def test_a_sample_ends_at_the_end_of_the_thought(grader: Grader, single: bool, burst: int) -> None:
    chat = FakeChat(single_think_end=single)
    engine = FakeEngine(scripted("\\boxed{5}</think>", chat=chat), burst=burst)
    [solution] = solve(grader, engine, chat=chat, samples=1, save_text=True)
    [attempt] = solution.attempts
    assert attempt.finish is FinishReason.STOP
    assert attempt.text == "\\boxed{5}</think>"
    assert attempt.tokens == len("\\boxed{5}") + len(chat.think_end)
    assert solution.answer is not None
    assert solution.answer.key == "5"
    assert engine.submitted[0].stop_ids == ((256, EOS_ID) if single else (EOS_ID,))
    assert engine.cancelled == ([] if single else ["p0/0"]), "it would babble on to the token limit"
    assert not engine.has_work


def test_stop_at_eos_reads_the_box_after_the_thought(grader: Grader) -> None:
    chat = FakeChat()

    def script(request: Request) -> Sequence[int]:
        return [*chat.encode("\\boxed{1}</think>It is \\boxed{2}."), EOS_ID, *b"beyond"]

    [solution] = solve(grader, FakeEngine(script), samples=1, stop_at="eos")
    assert solution.answer is not None
    assert solution.answer.key == "2"


def test_samples_cut_off_or_ended_by_eos_still_vote(grader: Grader) -> None:
    chat = FakeChat()

    def script(request: Request) -> Sequence[int]:
        return {
            "0": [*chat.encode("\\boxed{3}"), EOS_ID],
            "1": chat.encode("\\boxed{4} or rather \\boxed{5 and on and on"),
            "2": [*chat.encode("no idea"), EOS_ID],
        }[request.id[-1]]

    [solution] = solve(grader, FakeEngine(script), samples=3, max_tokens=30)
    by_index = {attempt.index: attempt for attempt in solution.attempts}
    assert {i: (a.box, a.finish.value) for i, a in by_index.items()} == {
        0: ("3", "stop"),
        1: ("4", "length"),
        2: (None, "stop"),
    }
    assert (solution.tally.finished, solution.tally.blank) == (3, 1)


def test_votes_do_not_depend_on_batch_order_or_speed(grader: Grader) -> None:
    outcomes = set()
    for rows, burst, order, outstanding in (
        (1, 1, "pooled", 128),
        (64, 1, "pooled", 1),
        (5, 4, "sequential", 9),
        (7, 2, "pooled", 20),
    ):
        engine = FakeEngine(say, rows=rows, burst=burst)
        found = solve(grader, engine, 6, samples=11, order=order, outstanding=outstanding)
        outcomes.add(tuple(solution.answer and solution.answer.key for solution in found))
        assert [solution.problem_id for solution in found] == [f"p{n}" for n in range(6)]
        seeds = {request.id: request.seed for request in engine.submitted}
        assert seeds["p3/2"] == 2532222799536991446
    assert len(outcomes) == 1


def test_unassailable_cancels_the_siblings_and_keeps_the_winner(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{7}</think>", chat=chat), rows=3)
    [solution] = solve(grader, engine, samples=8, stop=())
    assert solution.stopped_early == "unassailable"
    assert solution.tally.finished == 6  # three rows at a time: 3 of 8 is not safe, 6 of 8 is
    assert sorted(engine.cancelled) == ["p0/6", "p0/7"]
    assert not engine.has_work


def test_a_full_vote_runs_every_sample(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{5}</think>", chat=chat))
    [solution] = solve(grader, engine, chat=chat, samples=9, full_vote=True)
    assert len(solution.attempts) == 9
    assert solution.stopped_early is None
    with pytest.raises(UsageError) as caught:
        SolveOptions(full_vote=True, stop=("agree(4)",))
    assert "a full vote uses no stop rule" in caught.value.offenders[0]


def test_unassailable_never_changes_the_winner(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    early = [solve(grader, FakeEngine(say, rows=3), 4, samples=7, seed=seed) for seed in range(15)]
    never = StopRule(text="never", holds=lambda tally, outstanding: False)
    monkeypatch.setattr(SolveOptions, "rules", property(lambda options: (never,)))
    full = [solve(grader, FakeEngine(say, rows=3), 4, samples=7, seed=seed) for seed in range(15)]
    assert sum(solution.tally.finished < 7 for found in early for solution in found) > 20
    for one, other in zip(early, full, strict=True):
        assert [(s.answer and s.answer.key) for s in one] == [(s.answer and s.answer.key) for s in other]


def test_agree_stops_a_problem_and_lets_the_next_one_in(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{7}</think>", chat=chat), rows=4)
    found = solve(grader, engine, 3, samples=32, stop=("agree(4)",), order="sequential")
    assert [solution.stopped_early for solution in found] == ["agree(4)"] * 3
    assert [solution.tally.finished for solution in found] == [4, 4, 4]
    running = [request.id.split("/")[0] for request in engine.submitted]
    assert running == sorted(running), "sequential: one problem after the other"


def test_cancelled_tokens_are_counted(grader: Grader) -> None:
    def script(request: Request) -> Sequence[int]:
        if request.id.endswith("/2"):
            return b"x" * 1000
        return FakeChat().encode("\\boxed{7}</think>")

    [solution] = solve(grader, FakeEngine(script), samples=3)
    per_sample = len("\\boxed{7}") + 1
    assert solution.stopped_early == "unassailable"
    assert solution.tokens == 3 * per_sample


def test_pooled_submits_only_as_much_as_the_batch_needs(grader: Grader) -> None:
    class Watching(FakeEngine):
        most = 0

        def step(self) -> list[StepOutput]:
            self.most = max(self.most, len(self._left))
            return super().step()

    engine = Watching(say, rows=4)
    solve(grader, engine, 12, samples=5, outstanding=10)
    assert 10 <= engine.most <= 14


def test_a_refused_problem_fails_alone(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{7}</think>", chat=chat), max_total_tokens=100)
    rows = [
        Problem(id="fine", text="x"),
        Problem(id="long", text="y" * 200),
        Problem(id="huge", text="z" * 10_000_000),
        Problem(id="last", text="x"),
    ]
    found = Solver(engine, chat, SolveOptions(samples=2), grader).solve(rows)
    assert [bool(solution.error) for solution in found] == [False, True, True, False]
    assert found[1].error is not None
    assert "too long" in found[1].error
    assert found[2].error is not None
    assert "10,000,000 characters" in found[2].error
    assert found[1].answer is None


def test_variants_are_mixed_and_prompts_shared(grader: Grader) -> None:
    engine = FakeEngine(say)
    solve(grader, engine, samples=4, variants=("solve", "system"), seed=3)
    assert [bytes(request.prompt).split(b"|")[0] for request in engine.submitted] == [
        b"solve",
        b"system",
        b"solve",
        b"system",
    ]


def test_integer_mode_votes_modulo(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{1007}</think>", "\\boxed{7}</think>", "\\boxed{x}</think>", chat=chat))
    mode = AnswerMode(kind="integer", modulus=1000)
    [solution] = solve(grader, engine, samples=3, mode=mode, force_close=False)
    assert solution.tally.leader is not None
    assert (solution.tally.leader.answer.key, solution.tally.leader.count) == ("7", 2)
    assert {attempt.box for attempt in solution.attempts} == {"1007", "7", "x"}


def test_equal_expressions_are_one_vote(grader: Grader) -> None:
    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{2\\sqrt{3}}</think>", "\\boxed{\\sqrt{12}}</think>", chat=chat))
    [solution] = solve(grader, engine, samples=4)
    assert [vote.count for vote in solution.tally.votes] == [4]


def test_an_engine_that_loses_requests_is_an_error(grader: Grader) -> None:
    class Losing(FakeEngine):
        def step(self) -> list[StepOutput]:
            self._left.clear()
            return []

    with pytest.raises(EngineError, match="lost 2 request"):
        solve(grader, Losing(say), samples=2)


def test_an_interruption_cancels_what_runs(grader: Grader) -> None:
    class Interrupting(FakeEngine):
        def step(self) -> list[StepOutput]:
            if self.steps == 3:
                raise KeyboardInterrupt
            return super().step()

    engine = Interrupting(say)
    with pytest.raises(KeyboardInterrupt):
        solve(grader, engine, 2, samples=4)
    assert len(engine.cancelled) == 8


def test_observer_hears_everything_in_order(grader: Grader) -> None:
    heard: list[str] = []

    class Listening(Observer):
        def began(self, problems: Sequence[Problem], done: Sequence[Solution], samples: int) -> None:
            heard.append(f"began {len(problems)} {len(done)} {samples}")

        def opened(self, problem: Problem, tally: Tally) -> None:
            heard.append(f"opened {problem.id}")

        def stepped(self, tokens: int, outstanding: int) -> None:
            if heard[-1] != "stepped":
                heard.append("stepped")

        def attempted(self, problem: Problem, attempt: Attempt, tally: Tally) -> None:
            heard.append(f"attempted {attempt.index} {tally.finished}")

        def solved(self, problem: Problem, solution: Solution) -> None:
            heard.append(f"solved {problem.id}")

        def ended(self) -> None:
            heard.append("ended")

    chat = FakeChat()
    engine = FakeEngine(scripted("\\boxed{7}</think>", chat=chat))
    solver = Solver(engine, chat, SolveOptions(samples=2), grader, observer=Listening())
    solver.solve(problems(1))
    assert heard == [
        "began 1 0 2",
        "opened p0",
        "stepped",
        "attempted 0 1",
        "attempted 1 2",
        "solved p0",
        "ended",
    ]


def test_options_name_everything_that_is_wrong() -> None:
    with pytest.raises(UsageError) as caught:
        SolveOptions(
            samples=0,
            seed=-1,
            order="both",
            variants=("solv",),
            stop=("agre(4)",),
            stop_at="never",
        )
    text = str(caught.value)
    for word in (
        "samples 0",
        "seed -1",
        "order 'both'",
        "did you mean 'solve'",
        "did you mean 'agree'",
        "stop_at",
    ):
        assert word in text
    data = SolveOptions(stop=("agree( 4 )",), sampling=SamplingParams(temperature=0.5)).to_data()
    assert data["stop"] == ["agree(4)", "unassailable"]
    assert data["sampling"]["temperature"] == 0.5


def test_why_an_engine_refuses_a_problem_is_said(grader: Grader) -> None:
    """All of its reasons, not only that it does."""

    class Picky(FakeEngine):
        def submit(self, request: Request) -> None:
            raise RequestError("the request cannot run", offenders=["the prompt has 99 tokens", "it is Sunday"])

    [solution] = solve(grader, Picky(lambda _: []))
    assert solution.error == "the request cannot run: the prompt has 99 tokens; it is Sunday"
