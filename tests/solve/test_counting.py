"""The counting order: what it hands out depends on the samples alone, and is what ``revote`` replays."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from trtkit.solve.counting import CountingOrder
from trtkit.solve.replay import arrivals
from trtkit.solve.traces import Trace


def hand_out(tokens: list[int], lanes: int, rng: random.Random) -> list[list[int]]:
    """Groups in the order they were handed out while samples advance at random speeds, in random order.

    Begins as after an interruption: some samples have ended already, the others start anew.
    """
    order = CountingOrder(len(tokens), lanes)
    ended = {index: count for index, count in enumerate(tokens) if rng.random() < 0.3}
    reached = {index: 0 for index in range(len(tokens)) if index not in ended}
    groups: list[list[int]] = []
    counted: set[int] = set()
    while True:
        while group := order.next(ended, lambda index: reached[index] + 1, counted):
            assert not counted & set(group)
            counted.update(group)
            groups.append(group)
        if not reached:
            return groups
        index = rng.choice(list(reached))
        reached[index] = min(reached[index] + rng.randint(1, 5), tokens[index])
        if reached[index] == tokens[index]:
            del reached[index]
            ended[index] = tokens[index]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_is_that_of_the_replay_however_the_samples_came_in(
    tokens: list[int], lanes: int, rng: random.Random
) -> None:
    traces = [Trace(index=i, box=None, tokens=n, closed=True, looped=False) for i, n in enumerate(tokens)]
    replayed = arrivals(traces, dict.fromkeys(range(len(tokens))), "length", lanes)
    wanted: dict[float, list[int]] = {}
    for arrival in sorted(replayed, key=lambda one: (one.ended, one.trace.index)):
        wanted.setdefault(arrival.ended, []).append(arrival.trace.index)
    assert hand_out(tokens, lanes, rng) == list(wanted.values())


def test_nothing_is_handed_out_that_another_sample_might_precede() -> None:
    order = CountingOrder(3, 2)
    # Sample 1 ended after 5 tokens; sample 0, now at 4, might still end at the same tick.
    assert order.next({1: 5}, lambda index: 5, set()) == []
    assert order.next({1: 5}, lambda index: 6, set()) == [1]
    # Sample 2 took its lane at tick 5 and ended with 1 token, at tick 6: together with sample 0.
    assert order.next({1: 5, 2: 1, 0: 6}, lambda index: 0, {1}) == [0, 2]


def test_without_lanes_samples_are_counted_as_they_arrive() -> None:
    order = CountingOrder(4, None)
    assert order.next({3: 9, 1: 2}, lambda index: 1, set()) == [3, 1]
    assert order.next({3: 9, 1: 2, 0: 1}, lambda index: 1, {3, 1}) == [0]
