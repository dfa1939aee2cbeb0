"""Engines on tiny checkpoints, as ``open_engine`` makes them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny
from trtkit.recipe import EngineManifest, Limits, Recipe, write_manifest
from trtkit.runtime.api import Engine, FinishReason, Request, SamplingParams


def tiny_engine_dir(
    directory: Path, family: str = "qwen2", *, recipe: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A tiny checkpoint saved by transformers, with the engine.json of an unquantized engine beside it."""
    save_tiny(directory, family, **changes)
    limits = Limits(batch=16, prompt_tokens=200, total_tokens=256)
    manifest = EngineManifest(
        recipe=Recipe(model="tiny", **{"precision": "bf16", "limits": limits, **(recipe or {})}),
        backend="torch",
        versions={},
        checkpoint_digest={},
        quality=None,
        created="2026-01-01T00:00:00Z",
    )
    write_manifest(directory, manifest)
    return directory


def random_prompts(seed: int, lengths: Iterable[int], vocab: int = 320) -> list[tuple[int, ...]]:
    """Prompts of the given lengths."""
    source = random.Random(seed)
    return [tuple(source.randrange(vocab) for _ in range(length)) for length in lengths]


def request(name: str, prompt: tuple[int, ...], *, seed: int = 0, max_tokens: int = 20, stop_ids: tuple[int, ...] = (),
            **sampling: Any) -> Request:  # fmt: skip
    """A request with sampling parameters as keywords."""
    return Request(id=name, prompt=prompt, sampling=SamplingParams(**sampling), stop_ids=stop_ids,
                   max_tokens=max_tokens, seed=seed)  # fmt: skip


def mixed_requests(seed: int, vocab: int) -> list[Request]:
    """Ten of three prompts: every kind of sampling, budgets and stop ids that end them at different places."""
    prompts = random_prompts(seed, [1, 9, 33], vocab=vocab)
    sampling: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 5, "min_p": 0.05},
    ]
    return [
        request(str(i), prompts[i % 3], seed=seed + i, max_tokens=1 + 9 * (i % 4), stop_ids=(3,) if i % 2 else (),
                **sampling[(i + i // 4) % 4])
        for i in range(10)
    ]  # fmt: skip


def run_all(
    engine: Engine, requests: Iterable[Request], *, arrivals_per_step: int | None = None
) -> tuple[dict[str, list[int]], dict[str, FinishReason]]:
    """Run requests to their end; with ``arrivals_per_step`` they are submitted a few at a time."""
    queue = list(requests)
    tokens: dict[str, list[int]] = {r.id: [] for r in queue}
    finish: dict[str, FinishReason] = {}
    while queue or engine.has_work:
        count = len(queue) if arrivals_per_step is None else arrivals_per_step
        for arrived in queue[:count]:
            engine.submit(arrived)
        queue = queue[count:]
        for output in engine.step():
            assert output.request_id not in finish, "output after the end"
            tokens[output.request_id] += output.tokens
            if output.finish is not None:
                finish[output.request_id] = output.finish
    assert finish.keys() == tokens.keys()
    return tokens, finish
