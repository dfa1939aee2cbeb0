from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine
from tests.solve.scripted import CHAT, say
from trtkit.errors import InputError, UsageError
from trtkit.solve.answers import AnswerMode
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.replay import arrivals, one_spelling, parse_policy, replay
from trtkit.solve.solver import Solver
from trtkit.solve.traces import Trace, TracedProblem, Traces, read_run
from trtkit.solve.tradeoff import ReplayOptions, sample_counts, saved_order, trade_offs
from trtkit.solve.vote import Weighting

RULES = ("agree(2)", "agree(3)", "beta(0.9)", "beta(0.95)+stragglers(2)", "ladder", "stragglers(4)", "certificate(0.2)")


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


def trace(index: int, box: str | None, tokens: int, seconds: float | None = None) -> Trace:
    return Trace(index=index, box=box, tokens=tokens, closed=True, looped=False, seconds=seconds)


def traced(*problems: tuple[str, list[tuple[str | None, int]]]) -> Traces:
    """Problems from (gold, [(box, tokens), ...])."""
    return Traces(
        problems=tuple(
            TracedProblem(
                id=f"p{number}",
                gold=gold,
                traces=tuple(trace(index, box, tokens) for index, (box, tokens) in enumerate(samples)),
            )
            for number, (gold, samples) in enumerate(problems)
        )
    )


def solved(grader: Grader, journal: Journal | None = None, *, rows: int, samples: int, **more: Any) -> list[Solution]:
    """Problems one at a time on an engine that emits one token per row and step; its clock counts steps.

    Nothing is forced to answer: a full vote does not, and no saved sample can tell what it would have said.
    """
    engine = FakeEngine(say, rows=rows)
    options = SolveOptions(samples=samples, order="sequential", force_close=False, **more)
    solver = Solver(engine, CHAT, options, grader, journal, clock=lambda: float(engine.steps))
    return solver.solve([Problem(id=f"p{number}", text=f"problem {number}") for number in range(12)])


@pytest.mark.parametrize("rows", [9, 4])
@pytest.mark.parametrize("rule", RULES)
def test_the_replay_of_a_full_vote_is_what_the_solver_does(
    grader: Grader, rule: str, rows: int, tmp_path: Path
) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        solved(grader, journal, rows=rows, samples=9, full_vote=True)
    saved = read_run(tmp_path / "journal.jsonl")
    options = ReplayOptions(samples=(9,), batch=rows, draws=1)
    replayed = saved_order(saved, [parse_policy(rule)], options, grader)
    real = solved(grader, rows=rows, samples=9, stop=tuple(rule.split("+")))
    by_id = {row.problem: row.outcome for row in replayed}
    assert len(by_id) == len(real) == 12
    for solution in real:
        outcome = by_id[solution.problem_id]
        assert outcome.tally.ranked == solution.tally.ranked
        assert outcome.tally.order == solution.tally.order
        assert (outcome.tokens, outcome.wall) == (solution.tokens, solution.seconds)
        assert outcome.stopped_early == solution.stopped_early
    assert sum(solution.stopped_early is not None for solution in real) >= 5, "the rule must have had something to do"


@pytest.mark.parametrize("rule", RULES)
def test_recorded_times_give_the_same_where_all_samples_run_at_once(grader: Grader, rule: str, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        solved(grader, journal, rows=9, samples=9, full_vote=True)
    saved = read_run(tmp_path / "journal.jsonl")
    rows = saved_order(saved, [parse_policy(rule)], ReplayOptions(samples=(9,), order="recorded", draws=1), grader)
    real = {
        solution.problem_id: solution for solution in solved(grader, rows=9, samples=9, stop=tuple(rule.split("+")))
    }
    for row in rows:
        assert row.outcome.tally.ranked == real[row.problem].tally.ranked
        assert row.outcome.tokens == pytest.approx(real[row.problem].tokens)
        assert row.outcome.wall == real[row.problem].seconds


def one(samples: list[Trace], rule: str, batch: int | None = None, order: Any = "length") -> Any:
    answers = one_spelling(samples, AnswerMode(), lambda a, b: False)
    return replay(arrivals(samples, answers, order, batch), [parse_policy(rule)])[0]


def test_what_cancelled_samples_had_emitted_is_spent() -> None:
    samples = [trace(0, "7", 10), trace(1, "7", 20), trace(2, "8", 300), trace(3, None, 1000)]
    full, stopped = one(samples, "full"), one(samples, "agree(2)")
    assert (full.tokens, full.wall, full.stopped_early) == (1330, 1000, None)
    assert (stopped.tokens, stopped.wall, stopped.stopped_early) == (10 + 20 + 20 + 20, 20, "agree(2)")


def test_samples_that_end_together_are_counted_together() -> None:
    samples = [trace(0, "7", 10), trace(1, "7", 10), trace(2, "8", 10), trace(3, "8", 50)]
    assert [vote.count for vote in one(samples, "agree(2)").tally.votes] == [2, 1]


def test_a_small_batch_lets_the_next_sample_in_when_a_row_ends() -> None:
    samples = [trace(0, "7", 30), trace(1, "8", 10), trace(2, "7", 5), trace(3, "9", 100)]
    # Two rows: 0 runs 0-30, 1 runs 0-10, 2 runs 10-15, 3 begins at 15.
    stopped = one(samples, "answers(3)", batch=2)
    assert [vote.answer.key for vote in stopped.tally.votes] == ["8", "7"]
    assert (stopped.wall, stopped.tokens) == (30, 30 + 10 + 5 + 15)
    assert one(samples, "full", batch=2).wall == 115
    assert one(samples, "full", batch=1).wall == 145


def test_recorded_order_needs_no_relation_to_length(grader: Grader) -> None:
    samples = [trace(0, "7", 100, 1.0), trace(1, "7", 80, 4.0), trace(2, "8", 10, 8.0)]
    stopped = one(samples, "agree(2)", order="recorded")
    assert (stopped.wall, stopped.tokens) == (4.0, 100 + 80 + 5)
    partly = Traces(problems=(TracedProblem(id="p", gold="7", traces=(*samples, trace(3, "7", 5))),))
    for saved in (traced(("7", [("7", 5)])), partly):
        with pytest.raises(InputError, match="seconds were not recorded"):
            trade_offs(saved, [parse_policy("full")], ReplayOptions(samples=(1,), order="recorded"), grader)


def test_unassailable_goes_along_and_full_means_full() -> None:
    samples = [*(trace(index, "7", 10 + index) for index in range(3)), trace(3, "8", 1000)]
    assert one(samples, "agree(4)").stopped_early == "unassailable"
    assert one(samples, "full").wall == 1000
    assert parse_policy(" full ").rules == ()
    assert parse_policy("stragglers( 2 )+beta(.95)").text == "stragglers(2)+beta(0.95)"
    with pytest.raises(UsageError, match="unknown stop rule"):
        parse_policy("full+agree(2)")


def test_equal_answers_are_one_vote_however_they_are_written(grader: Grader) -> None:
    saved = traced(
        ("0.5", [("\\frac12", 10), ("3", 11), ("2\\sqrt{3}", 12), ("\\sqrt{12}", 13), ("1/2", 14), ("0.5", 15)])
    )
    [row] = saved_order(saved, [parse_policy("full")], ReplayOptions(samples=(6,)), grader)
    assert sorted(vote.count for vote in row.outcome.tally.votes) == [1, 2, 3]
    assert row.correct
    saved = traced(("\\sqrt{12}", [("3", 10), ("2\\sqrt{3}", 12), ("\\sqrt{12}", 13)]))
    [estimate] = trade_offs(saved, [parse_policy("full")], ReplayOptions(samples=(3,)), grader)
    assert estimate.accuracy is not None
    assert estimate.accuracy.value == 1.0


def test_votes_are_weighed_as_the_options_say(grader: Grader) -> None:
    boxes = [("8", -3.0), ("8", -3.0), ("7", -0.1)]
    traces = tuple(
        replace(trace(index, box, 10), confidence=confidence) for index, (box, confidence) in enumerate(boxes)
    )
    saved = Traces(problems=(TracedProblem(id="p", gold="7", traces=traces),))
    for weighting, right in ((Weighting(), False), (Weighting(by="confidence"), True)):
        options = ReplayOptions(samples=(3,), weighting=weighting)
        assert [row.correct for row in saved_order(saved, [parse_policy("full")], options, grader)] == [right]
        [estimate] = trade_offs(saved, [parse_policy("full")], options, grader)
        assert estimate.accuracy is not None
        assert estimate.accuracy.value == right


def lottery(problems: int, each: int, seed: int = 0) -> Traces:
    """Samples of 100 to 1000 tokens; problem n's are right with a probability of its own."""
    rng = random.Random(seed)
    rows = []
    for _ in range(problems):
        chance = rng.uniform(0.2, 0.95)
        boxes = ["1" if rng.random() < chance else rng.choice(["2", "3", None]) for _ in range(each)]
        rows.append(("1", [(box, rng.randint(100, 1000)) for box in boxes]))
    return traced(*rows)


def test_estimates_agree_with_plain_counting(grader: Grader) -> None:
    saved = lottery(60, 16)
    steps = itertools.count()
    options = ReplayOptions(samples=(1, 16), draws=60)
    single, whole = trade_offs(saved, [parse_policy("full")], options, grader, advance=lambda: next(steps) and None)
    assert next(steps) == 2 * 60, "one step of the progress per problem and number of samples"
    right = [[t.box == "1" for t in problem.traces] for problem in saved.problems]
    share = sum(map(sum, right)) / (60 * 16)
    assert single.accuracy is not None
    assert single.accuracy.value == pytest.approx(share, abs=0.02)
    # One sample each: right or wrong, so the interval is that of a binomial share.
    width = 2 * 1.96 * math.sqrt(share * (1 - share) / 60)
    assert single.accuracy.high - single.accuracy.low == pytest.approx(width, rel=0.2)
    assert single.tokens.value == pytest.approx(sum(t.tokens for p in saved.problems for t in p.traces) / 16, rel=0.03)
    assert whole.tokens.value == sum(t.tokens for p in saved.problems for t in p.traces)
    assert whole.wall.value == sum(max(t.tokens for t in p.traces) for p in saved.problems)
    majorities = 0
    for problem in saved.problems:
        counts = Counter(t.box for t in problem.traces if t.box)
        earliest = {box: min(t.tokens for t in problem.traces if t.box == box) for box in counts}
        majorities += min(counts, key=lambda box: (-counts[box], earliest[box])) == "1"
    assert whole.accuracy is not None
    assert whole.accuracy.value == pytest.approx(majorities / 60)


def test_the_interval_knows_that_other_problems_could_have_come(grader: Grader) -> None:
    saved = traced(*(("1", [("1" if number % 2 else "2", 10 + 90 * (number % 2))] * 4) for number in range(40)))
    [row] = trade_offs(saved, [parse_policy("full")], ReplayOptions(samples=(4,)), grader)
    assert row.accuracy is not None
    assert row.accuracy.value == 0.5
    assert row.accuracy.high - row.accuracy.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 40), rel=0.15)
    # 40 problems of 40 or 400 tokens, and of 10 or 100 steps.
    assert row.tokens.high - row.tokens.low == pytest.approx(2 * 1.96 * 180 * math.sqrt(40), rel=0.15)
    assert row.wall.high - row.wall.low == pytest.approx(2 * 1.96 * 45 * math.sqrt(40), rel=0.15)


def test_what_is_saved_is_held_against_the_same_problems(grader: Grader) -> None:
    """A rule that saves the same share of every problem has no doubt about it, however much the problems differ."""
    sizes = [10, 20, 500, 3000, 70]
    saved = traced(*(("1", [("1", size), ("1", size), ("2", 4 * size), (None, 4 * size)]) for size in sizes))
    [row] = trade_offs(saved, [parse_policy("agree(2)")], ReplayOptions(samples=(4,)), grader)
    for share, interval in ((0.6, row.tokens_saved), (0.75, row.wall_saved)):
        assert (interval.value, interval.low, interval.high) == pytest.approx((share,) * 3)


def test_policies_are_compared_on_the_same_subsets(grader: Grader) -> None:
    saved = lottery(40, 24)
    policies = [parse_policy(rule) for rule in ("full", "unassailable", "agree(2)", "answers(1)")]
    full, unassailable, agree, first = trade_offs(saved, policies, ReplayOptions(samples=(16,)), grader)
    assert full.tokens_saved.value == full.wall_saved.value == 0
    assert unassailable.accuracy_change is not None
    bounds = (unassailable.accuracy_change.low, unassailable.accuracy_change.high)
    assert bounds == (0, 0), "it never changes the winner"
    assert 0 < unassailable.wall_saved.low < unassailable.wall_saved.value < unassailable.wall_saved.high < 1
    assert first.tokens.value < agree.tokens.value < unassailable.tokens.value < full.tokens.value
    assert first.accuracy_change is not None
    assert first.accuracy_change.high < 0, "the first answer alone is visibly worse than the vote"


def test_the_same_seed_gives_the_same_figures(grader: Grader) -> None:
    saved = lottery(10, 8)
    rows = [
        trade_offs(saved, [parse_policy("agree(2)")], ReplayOptions(samples=(4,), seed=seed), grader)
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert rows[1][0].tokens.value != rows[2][0].tokens.value, "the subsets depend on it, not the bootstrap alone"


def test_problems_without_gold_or_without_enough_samples(grader: Grader) -> None:
    saved = Traces(
        problems=(
            *traced(("7", [("7", 5), ("7", 6), ("7", 9)]), ("7", [("8", 5), ("8", 6), ("7", 7)])).problems,
            TracedProblem(id="no gold", gold=None, traces=tuple(trace(index, "1", 100) for index in range(3))),
            TracedProblem(id="short", gold="1", traces=(trace(0, "1", 100),)),
        )
    )
    [row] = trade_offs(saved, [parse_policy("full")], ReplayOptions(samples=(3,)), grader)
    assert row.accuracy is not None
    assert (row.problems, row.accuracy.value, row.tokens.value) == (3, 0.5, 20 + 18 + 300)
    unknown = Traces(problems=saved.problems[2:3])
    [row] = trade_offs(unknown, [parse_policy("full")], ReplayOptions(samples=(3,)), grader)
    assert row.accuracy is None
    assert row.accuracy_change is None
    with pytest.raises(InputError, match="no problem has 4 samples"):
        trade_offs(saved, [parse_policy("full")], ReplayOptions(samples=(4,)), grader)


def test_sample_counts_follow_what_is_there() -> None:
    assert sample_counts(lottery(3, 64)) == (4, 8, 16, 32, 64)
    assert sample_counts(lottery(3, 20)) == (4, 8, 16)
    assert sample_counts(lottery(3, 2)) == (2,)
    half = (*lottery(2, 4).problems, *lottery(2, 64).problems)
    assert sample_counts(Traces(problems=half)) == (4,), "half of the problems are not most of them"


def test_options_name_everything_that_is_wrong() -> None:
    with pytest.raises(UsageError) as caught:
        ReplayOptions(samples=(0,), order="recorded", batch=3, draws=0)
    assert len(caught.value.offenders) == 3
