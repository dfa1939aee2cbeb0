"""The time bank in simulated time: nothing here sleeps or looks at a clock."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.errors import UsageError
from trtkit.solve.clock import Clock, Pace, TimeBudget, parse_duration

HOURS_5 = 18_000.0


def simulate(demands: Sequence[float], limit: float, spent: float = 0.0) -> tuple[list[float], float]:
    """One problem after the other, each taking what it wants up to its share: (shares, time at the end)."""
    budget = TimeBudget.of(limit, len(demands))
    now = 1000.0
    clock = Clock(budget, now=now, spent=spent, problems=len(demands))
    shares = []
    for number, demand in enumerate(demands):
        name = str(number)
        shares.append(clock.open(name, now))
        took = min(demand, max(clock.left_for(name, now), 0.0))
        now += took
        clock.charge(took, {name: 1})
        clock.close(name)
    return shares, now - 1000.0


def capped(demands: Sequence[float], limit: float) -> list[float]:
    """The shares of the published rule, with a third of the bank at most: nobody draws more than 210 of 360 s."""
    left, shares = limit * 0.99, []
    base, draw = limit / len(demands) * 350 / 360, limit / len(demands) * 210 / 360
    for number, demand in enumerate(demands):
        problems = len(demands) - number
        own = min(base, left / problems)
        shares.append(min(own + min(draw, (left - own * problems) / min(3, problems)), left))
        left -= min(demand, shares[-1])
    return shares


def test_the_published_setting() -> None:
    budget = TimeBudget.of(HOURS_5, 50)
    assert (budget.base_seconds, budget.draw_seconds, budget.reserve_seconds) == pytest.approx((350.0, 210.0, 180.0))
    half = TimeBudget.of(HOURS_5 / 2, 50)
    assert (half.base_seconds, half.draw_seconds) == pytest.approx((175.0, 105.0))
    assert TimeBudget.of(360.0, 1).base_seconds == pytest.approx(350.0)


def test_a_problem_draws_a_third_of_the_bank_and_keeps_its_share_while_it_does() -> None:
    clock = Clock(TimeBudget.of(HOURS_5, 50), now=0.0, problems=50)
    # 18000 - 180 s, of which 50 bases of 350 s are set aside: 320 are in the bank.
    share = clock.open("first", 0.0)
    assert share == pytest.approx(350.0 + 320.0 / 3)
    for now in range(50, 451, 50):
        clock.charge(50.0, {"first": 1})
        assert clock.left_for("first", float(now)) == pytest.approx(share - now)


def test_problems_opened_together_set_each_others_time_aside() -> None:
    """1 000 s are left of 5 hours for ten problems of one batch: nobody gets more for being opened early or late."""
    clock = Clock(TimeBudget.of(HOURS_5, 50), now=0.0, spent=HOURS_5 - 180.0 - 1000.0, problems=10)
    assert [clock.open(str(number), 0.0) for number in range(10)] == pytest.approx([100.0] * 10)
    assert [clock.left_for(str(number), 0.0) for number in range(10)] == pytest.approx([100.0] * 10)


def test_unused_time_flows_into_the_bank_and_a_hard_problem_draws_it() -> None:
    clock = Clock(TimeBudget.of(HOURS_5, 50), now=0.0, problems=50)
    now = 0.0
    for number in range(10):
        clock.open(str(number), now)
        now += 50.0
        clock.charge(50.0, {str(number): 1})
        clock.close(str(number))
    # 18000 - 180 - 500 = 17320 are left; 40 bases are 14000, so 3320 are in the bank: more than 210 for a third of it.
    assert clock.open("hard", now) == pytest.approx(560.0)
    assert clock.bank(now) == pytest.approx(3320.0)
    assert clock.left_for("hard", now) == pytest.approx(560.0)
    clock.charge(555.0, {"hard": 1})
    assert clock.left_for("hard", now + 555.0) == pytest.approx(5.0)
    clock.charge(5.0, {"hard": 1})
    assert clock.left_for("hard", now + 560.0) == pytest.approx(0.0)
    clock.close("hard")
    assert clock.bank(now + 560.0) == pytest.approx(3110.0)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 2000), min_size=1, max_size=60), st.floats(0, 0.9))
def test_the_limit_is_kept_and_everybody_gets_a_fair_part(demands: list[float], spent: float) -> None:
    limit = 360.0 * len(demands)
    shares, took = simulate(demands, limit, spent * limit)
    budget = TimeBudget.of(limit, len(demands))
    free = limit - budget.reserve_seconds - spent * limit
    assert took <= max(free, 0.0) + 1e-6
    fair = min(budget.base_seconds, max(free, 0.0) / len(demands))
    assert min(shares) >= fair - 1e-6, "whatever came before, a problem gets its fair part"
    if not spent:
        published = capped(demands, limit)
        assert all(share >= least - 1e-6 for share, least in zip(shares, published, strict=True))


@settings(max_examples=60)
@given(st.lists(st.floats(0, 2000), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_a_share_depends_on_what_is_left_not_on_who_used_it(demands: list[float], draw: random.Random) -> None:
    """Earlier problems in another order leave the next one the same share when they took the same time in all."""
    *early, last = [min(demand, 300.0) for demand in demands]  # below the base, so that nobody is cut short
    shuffled = list(early)
    draw.shuffle(shuffled)
    limit = 360.0 * len(demands)
    assert simulate([*early, last], limit)[0][-1] == pytest.approx(simulate([*shuffled, last], limit)[0][-1])


@pytest.mark.parametrize("hard", [1, 5, 25])
def test_time_that_is_left_goes_to_hard_problems_at_the_end(hard: int) -> None:
    """Each gets the same of it."""
    demands = [60.0] * (50 - hard) + [1e9] * hard
    shares, took = simulate(demands, HOURS_5)
    assert took == pytest.approx(0.99 * HOURS_5)
    assert shares[-hard:] == pytest.approx([(0.99 * HOURS_5 - 60.0 * (50 - hard)) / hard] * hard)


@pytest.mark.parametrize("scale", [150.0, 300.0, 600.0, 1500.0])
def test_shuffling_does_not_change_what_a_problem_can_expect(scale: float) -> None:
    """Its mean share over many orders; and before the end no place in the order is a bad one."""
    draw = random.Random(3)
    demands = [scale * draw.lognormvariate(0, 0.7) for _ in range(50)]
    by_problem, by_place, rounds = [0.0] * 50, [0.0] * 50, 400
    for _ in range(rounds):
        order = draw.sample(range(50), 50)
        shares, _ = simulate([demands[problem] for problem in order], HOURS_5)
        for place, (problem, share) in enumerate(zip(order, shares, strict=True)):
            by_problem[problem] += share / rounds
            by_place[place] += share / rounds
    assert max(by_problem) / min(by_problem) < 1.25
    assert max(by_place[:30]) / min(by_place) < 1.35


def test_the_reserve_for_the_start_and_earlier_sessions_count() -> None:
    budget = TimeBudget.of(1000.0, 10, reserve_seconds=100.0)
    clock = Clock(budget, now=5.0, spent=400.0, problems=10)
    assert clock.left(5.0) == 500.0
    assert clock.open("a", 5.0) == pytest.approx(50.0)
    late = Clock(budget, now=5.0, spent=950.0, problems=3)
    assert late.open("a", 5.0) <= 0
    assert late.left_for("a", 5.0) <= 0


def test_a_resumed_problem_goes_on_where_it_was() -> None:
    budget = TimeBudget.of(HOURS_5, 50)
    unbroken = Clock(budget, now=0.0, problems=50)
    share = unbroken.open("p", 0.0)
    unbroken.charge(300.0, {"p": 1})
    resumed = Clock(budget, now=0.0, spent=300.0, problems=50)
    assert resumed.open("p", 0.0, used=300.0) == pytest.approx(share)
    assert resumed.left_for("p", 0.0) == pytest.approx(unbroken.left_for("p", 300.0)) == pytest.approx(share - 300.0)


def test_problems_in_one_batch_are_charged_by_their_rows() -> None:
    clock = Clock(TimeBudget.of(3600.0, 10), now=0.0, problems=10)
    clock.open("a", 0.0)
    clock.open("b", 0.0)
    before = {name: clock.left_for(name, 0.0) for name in "ab"}
    clock.charge(40.0, {"a": 3, "b": 1, "gone": 9})
    bank = clock.bank(40.0)
    assert bank == pytest.approx(clock.budget.limit_seconds - clock.budget.reserve_seconds - 3500.0)
    assert before["a"] - clock.left_for("a", 40.0) == pytest.approx(30.0)
    assert before["b"] - clock.left_for("b", 40.0) == pytest.approx(10.0)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1500), st.integers(1, 16)), min_size=2, max_size=20), st.integers(2, 6))
def test_pooled_problems_keep_the_limit_together(demands: list[tuple[float, int]], at_once: int) -> None:
    budget = TimeBudget.of(360.0 * len(demands), len(demands))
    now, step = 0.0, 7.0
    clock = Clock(budget, now=now, problems=len(demands))
    waiting = [(str(number), *demand) for number, demand in enumerate(demands)]
    running: dict[str, list[float]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name, demand, rows = waiting.pop()
            clock.open(name, now)
            running[name] = [demand, float(rows)]
        now += step
        total = sum(rows for _, rows in running.values())
        clock.charge(step, {name: int(rows) for name, (_, rows) in running.items()})
        for name in list(running):
            running[name][0] -= step * running[name][1] / total
            if running[name][0] <= 0 or clock.left_for(name, now) <= 0:
                clock.close(name)
                del running[name]
    assert now <= budget.limit_seconds - budget.reserve_seconds + step


def test_a_predictor_scales_the_base_within_bounds() -> None:
    difficulty = {"easy": 100.0, "mean": 1000.0, "hard": 1_900.0}
    clock = Clock(TimeBudget.of(HOURS_5, 50), now=0.0, problems=50, difficulty=difficulty)
    assert [clock.weight(name) for name in ("easy", "mean", "hard", "unknown")] == [0.5, 1.0, 1.5, 1.0]
    shares = {}
    for name in ("easy", "mean", "hard"):
        shares[name] = clock.open(name, 0.0)
        clock.close(name)
    assert shares["easy"] == pytest.approx(175.0, abs=210)
    assert shares["easy"] < shares["mean"] < shares["hard"]
    for nothing in (float("nan"), 0.0):
        told = Clock(TimeBudget.of(100.0, 2), now=0.0, problems=2, difficulty={"a": nothing})
        assert told.weight("a") == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90.0), ("10m", 600.0), ("5h", 18_000.0), ("1h30m", 5400.0), ("45", 45.0), (" 1.5h ", 5400.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "5 days", "h", "1x", "10m!", "nan", "inf"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--time-limit: .* is no duration"):
        parse_duration(text, "--time-limit")


@pytest.mark.parametrize("reserve", [10.0, -1.0])
def test_a_reserve_that_leaves_nothing_or_is_none_is_refused(reserve: float) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        TimeBudget.of(10.0, 5, reserve_seconds=reserve)


def test_silent_steps_are_a_part_of_the_next_that_brings_something() -> None:
    pace = Pace()
    pace.stepped(1.0, spoke=False)
    assert pace.seconds == 0.0
    pace.stepped(2.0, spoke=True)
    assert pace.seconds == 3.0
    pace.stepped(3.0, spoke=True)
    assert pace.seconds == 3.0
    pace.stepped(7.0, spoke=False)
    pace.stepped(1.0, spoke=True)
    assert pace.seconds == pytest.approx(4.0)


def test_one_long_silence_is_not_the_pace_and_several_are() -> None:
    pace = Pace()
    for _ in range(10):
        pace.stepped(0.03, spoke=True)
    pace.stepped(300.0, spoke=False)
    pace.stepped(0.03, spoke=True)
    assert pace.seconds < 0.1
    for _ in range(20):
        pace.stepped(1.9, spoke=False)
        pace.stepped(0.1, spoke=True)
    assert pace.seconds == pytest.approx(2.0, rel=0.1)
    pace.stepped(22.0, spoke=True)
    assert pace.seconds == pytest.approx(6.0, rel=0.1), "a step that is long is no silence"
