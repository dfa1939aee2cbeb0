"""``Drafter``: the ReDrafter head (arXiv 2403.09919) with one forward for training and for inference.

    s' = silu(W e + U s + b)          or e + s without the recurrence
    z  = [h ; s']                     then input_proj where exit_dim is not 2 H
    z  = z + silu(A_i z + a_i)        for each residual block
    logits = E z                      for every token, or for those that trim() keeps

h is the target's hidden state where it last drew a token, e the embedding (the target's own) of the newest token. h
stays as it is along a draft, s starts at zero. Training unrolls ``step``, inference loops it. Letters: H hidden, V
vocab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafter.config import DrafterConfig

__all__ = ["Drafter"]


class Drafter(nn.Module):
    """A draft head for a frozen decoder."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.exit_dim
        self.input_proj = nn.Linear(2 * hidden, width) if config.projects_input else None
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_draft_layers))
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self.rnn_w = nn.Linear(hidden, hidden, bias=False) if config.rnn else None
        self.rnn_u = nn.Linear(hidden, hidden) if config.rnn else None
        self.token_ids: Tensor | None = None
        """int64 (V',): which token each line of the output layer stands for; None: line i is token i."""
        self.chain: Callable[[Tensor, Tensor, int], Tensor] | None = None
        """A faster one-beam search, where the runtime has one: (context, token, length) -> drafted (R, L)."""

    def step(self, context: Tensor, state: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """One draft position: context, state and embedding (..., H) -> logits (..., V) and the next state (..., H)."""
        state = self.next_state(state, embedding)
        logits: Tensor = self.output(self.features(context, state))
        return logits, state

    def trim(self, token_ids: Tensor) -> None:
        """Keep only these tokens' lines (V',) of the output layer: a cheaper head that can draft nothing else."""
        with torch.no_grad():
            kept = nn.Linear(self.config.exit_dim, len(token_ids), bias=False, device="meta")
            kept.weight = nn.Parameter(self.output.weight[token_ids].clone(), requires_grad=False)
        self.output, self.token_ids = kept, token_ids

    def ids(self, lines: Tensor) -> Tensor:
        """Token ids of lines of the output layer."""
        return lines if self.token_ids is None else self.token_ids[lines]

    def next_state(self, state: Tensor, embedding: Tensor) -> Tensor:
        """The state after a token: (..., H)."""
        if self.rnn_w is None or self.rnn_u is None:
            return state + embedding
        return F.silu(self.rnn_w(embedding) + self.rnn_u(state))

    def features(self, context: Tensor, state: Tensor) -> Tensor:
        """What the output layer reads: (..., H) twice -> (..., exit_dim)."""
        z = torch.cat([context, state], dim=-1)
        if self.input_proj is not None:
            z = self.input_proj(z)
        for block in self.blocks:
            z = z + F.silu(block(z))
        return z
