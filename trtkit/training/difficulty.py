"""Fit a difficulty regressor: problem text -> log tokens, measured on problems that it has not seen.

out/config.json, model.safetensors, tokenizer files    the network, as transformers saves it
out/difficulty.json                                    units, settings, held-out error
out/metrics.jsonl                                      loss along the way
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import correlation, fmean, pstdev

import torch

from trtkit.checkpoint.hf import resolve_source
from trtkit.difficulty import HeldOut, Labelled, Regressor, Units, load_network
from trtkit.errors import HubError, InputError, QualityError
from trtkit.files import append_jsonl, read_jsonl
from trtkit.log import Progress
from trtkit.staging import staged_dir

__all__ = ["DifficultyPlan", "DifficultyReport", "merge_labels", "read_labels", "train_difficulty"]

METRICS_FILE = "metrics.jsonl"
_LEAST_PROBLEMS = 16
_LEAST_HELD_OUT = 4
_WARM_UP = 0.1
_REPORT_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DifficultyPlan:
    """What to fit and for how long. Batch, length and share of warm-up follow the published token scheduler."""

    model: str = "answerdotai/ModernBERT-base"
    epochs: float = 3.0
    batch: int = 32
    rate: float = 5e-5
    max_tokens: int = 256
    """Tokens of a problem that the network sees."""
    held_out: float = 0.2
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DifficultyReport:
    """What came out."""

    problems: int
    samples: int
    updates: int
    held_out: HeldOut

    @property
    def usable(self) -> bool:
        """Whether solving may use it."""
        return self.held_out.usable


def read_labels(path: Path) -> list[Labelled]:
    """Rows ``{"problem": text, "tokens": number}`` of a JSONL file.

    Raises :class:`InputError` with every row that is wrong.
    """
    labels: list[Labelled] = []
    offenders: list[str] = []
    for line, row in read_jsonl(path):
        text, tokens = row.get("problem"), row.get("tokens")
        if not isinstance(text, str) or not text.strip():
            offenders.append(f"{path}:{line}: problem must be text, and not empty")
        elif isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not 0 < tokens < math.inf:
            offenders.append(f"{path}:{line}: tokens must be a positive number, found {tokens!r:.40}")
        else:
            labels.append(Labelled(problem=text, tokens=float(tokens)))
    if offenders:
        raise InputError(
            f"{len(offenders)} row(s) that say nothing about difficulty",
            where=str(path),
            offenders=offenders[:20],
            hint='every line must be like {"problem": "...", "tokens": 8123}, or pass a run directory',
        )
    return labels


def merge_labels(labels: Sequence[Labelled]) -> list[Labelled]:
    """One label for each problem text: the mean over all its samples."""
    merged: dict[str, Labelled] = {}
    for label in labels:
        there = merged.get(label.problem)
        if there is not None:
            count = there.samples + label.samples
            mean = (there.tokens * there.samples + label.tokens * label.samples) / count
            label = replace(label, tokens=mean, samples=count)
        merged[label.problem] = label
    return list(merged.values())


def train_difficulty(
    plan: DifficultyPlan, labels: Sequence[Labelled], out: Path, *, device: torch.device, replace_out: bool = False
) -> DifficultyReport:
    """Fit, measure on held-out problems, and save: also when it is not usable, which ``difficulty.json`` then says.

    The same plan and labels give the same network on the same machine. Raises :class:`InputError` for too few
    problems, :class:`QualityError` when the loss is not finite, :class:`OutputError` when ``out`` exists.
    """
    labels = merge_labels(labels)
    kept, held = split(labels, plan.held_out, plan.seed)
    logs = [math.log(label.tokens) for label in kept]
    if pstdev(logs) == 0:
        raise InputError("all problems took the same number of tokens: there is nothing to learn")
    units = Units(centre=fmean(logs), spread=pstdev(logs))
    directory = _source(plan.model)
    gpus = [device] if device.type == "cuda" else []  # else all are set up, those of other processes too
    with staged_dir(out, replace=replace_out) as stage, torch.random.fork_rng(gpus):
        torch.manual_seed(plan.seed)  # the new output layer, and dropout where the model has some
        network, tokenizer = load_network(directory)
        regressor = Regressor(network.to(device), tokenizer, units, max_tokens=plan.max_tokens)
        updates = _fit(plan, regressor, kept, stage / METRICS_FILE)
        outputs = regressor.outputs([label.problem for label in held])
        _finite(fmean(outputs), updates)  # the last update's own loss is not seen
        regressor.units = units = _calibrated(units, held, outputs)
        report = DifficultyReport(
            problems=len(labels), samples=sum(label.samples for label in labels), updates=updates,
            held_out=_held_out(units, held, outputs, kept),
        )  # fmt: skip
        facts = {"plan": asdict(plan), "problems": len(labels), "samples": report.samples, "updates": updates}
        regressor.save(stage, report.held_out, facts)
    return report


def _source(model: str) -> Path:
    try:
        return resolve_source(model)
    except HubError as problem:
        hint = "download answerdotai/ModernBERT-base where there is a network, and pass its directory with --model DIR"
        raise HubError(problem.message, where=problem.where, hint=hint) from None


def split(labels: Sequence[Labelled], share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """(train, held out): a problem's side depends on its text and the seed, not on the order of the rows."""
    if len(labels) < _LEAST_PROBLEMS:
        raise InputError(
            f"{len(labels)} labelled problem(s) are too few", hint=f"at least {_LEAST_PROBLEMS}; hundreds are better"
        )
    count = min(max(round(share * len(labels)), _LEAST_HELD_OUT), len(labels) // 2)
    order = sorted(labels, key=lambda label: hashlib.sha256(f"{seed} {label.problem}".encode()).digest())
    return order[count:], order[:count]


def _fit(plan: DifficultyPlan, regressor: Regressor, kept: Sequence[Labelled], metrics: Path) -> int:
    """AdamW on the squared error, the rate rising over a tenth of the updates and falling on a cosine."""
    network = regressor.network.train()
    per_epoch = math.ceil(len(kept) / plan.batch)
    updates = max(1, round(plan.epochs * per_epoch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: _rate(update, updates))
    source = random.Random(plan.seed)
    order: list[Labelled] = []
    losses: list[float] = []
    with Progress("train", total=updates, unit="updates") as progress:
        for update in range(updates):
            if not order:
                order = source.sample(kept, len(kept))
            batch, order = order[: plan.batch], order[plan.batch :]
            wanted = torch.tensor([regressor.units.target(label.tokens) for label in batch], device=network.device)
            found = regressor.forward(regressor.encode([label.problem for label in batch]))
            loss = torch.nn.functional.mse_loss(found, wanted)
            losses.append(_finite(loss.item(), update))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent = fmean(losses[-_REPORT_EVERY:])
            if (update + 1) % _REPORT_EVERY == 0 or update + 1 == updates:
                append_jsonl(metrics, [{"update": update + 1, "loss": recent, "rate": schedule.get_last_lr()[0]}])
            progress.advance(note=f"loss {recent:.3f} (1 is the mean's)")
    return updates


def _rate(update: int, updates: int) -> float:
    warm = max(1, round(_WARM_UP * updates))
    if update < warm:
        return (update + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def _finite(loss: float, update: int) -> float:
    if not math.isfinite(loss):
        raise QualityError(f"the loss is {loss} at update {update + 1}", hint="lower --rate")
    return loss


def _calibrated(units: Units, held: Sequence[Labelled], outputs: Sequence[float]) -> Units:
    """``units`` with the factor that makes the guesses right on average."""
    guessed = sum(units.tokens(output) for output in outputs)
    return replace(units, factor=sum(label.tokens for label in held) / guessed)


def _held_out(units: Units, held: Sequence[Labelled], outputs: Sequence[float], kept: Sequence[Labelled]) -> HeldOut:
    logs = [math.log(label.tokens) for label in held]
    guesses = [units.centre + units.spread * output for output in outputs]
    gains = [(log - units.centre) ** 2 - (log - guess) ** 2 for log, guess in zip(logs, guesses, strict=True)]
    mean_tokens = fmean(label.tokens for label in kept)
    return HeldOut(
        problems=len(held),
        error=fmean((log - guess) ** 2 for log, guess in zip(logs, guesses, strict=True)),
        error_of_mean=fmean((log - units.centre) ** 2 for log in logs),
        gain_error=pstdev(gains) / math.sqrt(len(gains) - 1),
        rank_correlation=_rank_correlation(logs, guesses),
        off_by_tokens=math.sqrt(
            fmean((label.tokens - units.tokens(output)) ** 2 for label, output in zip(held, outputs, strict=True))
        ),
        mean_off_by_tokens=math.sqrt(fmean((label.tokens - mean_tokens) ** 2 for label in held)),
    )


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    if len(set(left)) == 1 or len(set(right)) == 1:
        return 0.0
    return correlation(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(values)
    return [(2 * order.index(value) + order.count(value) + 1) / 2 for value in values]
