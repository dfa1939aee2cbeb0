"""The loop learns, resumes to the same weights after kill -9, and shares out work without changing the result."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from drafter import train as module
from drafter.config import DrafterConfig
from drafter.data import Sample, Window, pack, split_by_problem, windows
from drafter.loss import DraftBatch, Objective, draft_loss
from drafter.model import Drafter
from drafter.train import NonFiniteLossError, Report, TrainConfig, learning_rate, saved_updates, train

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


@pytest.mark.parametrize(("seconds", "kept"), [(0.0, True), (1e9, False)])
def test_long_updates_are_saved_by_the_clock(tmp_path: Path, seconds: float, kept: bool) -> None:
    """Long before ``save_every`` of them, and then no more is lost than since."""
    config = dataclasses.replace(CONFIG, save_every=10**6, save_seconds=seconds)

    def interrupted(update: int, part: int) -> DraftBatch:
        if update == 3:
            raise KeyboardInterrupt
        return _batch(update, part)

    out = _made(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(_head(), interrupted, config, out)
    assert (saved_updates(out) is not None) is kept
    head = _head()
    train(head, _batch, config, out)
    assert saved_updates(out) == (CONFIG.updates, CONFIG.updates)
    assert _equal(head.state_dict(), _train(_made(tmp_path / "whole")))


@pytest.mark.parametrize(("saving", "last"), [(0.0, 18), (1.0, 19), (3.0, 15)])
def test_the_clock_saves_again_and_again_but_a_twentieth_of_the_time_at_most(
    saving: float, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates of 5 seconds, a save every 15; where one takes a second, every 20, and where it takes three, every 60."""
    now = 0.0

    def slow_batch(update: int, part: int) -> DraftBatch:
        nonlocal now
        now += 2.5
        if update == 19:
            raise KeyboardInterrupt
        return _batch(update, part)

    def slow_save(*given: Any) -> None:
        nonlocal now
        now += saving
        save(*given)

    save = torch.save
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module.torch, "save", slow_save)
    config = dataclasses.replace(CONFIG, save_every=10**6, save_seconds=15.0)
    with pytest.raises(KeyboardInterrupt):
        train(_head(), slow_batch, config, tmp_path)
    assert saved_updates(tmp_path) == (last, CONFIG.updates)


def test_what_is_reported_is_the_loss_of_that_update(tmp_path: Path) -> None:
    told: list[Report] = []
    config = dataclasses.replace(CONFIG, report_every=10)
    train(_head(), _uneven, config, tmp_path, on_report=told.append)
    assert [report.update for report in told] == [10, 20, 24]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [json.loads(json.dumps(dataclasses.asdict(report))) for report in told]
    first: list[Report] = []
    train(_head(), _uneven, dataclasses.replace(CONFIG, report_every=1), _made(tmp_path / "first"),
          on_report=first.append)  # fmt: skip
    losses = [draft_loss(_head(), _uneven(0, part), depth_weights=CONFIG.depth_weights) for part in range(2)]
    weights = [float(loss.weight) for loss in losses]
    assert weights[0] != weights[1]
    mean = sum(float(loss.total) * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert first[0].loss == pytest.approx(mean, rel=1e-5)
    assert first[0].rate == learning_rate(CONFIG, 0)


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


def _uneven(update: int, part: int) -> DraftBatch:
    """The first part has one window, the second three."""
    batch, cut = _batch(update, 0), 10
    piece = slice(None, cut) if part == 0 else slice(cut, None)
    return DraftBatch(**{name: getattr(batch, name)[piece]
                         for name in ("tokens", "hidden", "embeddings", "segment", "scored")})  # fmt: skip


def test_parts_of_different_sizes_make_the_update_of_one_batch_with_all_their_windows(tmp_path: Path) -> None:
    heads = []
    for name, parts, batch_of in (("parts", 2, _uneven), ("one", 1, _batch)):
        heads.append(_head())
        config = TrainConfig(updates=6, parts=parts, peak_rate=1e-2, report_every=1)
        train(heads[-1], batch_of, config, _made(tmp_path / name))
    for name, weight in heads[1].state_dict().items():
        torch.testing.assert_close(heads[0].state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    one, other = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("parts", "one"))
    for line, wanted in zip(one, other, strict=True):
        found, expected = json.loads(line), json.loads(wanted)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["top1"] == pytest.approx(expected["top1"])


@pytest.mark.parametrize(("objective", "clip"), [("ce", 0.05), ("ce", 3.0), ("kd", 0.05)])
def test_a_run_is_adamw_on_the_mean_over_all_predictions(objective: Objective, clip: float, tmp_path: Path) -> None:
    """Plain autograd on the unrolled head, with every setting that the loop has to pass on."""
    config = TrainConfig(updates=5, parts=2, peak_rate=1e-2, weight_decay=0.3, clip=clip, depth_weights=(1.0, 0.4),
                         objective=objective)  # fmt: skip
    lm_head = torch.randn(13, 8)
    ours, theirs = _head(), _head()
    train(ours, _batch, config, tmp_path, lm_head=lm_head)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.3)
    for update in range(5):
        optimizer.param_groups[0]["lr"] = learning_rate(config, update)
        terms, weights = [], []
        for batch in (_batch(update, part) for part in range(2)):
            for depth, weight in ((1, 1.0), (2, 0.4)):
                anchors = (torch.arange(4)[:, None] * 10 + torch.arange(9 - depth)).flatten()
                state, logits = torch.zeros(len(anchors), 8), torch.zeros(0)
                for step in range(1, depth + 1):
                    logits, state = theirs.step(batch.hidden[anchors], state, batch.embeddings[anchors + step])
                wanted: torch.Tensor = batch.tokens[anchors + depth + 1]
                if objective == "kd":
                    wanted = (batch.hidden[anchors + depth] @ lm_head.T).softmax(dim=1)
                terms.append(weight * torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                weights.append(weight * len(anchors))
        optimizer.zero_grad()
        (torch.stack(terms).sum() / sum(weights)).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


def test_a_run_that_died_before_its_first_state_starts_with_empty_metrics(tmp_path: Path) -> None:
    def dies(update: int, part: int) -> DraftBatch:
        if update == 3:
            raise KeyboardInterrupt
        return _batch(update, part)

    with pytest.raises(KeyboardInterrupt):
        train(_head(), dies, CONFIG, tmp_path)
    assert not (tmp_path / "state.pt").exists()
    _train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, 25))


@pytest.mark.parametrize("rest", ['{"update": 25, "loss": 1}\n', '{"update": 2', "[1]\n", '{"loss": 1}\n', "\xff\n"])
def test_a_full_disk_takes_no_reports_along(tmp_path: Path, rest: str) -> None:
    """What a killed run left behind the last saved state is dropped, or, with no room to do so, stays."""
    resource = pytest.importorskip("resource")
    _train(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + rest.encode("latin-1"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(OSError, match="large"):
            _train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole + rest.encode("latin-1")
    _train(tmp_path)
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob("*.tmp"))


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


def test_a_gradient_beyond_all_numbers_is_no_step(tmp_path: Path) -> None:
    """The loss is finite there, and the weights would be saved as NaN before the next one tells."""
    head = Drafter(DrafterConfig(hidden_size=8, vocab_size=13, exit_dim=16, num_draft_layers=0, rnn=False))
    torch.nn.init.zeros_(head.output.weight)

    def steep(update: int, part: int) -> DraftBatch:
        batch = _batch(update, part)
        return dataclasses.replace(batch, hidden=torch.full_like(batch.hidden, 3e38))

    with pytest.raises(NonFiniteLossError, match=r"gradient is .* at update 1"):
        train(head, steep, dataclasses.replace(CONFIG, save_every=1), tmp_path)
    assert not (tmp_path / "state.pt").exists()
    assert bool(head.output.weight.isfinite().all())


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
    many = [Sample(problem=f"p{i}", tokens=(1,), prompt=1) for i in range(2000)]
    assert len(split_by_problem(many, 0.2)[1]) == pytest.approx(400, abs=60)
    assert split_by_problem(many, 0.0) == (many, [])
    held = [{sample.problem for sample in split_by_problem(many, share)[1]} for share in (0.05, 0.2)]
    assert held[0] < held[1], "what a head was not trained on is held out again by every share up to its own"


def test_a_window_that_costs_too_much_stands_alone() -> None:
    made = [Window(sample=Sample(problem="p", tokens=(1,) * cost, prompt=1), start=0, end=cost)
            for cost in (9, 10, 3, 7, 7, 4)]  # fmt: skip
    assert [[window.cost for window in group] for group in pack(made, 8)] == [[9], [10], [3], [7], [7], [4]]
    assert [[window.cost for window in group] for group in pack(made, 10)] == [[9], [10], [3, 7], [7], [4]]


def test_windows_cover_the_ends_of_a_completion_as_often_as_its_middle() -> None:
    samples = [Sample(problem=str(i), tokens=tuple(range(400)), prompt=21) for i in range(2000)]
    made = windows(samples, 100, seed=0, epoch=0)
    assert all(window.end - window.start == 100 and window.start >= 20 for window in made)
    middle = sum(window.start <= 210 < window.end for window in made)
    for token in (21, 399):
        assert sum(window.start < token < window.end for window in made) > 0.8 * middle


def test_windows_come_from_the_whole_completion_and_pack_without_padding() -> None:
    samples = [Sample(problem=str(i), tokens=tuple(range(300)), prompt=20) for i in range(60)]
    made = windows(samples, 100, seed=0, epoch=0)
    assert all(window.start >= 19 and window.end - window.start == 100 and window.end <= 300 for window in made)
    assert min(window.start for window in made) < 60
    assert max(window.end for window in made) > 260
    assert made != windows(samples, 100, seed=0, epoch=1)
    assert made == windows(samples, 100, seed=0, epoch=0)
    assert [window.sample for window in made] != samples, "in a random order"
    groups = list(pack(made, 700))
    assert [window for group in groups for window in group] == made
    assert all(sum(window.cost for window in group) <= 700 for group in groups)
