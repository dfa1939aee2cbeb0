"""The training loop: AdamW, warm-up and cosine, gradient accumulation, resume, several processes.

The loop knows nothing of text or of the target model: ``batch_of(update, part)`` hands it tensors, and must give the
same ones whenever it is asked for the same numbers. Then the state on disk is the head, the optimizer and a number, and
a killed run continues to the same weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from drafter.loss import DraftBatch, DraftLoss, Objective, draft_loss
from drafter.model import Drafter

__all__ = ["NonFiniteLossError", "Report", "TrainConfig", "learning_rate", "train"]

STATE_FILE = "state.pt"
METRICS_FILE = "metrics.jsonl"


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN. The last saved state is good."""


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

    Under ``torch.distributed`` each process takes every world_size-th part of an update, and gradients are averaged:
    the same as one process with all parts. Raises :class:`NonFiniteLossError`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    assert config.parts % world == 0, "every process needs the same number of parts"
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    start = _resume(drafter, optimizer, out, config)
    for update in range(start, config.updates):
        rate = learning_rate(config, update)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        losses = [
            _backward(drafter, batch_of(update, part), config, lm_head) for part in range(rank, config.parts, world)
        ]
        _average_gradients(drafter, world)
        report = _report(update, rate, losses, world)
        if not math.isfinite(report.loss):
            raise NonFiniteLossError(f"the loss is {report.loss} at update {update + 1}")
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip)
        optimizer.step()
        last = update + 1 == config.updates
        if rank == 0 and ((update + 1) % config.report_every == 0 or last):
            _append(out / METRICS_FILE, report)
            on_report(report)
        if rank == 0 and ((update + 1) % config.save_every == 0 or last):
            _save(drafter, optimizer, out, config, update + 1)


def _backward(drafter: Drafter, batch: DraftBatch, config: TrainConfig, lm_head: Tensor | None) -> DraftLoss:
    with torch.autocast(batch.hidden.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        loss = draft_loss(
            drafter,
            batch,
            depth_weights=config.depth_weights,
            objective=config.objective,
            lm_head=lm_head,
            chunk=config.chunk,
        )
    (loss.total / config.parts).backward()  # type: ignore[no-untyped-call]
    return loss


def _average_gradients(drafter: Drafter, world: int) -> None:
    if world == 1:
        return
    for parameter in drafter.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        # Each process has already divided by the total number of parts: the sum is the mean.
        dist.all_reduce(parameter.grad)


def _report(update: int, rate: float, losses: list[DraftLoss], world: int) -> Report:
    columns = [
        torch.stack([getattr(loss, name).detach() for loss in losses]).mean(dim=0)
        for name in ("total", "by_depth", "top1", "top5")
    ]
    if world > 1:
        for column in columns:
            dist.all_reduce(column)
            column /= world
    total, by_depth, top1, top5 = columns
    return Report(
        update=update + 1,
        loss=float(total),
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
    torch.save(state, aside)
    os.replace(aside, out / STATE_FILE)


def _resume(drafter: Drafter, optimizer: torch.optim.Optimizer, out: Path, config: TrainConfig) -> int:
    path = out / STATE_FILE
    if not path.is_file():
        return 0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    wanted = {"config": asdict(config), "head": asdict(drafter.config)}
    different = [
        f"{name}: {state[part].get(name)} there, {value} now"
        for part, settings in wanted.items()
        for name, value in settings.items()
        if state[part].get(name) != value and name not in ("save_every", "report_every")
    ]
    if different:
        raise ValueError(f"{path} belongs to a run with other settings: {'; '.join(different)}")
    drafter.load_state_dict(state["drafter"])
    optimizer.load_state_dict(state["optimizer"])
    done = int(state["update"])
    _truncate(out / METRICS_FILE, done)
    return done


def _truncate(path: Path, update: int) -> None:
    """Drop reports of updates that are run again, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["update"] <= update:
                kept.append(line + "\n")
        except ValueError:
            break
    path.write_text("".join(kept), encoding="utf-8")
