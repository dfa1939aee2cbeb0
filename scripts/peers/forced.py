"""Drafting without a trained head: a draft head of random weights, and the acceptance that a trained one would have.

Random weights accept no drafts, so the benchmark decides what is accepted; the steps are computed as always. What the
head drafts costs what a trained head's drafts cost: the same weights are read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file

from drafter.checkpoint import read_config, save_drafter
from drafter.config import TreeShape
from trtkit.bench.gpu_points import draft_bytes
from trtkit.bench.gpu_stages import DRAFT_VOCABULARY, PUBLISHED_ACCEPTANCE
from trtkit.bench.random_model import forced_acceptance, random_drafter
from trtkit.model_spec import read_model_spec
from trtkit.recipe import TOKEN_ORDER_FILE
from trtkit.runtime.draft_head import HeadOptions
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.staging import staged_dir

__all__ = ["TREE", "force_acceptance", "head_bytes", "head_options", "make_head"]

TREE = TreeShape(beams=1, length=len(PUBLISHED_ACCEPTANCE))


def make_head(model: Path, out: Path, *, seed: int = 0) -> None:
    """A random head of the published recipe's shape for the checkpoint ``model``; once.

    Its "most frequent" tokens are the first ones: which lines a trimmed head reads changes nothing.
    """
    if out.is_dir():
        return
    spec = read_model_spec(model)
    torch.manual_seed(seed)
    head = random_drafter(spec, device=torch.device("cpu"), dtype=torch.bfloat16)
    with staged_dir(out) as stage:
        save_drafter(head, stage, dtype=torch.bfloat16)
        save_file({"by_frequency": torch.arange(spec.vocab, dtype=torch.int32)}, stage / TOKEN_ORDER_FILE)


def head_options(*, trimmed: bool) -> HeadOptions:
    """The head as it is, or ``trimmed`` to the draft vocabulary that ``scripts/gpu_bench`` measures too."""
    return HeadOptions(vocabulary=DRAFT_VOCABULARY if trimmed else None)


def head_bytes(head: Path, options: HeadOptions) -> float:
    """Of the head's weights, what the drafts of one step read."""
    config = read_config(head)
    return draft_bytes(config, options.vocabulary or config.vocab_size, TREE.length)


def force_acceptance(engine: TorchEngine, vocab: int, *, seed: int) -> None:
    """From now on, accept by the published profile. ``seed`` decides which step accepts how much."""
    redraw = forced_acceptance(PUBLISHED_ACCEPTANCE, vocab, seed=seed)
    engine._stepper = dataclasses.replace(engine._stepper, redraw=redraw)
