"""The training loop: bf16 forward and backward, fp32 master weights, Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from practice.batches import IGNORED, Batch, BatchSource, Mix, continued_mix
from practice.checkpoint import ATTENTION, export, model_config
from practice.tokenizer import load_tokenizer

FIRST_EXPORT = 100
PROJECTION_SPREAD, EMBEDDING_SPREAD = 0.05, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One training run, fixed at its start."""

    updates: int
    tokens_per_update: int = 1536
    seed: int = 1
    muon_rate: float = 0.004
    adam_rate: float = 0.002
    embedding_rate: float = 0.01
    continued: bool = False  # from trained weights: the full mix at once, no drills
    warmup_updates: int = 50
    decay_share: float = 0.6
    weight_decay: float = 0.2
    average_decay: float = 0.998
    save_every: int = 250
    export_every: int = 1500

    def rate_at(self, update: int) -> float:
        """Warm up, hold, then fall linearly to zero."""
        decay_updates = max(1.0, self.decay_share * self.updates)
        return min(1.0, (update + 1) / self.warmup_updates, (self.updates - update) / decay_updates)


def completion_loss(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the completion tokens; the head runs on those positions only."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state  # (R, T, H)
    wanted = batch.targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), batch.targets[wanted])


class Trainer:
    """Weights, optimizers and the place in the run."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.update, self.tokens_seen, self.seconds = plan, 0, 0, 0.0
        reference = Qwen2ForCausalLM(model_config())
        with torch.no_grad():
            for name, weight in reference.named_parameters():
                if name.endswith("proj.weight"):
                    weight.normal_(0.0, PROJECTION_SPREAD)
            reference.model.embed_tokens.weight.normal_(0.0, EMBEDDING_SPREAD)
        self.master = {name: weight.detach().clone() for name, weight in reference.named_parameters()}
        self.average = {name: weight.clone() for name, weight in self.master.items()}
        reference.set_attn_implementation(ATTENTION)
        self.model = reference.bfloat16().train()
        matrices = [w for name, w in self.master.items() if name.endswith("proj.weight")]
        embedding, head = self.master["model.embed_tokens.weight"], self.master["lm_head.weight"]
        vectors = [w for w in self.master.values() if w.ndim == 1]
        decay = plan.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [embedding], "lr": plan.embedding_rate},
            {"params": [head]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=plan.muon_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                groups,
                lr=plan.adam_rate,
                weight_decay=0.01,
                betas=(0.9, 0.98),
            ),
        ]
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, batch: Batch) -> float:
        """One update; returns the loss before it."""
        loss = completion_loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        shadow = dict(self.model.named_parameters())
        for name, weight in self.master.items():
            gradient = shadow[name].grad
            assert gradient is not None
            weight.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * self.plan.rate_at(self.update)
            optimizer.step()
        self.model.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_([shadow[name] for name in self.master], list(self.master.values()))
            share = 1.0 - min(self.plan.average_decay, self.update / (self.update + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.master.values()), share)
        self.update += 1
        self.tokens_seen += batch.inputs.numel()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "plan": asdict(self.plan),
            "update": self.update,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "master": self.master,
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_weights(self, weights: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None = None) -> None:
        """Start from these weights; the running average starts there too unless it is given."""
        with torch.no_grad():
            for name, weight in self.master.items():
                weight.copy_(weights[name])
                self.average[name].copy_((average or weights)[name])
            for name, shadow in self.model.named_parameters():
                shadow.copy_(self.master[name])

    def load(self, state: dict[str, Any]) -> None:
        """Continue a run."""
        self.load_weights(state["master"], state["average"])
        self.update, self.tokens_seen, self.seconds = state["update"], state["tokens_seen"], state["seconds"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def weights_at(path: Path) -> dict[str, torch.Tensor]:
    """Weights to start from: a checkpoint folder's, or the averaged ones of a run's state."""
    if path.is_dir():
        return load_file(path / "model.safetensors")
    averaged: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["average"]
    return averaged


def save_state(trainer: Trainer, path: Path) -> None:
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".part")
    torch.save(trainer.state(), aside)
    os.replace(aside, path)


def train(plan: Plan, work: Path, tokenizer_folder: Path, out: Path, start_from: Path | None = None) -> None:
    """Run the plan to its end, from the last saved state if there is one."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        plan = Plan(**state["plan"])
        trainer = Trainer(plan)
        trainer.load(state)
        print(f"resumed at update {trainer.update} of {plan.updates}", flush=True)
    else:
        trainer = Trainer(plan)
        if start_from is not None:
            trainer.load_weights(weights_at(start_from))
    mix_of = continued_mix if plan.continued else Mix
    mix = mix_of(seed=plan.seed, tokens_per_update=plan.tokens_per_update, total_updates=plan.updates)
    source = BatchSource(load_tokenizer(tokenizer_folder), mix)
    recent: list[float] = []
    clock = time.perf_counter()
    while trainer.update < plan.updates:
        recent.append(trainer.step(source.batch_at(trainer.update)))
        now = time.perf_counter()
        trainer.seconds, clock = trainer.seconds + now - clock, now
        if trainer.update % 50 == 0:
            report(trainer, recent, work / "log.jsonl")
            recent.clear()
        if trainer.update % plan.save_every == 0 or trainer.update == plan.updates:
            save_state(trainer, saved)
        if trainer.update % plan.export_every == 0 or trainer.update in (FIRST_EXPORT, plan.updates):
            export(trainer.average if trainer.update < plan.updates else trainer.master, tokenizer_folder, out)
    print(f"done: {trainer.update} updates, {trainer.tokens_seen} tokens, {trainer.seconds:.0f} s", flush=True)


def report(trainer: Trainer, recent: list[float], log: Path) -> None:
    """One line on the terminal and in the log."""
    row = {
        "update": trainer.update,
        "loss": round(sum(recent) / len(recent), 4),
        "rate": round(trainer.plan.rate_at(trainer.update), 4),
        "tokens": trainer.tokens_seen,
        "seconds": round(trainer.seconds, 1),
    }
    with log.open("a") as sink:
        sink.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
