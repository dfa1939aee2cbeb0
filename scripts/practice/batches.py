"""Training batches as a pure function of (seed, step): nothing to store, nothing to lose on a restart."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from practice.problems import PROMPT_KINDS, render_completion, render_prompt, stream
from practice.tokenizer import id_of

BLOCK_UPDATES = 32
ROUND_LENGTH = 8
IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the training text is made of."""

    seed: int
    tokens_per_update: int
    total_updates: int
    easy_until: float = 0.35
    full_from: float = 0.7
    early_levels: tuple[float, ...] = (0.75, 0.2, 0.05)
    late_levels: tuple[float, ...] = (0.5, 0.3, 0.2)
    drills_only_until: float = 0.06
    drills_gone_from: float = 0.5

    def levels_at(self, update: int) -> tuple[float, ...]:
        """Easy problems first, then the full mix."""
        done = update / self.total_updates
        ready = min(1.0, max(0.0, done - self.easy_until) / (self.full_from - self.easy_until))
        return tuple(
            early + ready * (late - early) for early, late in zip(self.early_levels, self.late_levels, strict=True)
        )

    def drills_at(self, update: int) -> float:
        """Share of copy drills: everything at first, then a third that falls linearly to nothing."""
        done = update / self.total_updates
        if done < self.drills_only_until:
            return 1.0
        return 0.35 * max(0.0, 1.0 - done / self.drills_gone_from)


def continued_mix(*, seed: int, tokens_per_update: int, total_updates: int) -> Mix:
    """The mix of a run that starts from trained weights: harder problems throughout."""
    levels = (0.3, 0.35, 0.35)
    return Mix(
        seed=seed,
        tokens_per_update=tokens_per_update,
        total_updates=total_updates,
        early_levels=levels,
        late_levels=levels,
        drills_only_until=0.0,
        drills_gone_from=1e-9,
    )


def copy_drill(rng: Random, text: str) -> tuple[str, str]:
    """A short text and its repetition: a list of numbers, or a problem.

    Copying a number digit by digit from far away is what a small model learns last; these rows teach it first.
    """
    if rng.random() < 0.7:
        text = ", ".join(str(rng.randint(1, 10 ** rng.randint(1, 3) - 1)) for _ in range(rng.randint(2, 8)))
    return f"{text}\n", f"{text}<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids (R, T), and for each position the token to predict or IGNORED."""

    inputs: torch.Tensor
    targets: torch.Tensor


def tokenized(tokenizer: Tokenizer, rng: Random, mix: Mix, update: int, budget: int) -> list[tuple[list[int], int]]:
    """(ids, prompt length) of fresh problems, about `budget` tokens in all."""
    problems = stream(rng, "train", level_weights=mix.levels_at(update))
    drills = mix.drills_at(update)
    rows: list[tuple[list[int], int]] = []
    spent = 0
    while spent < budget:
        if rng.random() < drills:
            prompt_text, completion_text = copy_drill(rng, next(problems).text)
        else:
            problem = next(problems)
            prompt_text = render_prompt(problem.text, rng.choice(PROMPT_KINDS))
            completion_text = render_completion(problem)
        prompt = tokenizer.encode(prompt_text).ids
        completion = tokenizer.encode(completion_text).ids
        rows.append((prompt + completion, len(prompt)))
        spent += len(prompt) + len(completion)
    return rows


def pack(rows: list[tuple[list[int], int]], pad_id: int, tokens_per_update: int) -> list[Batch]:
    """Neighbours in length share a batch, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    groups: list[list[tuple[list[int], int]]] = [[]]
    for row in rows:
        if groups[-1] and len(row[0]) * (len(groups[-1]) + 1) > tokens_per_update:
            groups.append([])
        groups[-1].append(row)
    return [_batch(group, pad_id) for group in groups]


def _batch(group: list[tuple[list[int], int]], pad_id: int) -> Batch:
    longest = max(len(ids) for ids, _ in group) - 1
    width = -(-longest // ROUND_LENGTH) * ROUND_LENGTH
    inputs = torch.full((len(group), width), pad_id)
    targets = torch.full((len(group), width), IGNORED)
    for index, (ids, prompt) in enumerate(group):
        inputs[index, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[index, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
    return Batch(inputs=inputs, targets=targets)


class BatchSource:
    """`batch_at(update)`; keeps the current block of batches."""

    def __init__(self, tokenizer: Tokenizer, mix: Mix) -> None:
        self.tokenizer, self.mix = tokenizer, mix
        self.pad_id = id_of(tokenizer, "<|endoftext|>")
        self._block, self._batches = -1, list[Batch]()

    def batch_at(self, update: int) -> Batch:
        """The batch of one update."""
        block, place = divmod(update, BLOCK_UPDATES)
        if block != self._block:
            rng = Random(f"train-{self.mix.seed}-{block}")
            budget = int(1.02 * BLOCK_UPDATES * self.mix.tokens_per_update)
            rows = tokenized(self.tokenizer, rng, self.mix, update, budget)
            batches = pack(rows, self.pad_id, self.mix.tokens_per_update)
            rng.shuffle(batches)
            assert len(batches) >= BLOCK_UPDATES
            self._block, self._batches = block, batches
        return self._batches[place]
