"""The choice of a draft tree under simulated costs: it finds the best, spends little on looking, and follows change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from drafter.config import TreeShape
from trtkit.runtime.tree_choice import DEFAULT_TREES, TreeChooser
from trtkit.runtime.tree_memory import recall, remember

CHAIN, WIDE = TreeShape(beams=1, length=4), TreeShape(beams=4, length=4)
TOKENS = {None: 1.0, DEFAULT_TREES[1]: 2.4, CHAIN: 3.2, DEFAULT_TREES[3]: 3.5, WIDE: 3.8}
"""Tokens per step of a good head."""


def _cost(rows: int, option: TreeShape | None) -> float:
    """A step is 1 ms of weights, and 0.1 ms for each node beyond 8 in the batch; drafting takes 0.2 ms a token."""
    nodes = rows * (1 if option is None else option.max_nodes)
    return 1e-3 + 1e-4 * max(0, nodes - 8) + (2e-4 * option.length if option else 0.0)


def _run(chooser: TreeChooser, rows: int, steps: int, cost: Callable[[int, TreeShape | None], float] = _cost,
         tokens: dict[TreeShape | None, float] = TOKENS) -> tuple[Counter[TreeShape | None], float]:  # fmt: skip
    """How often each option ran, and tokens per second overall."""
    noise = random.Random(rows)
    chosen: Counter[TreeShape | None] = Counter()
    total_seconds = total_tokens = 0.0
    for _ in range(steps):
        option = chooser.choose(rows)
        chosen[option] += 1
        seconds = cost(rows, option) * (30 if noise.random() < 0.01 else noise.uniform(0.9, 1.1))
        emitted = round(rows * tokens[option] * noise.uniform(0.9, 1.1))
        chooser.observe(rows, option, seconds=seconds, tokens=emitted)
        total_seconds += cost(rows, option)
        total_tokens += rows * tokens[option]
    return chosen, total_tokens / total_seconds


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_the_best_option_runs_nearly_always(rows: int) -> None:
    best = max(TOKENS, key=lambda option: TOKENS[option] / _cost(rows, option))
    chosen, rate = _run(TreeChooser(), rows, 2000)
    near = [o for o in TOKENS if TOKENS[o] / _cost(rows, o) > 0.95 * TOKENS[best] / _cost(rows, best)]
    assert sum(chosen[option] for option in near) > 0.9 * 2000, "options that are as good but for noise may alternate"
    assert rate > 0.97 * rows * TOKENS[best] / _cost(rows, best)


def test_a_bad_head_is_never_slower_than_none() -> None:
    useless = {option: 1.02 if option else 1.0 for option in TOKENS}
    for rows in (1, 8, 32):
        _, rate = _run(TreeChooser(), rows, 2000, tokens=useless)
        assert rate > 0.97 * rows / _cost(rows, None)


def test_it_follows_when_the_machine_changes() -> None:
    chooser = TreeChooser()
    before, _ = _run(chooser, 1, 1000)
    after, _ = _run(chooser, 1, 4000, cost=lambda rows, option: _cost(rows, option) if option is None else 1.0)
    assert before[None] < 100
    assert after[None] > 3500


def test_what_was_learned_spares_the_next_run_its_trials(tmp_path: Path) -> None:
    first, again = TreeChooser(), TreeChooser()
    _run(first, 64, 1000)
    path = tmp_path / "cache" / "trees.json"
    remember(path, first)
    recall(path, again)
    chosen, _ = _run(again, 64, 100)
    assert chosen == {None: 100}, "no look at what is known to be slow"
    path.write_text('{"seconds": [[0, "1x4", "?"]]}')
    recall(path, TreeChooser())  # a damaged file is passed over


def test_batch_sizes_learn_apart() -> None:
    chooser = TreeChooser()
    few, _ = _run(chooser, 1, 500)
    many, _ = _run(chooser, 64, 500)
    assert few.most_common(1)[0][0] is not None
    assert many.most_common(1)[0][0] is None
    assert chooser.max_nodes == 17
    assert chooser.max_length == 4
