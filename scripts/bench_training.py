"""Draft-head training beside the plain loop that the published recipe uses: tokens per second and peak memory.

Both train the same head on the same rows with the same target and arithmetic. The plain loop pads rows to the longest
of its batch, scores the prompt too, and holds the logits of all depths, (L, B, T, V), at once. Each variant runs in a
process of its own, several times in turns; the last line is one JSON document.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from drafter.config import DrafterConfig
from drafter.data import Sample, pack, windows
from drafter.loss import draft_loss
from drafter.model import Drafter
from trtkit.bundled import practice_dir
from trtkit.chat import VARIANTS, load_chat
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime.model import DecoderModel
from trtkit.training.rows import read_rows
from trtkit.training.target import draft_batch, written_answers

DEPTHS = 4
CPU = torch.device("cpu")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def plain_loss(head: Drafter, hidden: Tensor, embeddings: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """hidden and embeddings (B, T, H), tokens (B, T), real bool (B, T): the multi-step loss, all logits at once."""
    state = torch.zeros_like(hidden)
    logits, goals, valid = [], [], []
    for depth in range(1, DEPTHS + 1):
        state = head.next_state(state, embeddings.roll(-depth, dims=1))
        logits.append(head.output(head.features(hidden, state)))
        goals.append(tokens.roll(-depth - 1, dims=1))
        inside = real.roll(-depth - 1, dims=1).clone()
        inside[:, -depth - 1 :] = False
        valid.append(inside)
    every = torch.stack(logits).float()  # (L, B, T, V)
    losses = F.cross_entropy(every.flatten(0, 2), torch.stack(goals).flatten(), reduction="none")
    mask = torch.stack(valid).flatten()
    return (losses * mask).sum() / mask.sum()


def padded(model: DecoderModel, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One batch of the plain loop."""
    width = max(len(sample.tokens) for sample in samples)
    tokens, real = torch.zeros(len(samples), width, dtype=torch.int64), torch.zeros(len(samples), width).bool()
    for line, sample in enumerate(samples):
        tokens[line, : len(sample.tokens)] = torch.tensor(sample.tokens)
        real[line, : len(sample.tokens)] = True
    rows = [Sample(problem="", tokens=tuple(line), prompt=0) for line in tokens.tolist()]
    batch = draft_batch(model, windows(rows, width, seed=0, epoch=0))
    shape = (len(samples), width, -1)
    return batch.hidden.view(shape), batch.embeddings.view(shape), batch.tokens.view(shape[:2]), real


@app.command()
def one(variant: str, batch_tokens: int, updates: int, vocab: int) -> None:
    """One variant in this process (called by `all`)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    directory = practice_dir()
    chat, checkpoint = load_chat(directory), open_unified(directory)
    model = DecoderModel(checkpoint, device=CPU, dtype=torch.bfloat16, max_tokens=2112)
    rows = read_rows(str(directory / "calibration.jsonl"), count=1000)
    samples = written_answers(rows, chat, [VARIANTS["solve"]], max_tokens=2048)
    head = Drafter(DrafterConfig(hidden_size=model.spec.hidden, vocab_size=vocab, exit_dim=2 * model.spec.hidden))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    groups = list(pack(windows(samples, 2048, seed=0, epoch=0), batch_tokens))
    before, trained, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, []
    for update in range(updates + 1):
        group = groups[update % len(groups)]
        begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if variant == "plain":
                loss = plain_loss(head, *padded(model, [window.sample for window in group]))
            else:
                ours = draft_loss(head, draft_batch(model, group), depth_weights=[1.0] * DEPTHS, backward=True)
        if variant == "plain":
            loss.backward()
        else:
            for parameter in head.parameters():
                parameter.grad = parameter.grad / ours.weight
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if update:  # the first one warms up
            seconds.append(time.perf_counter() - begin)
            trained += sum(len(window.sample.tokens) - window.sample.prompt for window in group)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"tokens_per_second": trained / sum(seconds), "peak_bytes": 1024 * peak}))


@app.command(name="all")
def compare(
    batch_tokens: Annotated[int, typer.Option(help="tokens per update")] = 4096,
    updates: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    vocab: Annotated[list[int] | None, typer.Option(help="vocabulary of the head; repeatable")] = None,
) -> None:
    """Both variants in turns, at the practice model's vocabulary and at a real one."""
    document: list[dict[str, Any]] = []
    print("| vocabulary | variant | completion tokens/s | peak above the loaded model |\n|---|---|---|---|")
    for size in vocab or [512, 32_768]:
        found: dict[str, list[dict[str, float]]] = {"plain": [], "trtkit": []}
        for _ in range(rounds):
            for variant, results in found.items():
                command = [
                    sys.executable,
                    str(Path(__file__)),
                    "one",
                    variant,
                    str(batch_tokens),
                    str(updates),
                    str(size),
                ]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout))
        for variant, results in found.items():
            speed = statistics.median(result["tokens_per_second"] for result in results)
            peak = statistics.median(result["peak_bytes"] for result in results)
            document.append({"vocab": size, "variant": variant, "tokens_per_second": speed, "peak_bytes": peak})
            print(f"| {size:,} | {variant} | {speed:,.0f} | {peak / 1e6:,.0f} MB |")
    print(json.dumps(document))


if __name__ == "__main__":
    app()
