"""The shapes of a draft head and of the trees it draws. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TreeShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """A beam search of ``beams`` beams that draws ``length`` tokens each, written ``BxL``."""

    beams: int
    length: int

    def __str__(self) -> str:
        return f"{self.beams}x{self.length}"

    @property
    def max_nodes(self) -> int:
        """Nodes that verification sees at most: the root and every drafted token."""
        return 1 + self.beams * self.length
