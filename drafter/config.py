"""The shapes of a draft head and of the trees it draws. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DrafterConfig", "TreeShape"]


_MOST = {"hidden_size": 1 << 24, "vocab_size": 1 << 24, "exit_dim": 1 << 24, "num_draft_layers": 1 << 10}
"""No head is so large; a damaged file may say so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """A ReDrafter head: the public config.json keys of apple/ml-recurrent-drafter."""

    hidden_size: int
    """H: width of the target model's hidden states and embeddings."""
    vocab_size: int
    exit_dim: int
    """Width of the residual blocks and of the output layer's input. 2 H in the published heads; a smaller one makes the
    head cheaper (at 14B the published output layer alone is 1.56B weights) and adds an input projection."""
    num_draft_layers: int = 2
    """Residual blocks in front of the output layer."""
    rnn: bool = True
    """State update s = silu(W e + U s + b); otherwise the running sum s = e + s."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be positive" for name in ("hidden_size", "vocab_size", "exit_dim") if getattr(self, name) < 1
        ]
        if self.num_draft_layers < 0:
            wrong.append("num_draft_layers must not be negative")
        wrong += [f"{name} is too large" for name, most in _MOST.items() if getattr(self, name) > most]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def projects_input(self) -> bool:
        """True when [context ; state] (2 H) has to be projected to ``exit_dim``."""
        return self.exit_dim != 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Number of weights of the head."""
        block = self.exit_dim * self.exit_dim + self.exit_dim
        project = (2 * self.hidden_size + 1) * self.exit_dim if self.projects_input else 0
        recurrent = 2 * self.hidden_size**2 + self.hidden_size if self.rnn else 0
        return project + self.num_draft_layers * block + self.exit_dim * self.vocab_size + recurrent


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """A beam search of ``beams`` beams that draws ``length`` tokens each, written ``BxL``."""

    beams: int
    length: int

    def __post_init__(self) -> None:
        if self.beams < 1 or self.length < 1:
            raise ValueError(f"a draft tree needs at least one beam and one token, not {self.beams}x{self.length}")

    def __str__(self) -> str:
        return f"{self.beams}x{self.length}"

    @property
    def max_nodes(self) -> int:
        """Nodes that verification sees at most: the root and every drafted token."""
        return 1 + self.beams * self.length
