"""The training loop: AdamW, warm-up and cosine, gradient accumulation, resume, several processes.

The loop knows nothing of text or of the target model: ``batch_of(update, part)`` hands it tensors, and must give the
same ones whenever it is asked for the same numbers. Then the state on disk is the head, the optimizer and a number, and
a killed run continues to the same weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from drafter.loss import DraftBatch, DraftLoss, Objective, draft_loss
from drafter.model import Drafter

__all__ = ["NonFiniteLossError", "Report", "StateError", "TrainConfig", "learning_rate", "saved_updates", "train"]

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"


class StateError(ValueError):
    """The saved state is damaged, or of a run with other settings."""


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became infinite or NaN. The last saved state is good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train. One update uses ``parts`` batches, shared out over the processes."""

    updates: int
    parts: int = 1
    peak_rate: float = 1e-3
    warmup: float = 0.1
    """Share of the updates during which the rate rises."""
    weight_decay: float = 0.0
    clip: float = 1.0
    depth_weights: tuple[float, ...] = (1.0, 0.8, 0.64)
    objective: Objective = "ce"
    chunk: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic; weights, their gradients and the optimizer's state stay float32."""
    save_every: int = 200
    save_seconds: float = 15.0
    """So long after the last save the next one comes early: an interruption costs seconds, not ``save_every`` updates.
    Where saving takes long it is longer, so that saves take a twentieth of the time at most."""
    report_every: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One line of metrics.jsonl."""

    update: int
    loss: float
    rate: float
    by_depth: tuple[float, ...]
    top1: tuple[float, ...]
    top5: tuple[float, ...]


def learning_rate(config: TrainConfig, update: int) -> float:
    """Linear warm-up to ``peak_rate``, then a cosine to a tenth of it. ``update`` counts from 0."""
    rising = max(1, round(config.warmup * config.updates))
    if update < rising:
        return config.peak_rate * (update + 1) / rising
    along = (update - rising) / max(1, config.updates - rising)
    return config.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


def train(
    drafter: Drafter,
    batch_of: Callable[[int, int], DraftBatch],
    config: TrainConfig,
    out: Path,
    *,
    lm_head: Tensor | None = None,
    on_report: Callable[[Report], None] = lambda report: None,
) -> None:
    """Train ``drafter`` in place, continuing from ``out/state.pt`` where there is one.

    An update's gradient is the mean over the predictions of all its parts, however many each of them has. Under
    ``torch.distributed`` each process takes every world_size-th part: the same as one process with all of them.
    Raises :class:`NonFiniteLossError`, :class:`StateError`, and :class:`OSError` when the state cannot be saved.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert config.parts % world == 0, "every process needs the same number of parts"
    # Fused: the default on CUDA makes temporaries as large as the whole head.
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    start = _resume(drafter, optimizer, out, config)
    if rank == 0:
        _truncate(out / METRICS_FILE, start)
    saved, saving = time.monotonic(), 0.0
    for update in range(start, config.updates):
        rate = learning_rate(config, update)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        losses = [
            _backward(drafter, batch_of(update, part), config, lm_head) for part in range(rank, config.parts, world)
        ]
        _mean_gradients(drafter, losses, world)
        report = _report(update, rate, losses, world)
        if not math.isfinite(report.loss):
            raise NonFiniteLossError(f"the loss is {report.loss} at update {update + 1}")
        length = float(torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip))
        if not math.isfinite(length):
            raise NonFiniteLossError(f"the gradient is {length} at update {update + 1}")
        optimizer.step()
        last = update + 1 == config.updates
        if rank == 0 and ((update + 1) % config.report_every == 0 or last):
            _append(out / METRICS_FILE, report)
            on_report(report)
        began = time.monotonic()
        late = began - saved >= max(config.save_seconds, 20 * saving)
        if rank == 0 and ((update + 1) % config.save_every == 0 or late or last):
            _save(drafter, optimizer, out, config, update + 1)
            saved = time.monotonic()
            saving = saved - began


def saved_updates(out: Path) -> tuple[int, int] | None:
    """(updates done, updates in all) of the state in ``out``; None where there is none. The weights are not read.

    Raises :class:`StateError`.
    """
    state = _load(out / STATE_FILE, mmap=True)
    return None if state is None else (int(state["update"]), int(state["config"]["updates"]))


def _load(path: Path, *, mmap: bool = False) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not {"update", "config", "head", "drafter", "optimizer"} <= state.keys():
            raise ValueError("parts of it are missing")
    except Exception as problem:  # of a damaged archive torch raises almost anything
        raise StateError(f"{path} cannot be read: {str(problem).partition('. ')[0]}") from None
    return state


def _backward(drafter: Drafter, batch: DraftBatch, config: TrainConfig, lm_head: Tensor | None) -> DraftLoss:
    with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        return draft_loss(
            drafter,
            batch,
            depth_weights=config.depth_weights,
            objective=config.objective,
            lm_head=lm_head,
            chunk=config.chunk,
            backward=True,
        )


def _mean_gradients(drafter: Drafter, losses: list[DraftLoss], world: int) -> None:
    """From the processes' sums of gradients to the mean over all predictions of the update."""
    weight = _total([loss.weight for loss in losses], world).clamp_min(1e-6)
    for parameter in drafter.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world > 1:
            dist.all_reduce(parameter.grad)
        parameter.grad /= weight


def _total(values: list[Tensor], world: int) -> Tensor:
    """The sum over the parts of all processes."""
    total = torch.stack(values).sum(dim=0)
    if world > 1:
        dist.all_reduce(total)
    return total


def _report(update: int, rate: float, losses: list[DraftLoss], world: int) -> Report:
    count = _total([loss.count for loss in losses], world).clamp_min(1)
    weight = _total([loss.weight for loss in losses], world).clamp_min(1e-6)
    by_depth, top1, top5 = (
        _total([getattr(loss, name) * loss.count for loss in losses], world) / count
        for name in ("by_depth", "top1", "top5")
    )
    return Report(
        update=update + 1,
        loss=float(_total([loss.total * loss.weight for loss in losses], world) / weight),
        rate=rate,
        by_depth=tuple(by_depth.tolist()),
        top1=tuple(top1.tolist()),
        top5=tuple(top5.tolist()),
    )


def _append(path: Path, report: Report) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(report)) + "\n")


def _save(drafter: Drafter, optimizer: torch.optim.Optimizer, out: Path, config: TrainConfig, update: int) -> None:
    state = {
        "update": update,
        "config": asdict(config),
        "head": asdict(drafter.config),
        "drafter": drafter.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    aside = out / (STATE_FILE + ".tmp")
    try:
        with aside.open("wb") as stream:
            torch.save(state, stream)
            os.fsync(stream.fileno())
        os.replace(aside, out / STATE_FILE)
    except BaseException as problem:
        aside.unlink(missing_ok=True)
        if isinstance(problem.__context__, OSError):  # torch raises a RuntimeError about it
            raise problem.__context__ from None
        raise


def _resume(drafter: Drafter, optimizer: torch.optim.Optimizer, out: Path, config: TrainConfig) -> int:
    path = out / STATE_FILE
    state = _load(path)
    if state is None:
        return 0
    wanted = {"config": asdict(config), "head": asdict(drafter.config)}
    different = [
        f"{name}: {state[part].get(name)} there, {value} now"
        for part, settings in wanted.items()
        for name, value in settings.items()
        if state[part].get(name) != value and name not in ("save_every", "save_seconds", "report_every")
    ]
    if different:
        raise StateError(f"{path} belongs to a run with other settings: {'; '.join(different)}")
    drafter.load_state_dict(state["drafter"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["update"])


def _truncate(path: Path, update: int) -> None:
    """Drop reports of updates that are run again, and a torn last line. On a full disk the file stays as it is."""
    if not path.is_file():
        return
    there, kept = path.read_text(encoding="utf-8", errors="replace"), []
    for line in there.splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            break
    if (text := "".join(kept)) == there:
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
