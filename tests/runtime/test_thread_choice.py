"""The number of threads: never much slower than the best one, whatever else the machine does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.thread_choice import ThreadChooser
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

Cost: TypeAlias = Callable[[int], float]
"""Seconds of a step by its number of threads."""


def quiet(threads: int) -> float:
    return 0.002 + 0.018 / threads


def busy(most: int) -> Cost:
    """Another process has one core: steps on all of them wait for it."""
    return lambda threads: quiet(threads) * (8 if threads == most else 1)


def run(
    chooser: ThreadChooser, cost: Cost, seconds: float, *, rows: Callable[[int], int] = lambda step: 32,
    shape: Callable[[int], TreeShape | None] = lambda step: None, seed: int = 0,
) -> float:  # fmt: skip
    """Steps per second, on a machine that hiccups."""
    noise, spent, steps = random.Random(seed), 0.0, 0
    while spent < seconds:
        hiccup = 3.0 if noise.random() < 0.02 else noise.uniform(0.93, 1.07)
        took = cost(chooser.threads) * hiccup
        chooser.observe(rows(steps), shape(steps), took)
        spent, steps = spent + took, steps + 1
    return steps / spent


def rate(cost: Cost, threads: int) -> float:
    return 1 / (cost(threads) * (0.02 * 3.0 + 0.98))


@pytest.mark.parametrize("most", [2, 4, 16, 96])
def test_a_free_machine_is_used_whole(most: int) -> None:
    for seed in range(10):
        chooser = ThreadChooser(most)
        assert run(chooser, quiet, 60.0, seed=seed) > 0.95 * rate(quiet, most)


@pytest.mark.parametrize("most", [2, 4, 16])
def test_a_core_that_another_process_has_is_left_to_it(most: int) -> None:
    cost = busy(most)
    best = rate(cost, most - 1)
    for seed in range(10):
        chooser = ThreadChooser(most)
        assert run(chooser, cost, 3.0, seed=seed) > 0.5 * best, "soon"
        assert run(chooser, cost, 60.0, seed=seed) > 0.9 * best
        assert chooser.count == most - 1


def test_it_follows_a_process_that_comes_and_goes() -> None:
    for seed in range(10):
        chooser = ThreadChooser(2)
        run(chooser, quiet, 120.0, seed=seed)
        assert chooser.count == 2
        assert run(chooser, busy(2), 2.0, seed=seed) > 0.4 * rate(quiet, 1), "it does not wait for the next look"
        run(chooser, busy(2), 120.0, seed=seed)
        assert chooser.count == 1
        run(chooser, quiet, 30.0, seed=seed)
        assert chooser.count == 2


def test_a_model_that_gains_nothing_from_many_cores_takes_few() -> None:
    def small(threads: int) -> float:
        return 0.001 + 0.008 / threads + 0.0005 * threads  # best with 4

    chooser = ThreadChooser(64)
    run(chooser, small, 30.0)
    assert chooser.count in (2, 4, 8)
    assert run(chooser, small, 60.0) > 0.9 * max(rate(small, count) for count in chooser.counts)


def test_steps_that_cannot_be_compared_decide_nothing() -> None:
    """Rows that come and go and trees that change: what a step costs then is not the threads' doing."""
    chain, rng = TreeShape(beams=1, length=3), random.Random(1)
    chooser = ThreadChooser(4)
    sizes = [rng.choice([1, 32]) for _ in range(100_000)]
    cost_of = {1: 1.0, 32: 20.0}
    for step, size in enumerate(sizes):
        shape = chain if step % 2 else None
        chooser.observe(size, shape, quiet(chooser.threads) * cost_of[size] * (3 if shape else 1))
        assert chooser.count == 4


def test_what_a_number_costs_the_first_time_does_not_count() -> None:
    """Libraries build their kernels for each number of threads: the first step with one fewer takes 20 times longer."""
    chooser, used, steps = ThreadChooser(2), {2}, 0
    while chooser.count == 2 and steps < 1000:
        threads, cost = chooser.threads, busy(2)(chooser.threads)
        chooser.observe(8, None, cost * (1 if threads in used else 20))
        used.add(threads)
        steps += 1
    assert steps < 40


def test_a_look_at_a_hopeless_number_is_short() -> None:
    chooser, slow, steps = ThreadChooser(2), 0, 0
    while slow == 0 or chooser.looks:
        fewer = chooser.threads == 1
        chooser.observe(8, None, 0.2 if fewer else 0.02)
        slow, steps = slow + fewer, steps + 1
    assert (chooser.count, slow) == (2, 2), "one to warm up, one to see"


def test_one_core_leaves_nothing_to_choose() -> None:
    chooser = ThreadChooser(1)
    assert run(chooser, quiet, 5.0) > 0
    assert (chooser.threads, chooser.looks) == (1, False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Restless(ThreadChooser):
    """Another number every step."""

    def __init__(self, looks: bool) -> None:
        super().__init__(2)
        self.seen: list[int] = []
        self._looks = looks

    @property
    def threads(self) -> int:
        return 1 + len(self.seen) % 2

    @property
    def looks(self) -> bool:
        return self._looks

    def observe(self, rows: int, shape: TreeShape | None, seconds: float) -> None:
        assert seconds > 0
        self.seen.append(torch.get_num_threads())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("looks", [False, True])
def test_an_engine_runs_on_what_is_chosen_says_the_same_and_gives_the_threads_back(tmp_path: Path, looks: bool) -> None:
    model = DecoderModel(
        open_unified(save_tiny(tmp_path / "model")), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300
    )
    head = Drafter(DrafterConfig(hidden_size=256, vocab_size=320, exit_dim=32))
    prompts = random_prompts(3, [20, 7, 30])
    requests = [request(f"r{n}", prompt, seed=n, max_tokens=8) for n, prompt in enumerate(prompts)]
    limits = TorchLimits(rows=4, total_tokens=64, kv_blocks=40)
    said, chooser, memory = [], Restless(looks), tmp_path / "trees.json"
    for threads in (None, chooser):
        with TorchEngine(model, limits, Drafting(head=head, memory=memory), threads) as engine:
            said.append(run_all(engine, requests))
        assert torch.get_num_threads() == 2
        if threads is None:
            memory.unlink()
    assert said[0] == said[1]
    assert chooser.seen[:4] == [1, 2, 1, 2]
    learned = json.loads(memory.read_text())["seconds"] if memory.exists() else []
    assert bool(learned) == (not looks), "what a tree costs is not learned while threads are compared"


@pytest.mark.usefixtures("two_threads")
def test_a_number_that_was_asked_for_stays(tmp_path: Path) -> None:
    directory = tiny_engine_dir(tmp_path / "engine")
    with open_engine(directory, OpenOptions(threads=1)) as engine:
        run_all(engine, [request("r", (1, 2, 3))])
        assert torch.get_num_threads() == 1
