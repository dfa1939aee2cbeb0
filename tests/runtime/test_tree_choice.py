"""The choice of a draft tree under simulated costs: it finds the best, spends little on looking, and follows change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from drafter.config import TreeShape
from trtkit.runtime.tree_choice import DEFAULT_TREES, TreeChooser
from trtkit.runtime.tree_memory import memory_file, recall, remember

CHAIN, WIDE = TreeShape(beams=1, length=4), TreeShape(beams=4, length=4)
NEXT = {1: 0.8, 2: 0.87, 4: 0.92}
"""By beams of a good head: the share of drafts of one depth that are right at the next one too."""


def _tokens(option: TreeShape | None, right: Mapping[int, float] = NEXT) -> float:
    """Tokens per step, exactly."""
    return 1.0 if option is None else sum(right[option.beams] ** depth for depth in range(option.length + 1))


def _cost(rows: int, option: TreeShape | None) -> float:
    """A step is 1 ms of weights, and 0.1 ms for each node beyond 8 in the batch; drafting takes 0.2 ms a token."""
    nodes = rows * (1 if option is None else option.max_nodes)
    return 1e-3 + 1e-4 * max(0, nodes - 8) + (2e-4 * option.length if option else 0.0)


def _run(chooser: TreeChooser, rows: int, steps: int, cost: Callable[[int, TreeShape | None], float] = _cost,
         right: Mapping[int, float] = NEXT) -> tuple[Counter[TreeShape | None], float]:  # fmt: skip
    """How often each option ran, and tokens per second overall. Every row accepts by chance, as rows do."""
    noise = random.Random(rows)
    chosen: Counter[TreeShape | None] = Counter()
    total_seconds = total_tokens = 0.0
    for _ in range(steps):
        option = chooser.choose(rows)
        chosen[option] += 1
        cold = option not in chosen - Counter([option])
        slow = 8 if cold else 30 if noise.random() < 0.01 else noise.uniform(0.9, 1.1)
        seconds = cost(rows, option) * slow
        accepted = [0] * (option.length if option else 0)
        for _row in range(rows):
            for depth in range(len(accepted)):
                if option is None or noise.random() >= right[option.beams]:
                    break
                accepted[depth] += 1
        chooser.observe(rows, option, seconds=seconds, accepted=accepted)
        total_seconds += cost(rows, option)
        total_tokens += rows * _tokens(option, right)
    return chosen, total_tokens / total_seconds


def _best_rate(rows: int, right: Mapping[int, float] = NEXT) -> float:
    return max(rows * _tokens(option, right) / _cost(rows, option) for option in DEFAULT_TREES)


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_the_best_option_runs_nearly_always(rows: int) -> None:
    chosen, rate = _run(TreeChooser(), rows, 2000)
    near = [o for o in DEFAULT_TREES if rows * _tokens(o) / _cost(rows, o) > 0.93 * _best_rate(rows)]
    assert sum(chosen[option] for option in near) > 0.9 * 2000, "options that are as good but for noise may alternate"
    assert rate > 0.96 * _best_rate(rows)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_short_run_gains_from_what_training_measured(rows: int) -> None:
    """50 steps are too few to learn the acceptance at one row; the head's own report says it from the start."""
    rates = []
    for told in (False, True):
        chooser = TreeChooser()
        chooser.recall({"seconds": [[(rows - 1).bit_length(), str(o), [_cost(rows, o) / rows] * 3]
                                    for o in DEFAULT_TREES], "acceptance": []})  # fmt: skip
        if told:
            for beams, share in NEXT.items():
                chooser.expect(str(beams), [share**depth for depth in range(1, 5)])
        rates.append(_run(chooser, rows, 50)[1])
    assert rates[1] > 0.9 * _best_rate(rows)
    assert rates[1] >= 0.95 * rates[0]


@pytest.mark.parametrize("rows", [4, 8, 16, 32])
def test_a_short_run_spends_little_on_looks(rows: int) -> None:
    """Trees that cannot win are not tried: their nodes cost what those of smaller ones did."""
    chooser = TreeChooser()
    for beams, share in NEXT.items():
        chooser.expect(str(beams), [share**depth for depth in range(1, 5)])
    chosen, rate = _run(chooser, rows, 250)
    assert rate > 0.965 * _best_rate(rows)
    assert chosen[WIDE] == 0


def test_a_bad_head_is_never_slower_than_none() -> None:
    useless = dict.fromkeys(NEXT, 0.02)
    for rows in (1, 8, 32):
        _, rate = _run(TreeChooser(), rows, 2000, right=useless)
        assert rate > 0.97 * rows / _cost(rows, None)


def test_it_follows_when_the_machine_changes() -> None:
    chooser = TreeChooser()
    before, _ = _run(chooser, 1, 1000)
    after, _ = _run(chooser, 1, 4000, cost=lambda rows, option: _cost(rows, option) if option is None else 1.0)
    assert before[None] < 100
    assert after[None] > 3500


def test_an_option_that_becomes_faster_is_noticed() -> None:
    """A little slower than none for a while, then twice as fast."""
    chooser = TreeChooser((None, CHAIN))
    tokens = _tokens(CHAIN)
    before, _ = _run(chooser, 1, 1000, cost=lambda rows, option: 1e-3 * (1.15 * tokens if option else 1.0))
    after, _ = _run(chooser, 1, 3000, cost=lambda rows, option: 1e-3 * (0.5 * tokens if option else 1.0))
    assert before[CHAIN] < 100
    assert after[CHAIN] > 1000


@pytest.mark.parametrize(("rows", "busy"), [(1, 9), (4, 5)])
def test_a_busy_moment_is_not_held_against_what_was_tried_in_it(rows: int, busy: int) -> None:
    """A neighbour took the cores during the first trials: they are looked at again, and oftener the better they are."""
    chooser = TreeChooser()
    for beams, share in NEXT.items():
        chooser.expect(str(beams), [share**depth for depth in range(1, 5)])
    _run(chooser, rows, busy, cost=lambda rows, option: 2.5 * _cost(rows, option))
    assert _run(chooser, rows, 2000)[1] > 0.95 * _best_rate(rows)


def test_what_was_learned_serves_a_run_with_fewer_options() -> None:
    first, again = TreeChooser(), TreeChooser((None, CHAIN))
    _run(first, 4, 500)
    again.recall(first.learned())
    assert again.tokens(CHAIN) == pytest.approx(first.tokens(CHAIN))
    assert again.rate(4, CHAIN) == pytest.approx(first.rate(4, CHAIN))


def test_a_short_chain_learns_from_a_long_one() -> None:
    chooser = TreeChooser()
    for _ in range(50):
        chooser.observe(2, CHAIN, seconds=1.0, accepted=[2, 1, 1, 0])
    assert chooser.tokens(TreeShape(beams=1, length=2)) == pytest.approx(2.5)
    assert chooser.tokens(CHAIN) == pytest.approx(3.0)
    assert chooser.tokens(None) == 1.0


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
    path.write_text('{"seconds": [[Infinity, "1x4", [1.0]]]}')
    recall(path, TreeChooser())
    path.write_text('{"seconds": [[6, "None", [0.0, -1.0]], [6, "1x2", [0.0]]], "acceptance": []}')
    damaged = TreeChooser()
    recall(path, damaged)
    assert _run(damaged, 64, 100)[0][None] > 90


def test_a_home_of_somebody_else_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's image says HOME=/root, and it runs as another user; or its user has no home at all."""

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does without HOME and an entry in passwd
    path = memory_file("digest", torch.device("cpu"), "")
    assert path.is_absolute(), "not a folder called ~"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refused)
        recall(path, TreeChooser())


def test_trees_of_one_size_and_no_plain_steps() -> None:
    """As where some beams are looked up and others drawn."""
    chooser = TreeChooser((CHAIN, TreeShape(beams=2, length=2), WIDE))
    chosen, _ = _run(chooser, 4, 300)
    assert chosen[CHAIN] > 200


def test_batch_sizes_learn_apart() -> None:
    chooser = TreeChooser()
    few, _ = _run(chooser, 1, 500)
    many, _ = _run(chooser, 64, 500)
    assert few.most_common(1)[0][0] is not None
    assert many.most_common(1)[0][0] is None
    assert chooser.max_nodes == 17
    assert chooser.max_length == 4
