"""The one-beam search of a draft head in one call: ``native/draft.cpp``.

The definition is ``beam_search`` with packed products; this saves the interpreter's time between them, which is most
of what a small head takes. Letters: R rows, H hidden, V vocab, L drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from drafter.config import DrafterConfig
from trtkit.runtime.native.packed import PackedLinear

__all__ = ["Chain", "open_chain"]

Chain: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""(context (R, H), tokens (R,), L) -> int64 (R, L)."""

_VECTOR = 16


def open_chain(
    config: DrafterConfig, products: Sequence[object], table: Tensor, token_ids: Tensor | None
) -> Chain | None:
    """``products``: W and U of the recurrence, the input projection where there is one, the blocks, the output layer.
    ``table`` (V, H): the target's embeddings; ``token_ids``: what the lines of the output layer stand for.

    None for a head without recurrence, and unless all products are of one packed kind.
    """
    packed = [product for product in products if isinstance(product, PackedLinear)]
    if not (config.rnn and packed) or len(packed) < len(products) or len({p.operator for p in packed}) > 1:
        return None
    if config.hidden_size % _VECTOR or config.exit_dim % _VECTOR:
        return None
    opened = torch.classes.trtkit_cpu.DraftChain(
        f"trtkit_cpu::{packed[0].operator}", table, token_ids, config.projects_input
    )
    for product in packed:
        opened.linear(*product.weights, *product.form)

    def run(context: Tensor, tokens: Tensor, length: int) -> Tensor:
        out: Tensor = opened.run(context.contiguous(), tokens, length)
        return out

    return run
