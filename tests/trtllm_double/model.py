"""A tiny checkpoint with everything that a TensorRT-LLM build asks for, and engines of both backends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.chat_files import save_chat_files
from tests.tiny import save_tiny
from trtkit.build.bundle import Sources
from trtkit.recipe import Limits, Recipe

EOS = 258
"""``<|im_end|>`` of the tiny tokenizer."""
LIMITS = Limits(batch=8, prompt_tokens=128, total_tokens=256)


def save_model(directory: Path, family: str = "qwen2", **changes: Any) -> Path:
    """A bf16 checkpoint with tokenizer and chat template; vocabulary 320."""
    save_tiny(directory, family, dtype=torch.bfloat16, eos_token_id=EOS, **changes)
    save_chat_files(directory)
    return directory


def save_head(directory: Path, *, vocab: int = 320) -> Path:
    """A random draft head for it."""
    directory.mkdir(parents=True)
    torch.manual_seed(1)
    head = Drafter(DrafterConfig(hidden_size=256, vocab_size=vocab, exit_dim=512))
    save_drafter(head, directory, dtype=torch.bfloat16)
    return directory


def make_recipe(model: Path, *, gpu: str = "l4", ranks: int = 1, tree: str = "", **changes: Any) -> Recipe:
    """A tensorrt-llm recipe for the checkpoint; ``tree`` as BEAMSxLENGTH."""
    shape = None
    if tree:
        beams, length = (int(number) for number in tree.split("x"))
        shape = TreeShape(beams=beams, length=length)
    given = {"precision": "bf16", "limits": LIMITS, **changes}
    return Recipe(
        model=str(model), gpu=gpu if ranks == 1 else f"{gpu}x{ranks}", backend="tensorrt-llm", tensor_parallel=ranks,
        tree=shape, **given,
    )  # fmt: skip


def sources(drafter: Path | None = None) -> Sources:
    return Sources(drafter=drafter, device="cpu")
