"""Few samples of a problem at once, many problems at once: the same votes, fewer tokens, a full batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from tests.fakes import FakeChat, FakeEngine
from tests.solve.scripted import CHAT, say
from trtkit.runtime.api import Request, StepOutput
from trtkit.solve.grading import Grader
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.solver import Solver


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


class Watched(FakeEngine):
    """Notes how many requests were unfinished at each step, and of how many problems."""

    def __init__(self) -> None:
        super().__init__(lambda request: say(request), rows=12, burst=4)
        self.running: list[list[str]] = []

    def step(self) -> list[StepOutput]:
        self.running.append([name.rpartition("/")[0] for name in self._left])
        return super().step()


def _solve(grader: Grader, problems: int, **options: object) -> tuple[list[Solution], Watched]:
    engine = Watched()
    asked = [Problem(id=f"p{n}", text=f"problem {n}") for n in range(problems)]
    chosen = SolveOptions(samples=24, outstanding=24, force_close=False, **options)
    return Solver(engine, CHAT, chosen, grader).solve(asked), engine


def test_no_more_than_asked_run_at_once_while_others_wait(grader: Grader) -> None:
    _, engine = _solve(grader, 12, together=4, stop=())
    crowded = [names for names in engine.running if len(set(names)) > 4]
    assert crowded
    assert max(names.count(name) for names in crowded for name in set(names)) <= 4
    assert all(len(names) >= 12 for names in engine.running[:20]), "the batch stays full"


def test_the_last_problem_takes_all_rows(grader: Grader) -> None:
    _, engine = _solve(grader, 1, together=4, stop=())
    assert len(engine.running[0]) == 12


def test_unassailable_winners_do_not_depend_on_it(grader: Grader) -> None:
    few, frugal = _solve(grader, 12, together=3, stop=())
    many, _ = _solve(grader, 12, together=0, stop=())
    for one, other in zip(few, many, strict=True):
        assert one.answer is not None
        assert other.answer is not None
        assert one.answer.key == other.answer.key
    assert sum(one.tokens for one in few) < sum(one.tokens for one in many)
    assert len(frugal.submitted) < 12 * 24, "some samples were never submitted"
    for one in few:
        assert len(one.attempts) + one.cancelled == 24


def test_every_sample_runs_when_no_rule_holds(grader: Grader) -> None:
    class Split(FakeEngine):
        def __init__(self) -> None:
            super().__init__(lambda request: _by_index(request), rows=6)

    def _by_index(request: Request) -> Sequence[int]:
        index = int(request.id.rpartition("/")[2])
        return FakeChat().encode(f"\\boxed{{{index}}}</think>")

    engine = Split()
    options = SolveOptions(samples=10, together=2, outstanding=12, stop=())
    solutions = Solver(engine, CHAT, options, grader).solve([Problem(id=f"p{n}", text="x") for n in range(5)])
    assert [len(solution.attempts) for solution in solutions] == [10] * 5
