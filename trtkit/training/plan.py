"""What a training of a draft head is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drafter.config import TreeShape
from drafter.loss import Objective

__all__ = ["TrainingPlan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What to train, on what, how long."""

    model: str
    data: str
    """``openmathreasoning`` or a file of rows."""
    own: bool = True
    """Train on the target's own answers to the rows' problems instead of the rows' solutions."""
    rows: int = 20_000
    split: str = "cot"
    held_out: float = 0.05
    variants: tuple[str, ...] = ("solve", "reason")
    start_from: str | None = None
    """A trained head to go on from; its shape is taken over."""
    exit_dim: int | None = None
    """None: twice the hidden size, as published."""
    layers: int = 2
    rnn: bool = True
    window: int = 2048
    tokens_per_part: int = 8192
    """Tokens that the target runs over for one batch."""
    parts: int = 1
    """Batches of one update, shared out over the processes."""
    epochs: float = 1.0
    rate: float = 1e-3
    objective: Objective = "ce"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the arithmetic; the weights stay float32."""
    depths: int = 4
    seed: int = 0
    max_tokens: int = 4096
    """Longest solution."""
    trees: tuple[TreeShape, ...] = (TreeShape(beams=1, length=3), TreeShape(beams=4, length=4))
    """Shapes to decode with at the end."""
