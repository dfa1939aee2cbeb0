"""The loop learns, resumes to the same weights after kill -9, and shares out work without changing the result."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from drafter.config import DrafterConfig
from drafter.data import Sample, pack, split_by_problem, windows
from drafter.loss import DraftBatch
from drafter.model import Drafter
from drafter.train import NonFiniteLossError, TrainConfig, learning_rate, train

CONFIG = TrainConfig(updates=24, parts=2, peak_rate=1e-2, save_every=5, report_every=1)


def _head() -> Drafter:
    torch.manual_seed(1)
    return Drafter(DrafterConfig(hidden_size=8, vocab_size=13, exit_dim=16))


def _batch(update: int, part: int) -> DraftBatch:
    """A language in which each token is the one before plus two: learnable from the embeddings."""
    source = torch.Generator().manual_seed(1000 * update + part)
    start = torch.randint(0, 13, (4,), generator=source)
    tokens = ((start[:, None] + 2 * torch.arange(10)) % 13).flatten()
    table = torch.eye(13, 8) + 0.1
    return DraftBatch(
        tokens=tokens,
        hidden=table[tokens],
        embeddings=table[tokens],
        segment=torch.arange(4).repeat_interleave(10),
        scored=torch.ones(40, dtype=torch.bool),
    )


def _train(out: Path, config: TrainConfig = CONFIG) -> dict[str, torch.Tensor]:
    head = _head()
    train(head, _batch, config, out)
    return head.state_dict()


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns(tmp_path: Path) -> None:
    _train(tmp_path, TrainConfig(updates=120, parts=2, peak_rate=2e-2, save_every=50, report_every=1))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, 121))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def _slow_train(out: Path) -> None:
    def slow_batch(update: int, part: int) -> DraftBatch:
        time.sleep(0.01)
        return _batch(update, part)

    torch.set_num_threads(1)
    train(_head(), slow_batch, CONFIG, out)


def test_kill_and_resume_give_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    whole = _train(_made(tmp_path / "whole"))
    broken = _made(tmp_path / "broken")
    process = multiprocessing.get_context("fork").Process(target=_slow_train, args=(broken,))
    process.start()
    while not (broken / "metrics.jsonl").exists() or len((broken / "metrics.jsonl").read_text().splitlines()) < 12:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert _equal(_train(broken), whole)
    assert (broken / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _worker(rank: int, out: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        train(_head(), _batch, CONFIG, out)
    finally:
        dist.destroy_process_group()


def test_two_processes_follow_the_curve_of_one(tmp_path: Path) -> None:
    _train(_made(tmp_path / "one"))
    both = _made(tmp_path / "both")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(rank, both, tmp_path / "store")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "both")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_resumed_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    _train(tmp_path)
    with pytest.raises(ValueError, match=r"peak_rate: 0\.01 there, 0\.5 now"):
        _train(tmp_path, TrainConfig(updates=24, parts=2, peak_rate=0.5))


def test_a_broken_loss_stops_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    def poisoned(update: int, part: int) -> DraftBatch:
        batch = _batch(update, part)
        return batch if update < 12 else DraftBatch(**{
            name: getattr(batch, name) * (float("nan") if name == "hidden" else 1)
            for name in ("tokens", "hidden", "embeddings", "segment")
        }, scored=batch.scored)  # fmt: skip

    with pytest.raises(NonFiniteLossError, match="at update 13"):
        train(_head(), poisoned, CONFIG, tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["update"] == 10
    assert all(bool(tensor.isfinite().all()) for tensor in state["drafter"].values())


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(CONFIG, update) for update in range(24)]
    assert rates[0] == pytest.approx(0.005)
    assert max(rates) == rates[1] == rates[2] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_solutions_of_a_problem_stay_on_one_side() -> None:
    samples = [Sample(problem=f"p{i % 50}", tokens=(1, 2, 3), prompt=1) for i in range(200)]
    kept, held_out = split_by_problem(samples, 0.2)
    assert {s.problem for s in kept}.isdisjoint({s.problem for s in held_out})
    assert len(kept) + len(held_out) == 200
    assert 0 < len(held_out) < 100


def test_windows_come_from_the_whole_completion_and_pack_without_padding() -> None:
    samples = [Sample(problem=str(i), tokens=tuple(range(300)), prompt=20) for i in range(60)]
    made = windows(samples, 100, seed=0, epoch=0)
    assert all(window.start >= 19 and window.end - window.start == 100 and window.end <= 300 for window in made)
    assert min(window.start for window in made) < 60
    assert max(window.end for window in made) > 260
    assert made != windows(samples, 100, seed=0, epoch=1)
    assert made == windows(samples, 100, seed=0, epoch=0)
    groups = list(pack(made, 700))
    assert [window for group in groups for window in group] == made
    assert all(sum(window.cost for window in group) <= 700 for group in groups)
