"""Accuracy of an exported checkpoint on held-out problems: greedy, pass@1 at temperature 1, majority of k samples."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen2ForCausalLM

from practice.problems import PROMPT_KINDS, render_prompt
from practice.tokenizer import id_of

BOXED = re.compile(r"\\boxed\{(\d+)\}")
ROWS_AT_ONCE = 128
MAX_NEW_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of one group of problems."""

    problems: int
    greedy: float
    pass_at_1: float
    majority: float
    unfinished: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample asked for."""

    problem: int
    prompt: list[int]


def answer_of(text: str) -> str | None:
    """The last boxed integer."""
    found = BOXED.findall(text)
    return found[-1] if found else None


def majority_of(votes: Iterable[str | None]) -> str | None:
    """The most frequent answer; of equals the one seen first."""
    tally = Counter(vote for vote in votes if vote is not None)
    return tally.most_common(1)[0][0] if tally else None


@torch.inference_mode()
def generate(
    model: Qwen2ForCausalLM,
    prompts: Sequence[list[int]],
    *,
    stop_ids: set[int],
    pad_id: int,
    temperature: float,
    rng: torch.Generator,
) -> list[list[int]]:
    """New tokens of each prompt, one batch; rows leave it as they finish."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    alive = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(MAX_NEW_TOKENS):
        logits = (
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )
        picks = logits.argmax(-1) if temperature == 0 else _draw(logits / temperature, rng)
        for row, token in zip(alive, picks.tolist(), strict=True):
            written[row].append(token)
        keep = torch.tensor([place for place, token in enumerate(picks.tolist()) if token not in stop_ids])
        if not len(keep):
            break
        if len(keep) < len(alive):
            alive = [alive[place] for place in keep.tolist()]
            cache.batch_select_indices(keep)
            mask, positions, picks = mask[keep], positions[keep], picks[keep]
        ids, positions = picks[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return written


def _draw(logits: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=rng)[:, 0]


def answers_for(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, rows: Sequence[Row], *, temperature: float, seed: int
) -> list[str | None]:
    """The answer of every row; rows of like length run together."""
    stop_ids = {id_of(tokenizer, token) for token in ("</think>", "<|im_end|>", "<|endoftext|>")}
    pad_id = id_of(tokenizer, "<|endoftext|>")
    rng = torch.Generator().manual_seed(seed)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt))
    answers: list[str | None] = [None] * len(rows)
    for start in range(0, len(order), ROWS_AT_ONCE):
        chunk = order[start : start + ROWS_AT_ONCE]
        prompts = [rows[index].prompt for index in chunk]
        written = generate(model, prompts, stop_ids=stop_ids, pad_id=pad_id, temperature=temperature, rng=rng)
        for index, tokens in zip(chunk, written, strict=True):
            answers[index] = answer_of(tokenizer.decode(tokens, skip_special_tokens=False))
    return answers


def evaluate(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[dict[str, str]],
    *,
    samples: int,
    seed: int,
) -> dict[str, Score]:
    """Scores per family, and under "all". The samples of a problem take the prompt variants in turn."""
    greedy_rows = [_row(tokenizer, index, item, PROMPT_KINDS[0]) for index, item in enumerate(problems)]
    greedy = answers_for(model, tokenizer, greedy_rows, temperature=0.0, seed=seed)
    rows = [
        _row(tokenizer, index, item, PROMPT_KINDS[number % len(PROMPT_KINDS)])
        for index, item in enumerate(problems)
        for number in range(samples)
    ]
    drawn = answers_for(model, tokenizer, rows, temperature=1.0, seed=seed)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(problems):
        groups[item["family"]].append(index)
        groups["all"].append(index)
    right = [item["answer"] for item in problems]
    votes = [drawn[index * samples : (index + 1) * samples] for index in range(len(problems))]
    return {
        name: Score(
            problems=len(members),
            greedy=sum(greedy[i] == right[i] for i in members) / len(members),
            pass_at_1=sum(vote == right[i] for i in members for vote in votes[i]) / (len(members) * samples),
            majority=sum(majority_of(votes[i]) == right[i] for i in members) / len(members),
            unfinished=sum(vote is None for i in members for vote in votes[i]) / (len(members) * samples),
        )
        for name, members in sorted(groups.items())
    }


def _row(tokenizer: Tokenizer, index: int, item: dict[str, str], kind: str) -> Row:
    return Row(problem=index, prompt=tokenizer.encode(render_prompt(item["problem"], kind)).ids)
