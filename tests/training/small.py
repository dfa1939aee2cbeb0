"""A training that takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chat_files import save_chat_files, save_problems
from tests.tiny import save_tiny
from trtkit.training import run


def small_training(directory: Path, problems: int, **more: Any) -> tuple[Path, run.TrainingPlan]:
    """A tiny model with its problems, and how to train a head of it on them."""
    save_tiny(directory / "model", max_position_embeddings=160)
    save_chat_files(directory / "model")
    rows = save_problems(directory / "rows.jsonl", problems)
    plan = run.TrainingPlan(
        model=str(directory / "model"), data=str(rows), held_out=0.3, exit_dim=8, layers=0, depths=2, **more
    )
    return rows, plan
