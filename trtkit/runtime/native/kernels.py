"""Typed calls of the C++ kernels, in the shapes of their pure-torch references.

``open_kernels`` decides once per model; everything else expects that it said yes.
Letters: T tokens, R rows, N nodes, S slots, H hidden, D head_dim, V vocab, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from drafter.model import Drafter
from trtkit.decoder import Norms, PlainPointwise, Rope
from trtkit.model_spec import ModelSpec
from trtkit.runtime.native import loader

__all__ = [
    "DRAFT_ROWS",
    "NativePointwise",
    "attend",
    "attend_fits",
    "draft_chain",
    "draw_tokens",
    "loaded",
    "open_kernels",
]

_loaded = False


def open_kernels(parameters: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Load the kernels where a model of that size profits from them; compiles on the first use on a machine."""
    global _loaded
    if not loader.wanted(parameters, device, dtype) or not loader.load():
        return False
    _loaded = True
    return True


def loaded() -> bool:
    """Whether some model of this process opened the kernels: enough where they give the same bits as torch."""
    return _loaded


class NativePointwise(PlainPointwise):
    """:class:`trtkit.decoder.Pointwise` in one pass each; ``add_norm`` and ``heads`` work in place.

    silu(gate) * up stays with torch: one pass of ours was no faster than its two.
    """

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As ``rms_norm``."""
        out: Tensor = torch.ops.trtkit_cpu.add_norm(x, None, weight, eps)
        return out

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(hidden + delta, its norm); the sum is written over ``hidden``."""
        return hidden, torch.ops.trtkit_cpu.add_norm(hidden, delta, weight, eps)

    def heads(self, spec: ModelSpec, norms: Norms, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (turned) and v as views of ``qkv`` (T, (heads + 2 kv_heads) * D), which is overwritten."""
        torch.ops.trtkit_cpu.rotate(qkv, rope.cos, rope.sin, spec.heads, spec.kv_heads, norms.q, norms.k, spec.norm_eps)
        parts = qkv.view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(parts, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        return q, k, v


def attend_fits(pool: Tensor, head_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    """The kernel reads keys in the compute dtype, 16 at a time."""
    return pool.dtype == dtype and head_dim % 16 == 0 and block_size % 16 == 0


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], pools: tuple[Tensor, Tensor], table: Tensor, slots: Tensor, hidden: Tensor
) -> Tensor:
    """Write k and v to ``slots`` (R * N,) and attend over the block table (R * B,), without a copy of the cache.

    q (R * N, heads, D), k and v (R * N, kv_heads, D); pools (kv_heads, blocks, block_size * D); hidden (R, N, S) is
    True where a node must not look. Returns (R * N, heads * D).
    """
    out: Tensor = torch.ops.trtkit_cpu.attend(*qkv, *pools, table, slots, hidden)
    return out


def draw_tokens(
    logits: Tensor, temperature: Tensor, cold: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """int64 (M,): the tokens of ``pick_plain``, bit for bit; logits (M, V) in bfloat16 or float32."""
    out: Tensor = torch.ops.trtkit_cpu.pick(logits.contiguous(), temperature, cold, uniform, top_k, top_p, min_p)
    return out


DRAFT_ROWS = 8
"""Up to here one pass per few rows beats the kernels of whole products in a small draft head."""
DRAFT_WEIGHTS = 2_000_000
"""Up to here a head is small: one thread reads its weights sooner than two find together seven times per position."""


def draft_chain(head: Drafter, table: Tensor) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    """One-beam search of a recurrent head in one call: (context (R, H), tokens (R,), length) -> int64 (R, L).

    ``table`` (V, H) holds the target's embeddings. None where the kernel does not fit or the head is large. It sums in
    float32 throughout, so a near-tie may be drafted differently, which the emitted tokens do not notice.
    """
    config = head.config
    fits = config.hidden_size % 16 == 0 and config.exit_dim % 16 == 0
    fits &= sum(weight.numel() for weight in head.parameters()) <= DRAFT_WEIGHTS
    if not loaded() or head.rnn_w is None or head.rnn_u is None or not fits:
        return None
    blocks = [block for block in head.blocks if isinstance(block, nn.Linear)]
    projection = head.input_proj
    arguments = (
        head.rnn_w.weight, head.rnn_u.weight, head.rnn_u.bias,
        None if projection is None else projection.weight, None if projection is None else projection.bias,
        [block.weight for block in blocks], [block.bias for block in blocks], head.output.weight, head.token_ids,
    )  # fmt: skip

    def run(context: Tensor, tokens: Tensor, length: int) -> Tensor:
        out: Tensor = torch.ops.trtkit_cpu.draft_chain(context.contiguous(), tokens, table, *arguments, length)
        return out

    return run
