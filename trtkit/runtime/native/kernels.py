"""Typed calls of the C++ kernels, in the shapes of their pure-torch references.

``open_kernels`` decides once per model; everything else expects that it said yes.
Letters: T tokens, R rows, N nodes, S slots, H hidden, D head_dim, V vocab, I intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.decoder import Norms, PlainPointwise, Rope
from trtkit.model_spec import ModelSpec
from trtkit.runtime.native import loader

__all__ = [
    "NativePointwise",
    "attend",
    "attend_fits",
    "draw_tokens",
    "loaded",
    "noise",
    "open_kernels",
    "place_nodes",
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
    """:class:`trtkit.decoder.Pointwise` in one pass each; ``add_norm`` and ``heads`` work in place."""

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

    def gated(self, gate_up: Tensor) -> Tensor:
        """(T, 2 I) -> (T, I); an exponential may differ from torch's in its last place."""
        out: Tensor = torch.ops.trtkit_cpu.gated(gate_up)
        return out


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


def place_nodes(
    blocks: Tensor, cached: Tensor, depth: Tensor, mask: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``node_places.place_nodes``: blocks (R, B), cached (R,), depth (R, N), mask (R, N, N)."""
    slots, positions, hidden = torch.ops.trtkit_cpu.place_nodes(blocks, cached, depth, mask, block_size)
    return slots.view(depth.shape), positions.view(depth.shape), hidden


def noise(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 (M,): ``sampling.uniforms`` at positions (M,), bit for bit; seeds (R,), each of M / R picks in a row."""
    out: Tensor = torch.ops.trtkit_cpu.uniforms(seeds, positions)
    return out


def draw_tokens(
    logits: Tensor, temperature: Tensor, cold: Tensor, uniform: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """int64 (M,): the tokens of ``pick_plain``, bit for bit; logits (M, V) in bfloat16 or float32, uniform (M,).

    The parameters are (R,): each is that of M / R picks in a row.
    """
    out: Tensor = torch.ops.trtkit_cpu.pick(logits.contiguous(), temperature, cold, uniform, top_k, top_p, min_p)
    return out
