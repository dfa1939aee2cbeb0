"""Token rows packed for a layer-by-layer pass: flat tokens, with attention inside each row only.

Letters: T tokens of a batch, H hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.decoder import Attend, Rope, causal_attention, rope_at
from trtkit.model_spec import ModelSpec

__all__ = ["TextRow", "TokenBatch", "pack_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One text as token ids; the first ``prompt_tokens`` are the question, the rest is what a model would write."""

    tokens: tuple[int, ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """A few rows, flat."""

    tokens: Tensor
    """int64 (T,)."""
    rows: tuple[TextRow, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.tokens) for row in self.rows]

    def rope(self, spec: ModelSpec, dtype: torch.dtype) -> Rope:
        """The rotation of every token; each row starts at position 0."""
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        return rope_at(spec, positions.to(self.tokens.device), dtype)

    def attend(self) -> Attend:
        """Causal attention within each row."""
        lengths = self.lengths

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pieces = zip(
                q.split_with_sizes(lengths),
                k.split_with_sizes(lengths),
                v.split_with_sizes(lengths),
                strict=True,
            )
            return torch.cat([causal_attention(*piece) for piece in pieces])

        return attend

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Positions whose next token is part of an answer, and those next tokens: both int64 (P,)."""
        positions: list[int] = []
        targets: list[int] = []
        start = 0
        for row in self.rows:
            first = max(row.prompt_tokens, 1)
            positions += range(start + first - 1, start + len(row.tokens) - 1)
            targets += row.tokens[first:]
            start += len(row.tokens)
        device = self.tokens.device
        return torch.tensor(positions, device=device, dtype=torch.long), torch.tensor(
            targets, device=device, dtype=torch.long
        )


def pack_rows(rows: Sequence[TextRow], device: torch.device, *, tokens: int = 2048) -> list[TokenBatch]:
    """Batches of about ``tokens`` tokens: the widest activation of a 14B layer is then 0.25 GB."""
    groups: list[list[TextRow]] = []
    size = 0
    for row in rows:
        if not row.tokens:
            continue
        if not groups or size + len(row.tokens) > tokens:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += len(row.tokens)
    return [
        TokenBatch(tokens=torch.tensor([t for row in group for t in row.tokens], device=device), rows=tuple(group))
        for group in groups
    ]
