"""What a layer does between its products and its attention, one launch each.

Every kernel rounds where :class:`trtkit.decoder.PlainPointwise` rounds; only the order of the sums in a norm differs.

Letters: T tokens, H hidden, D head_dim, I intermediate.
"""
# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.decoder import Norms, Rope
from trtkit.model_spec import ModelSpec
from trtkit.runtime.cuda.dependent import FUSED, dependent, started

__all__ = ["TritonPointwise", "add_norm", "gated", "rotate"]

_GATED = 1024
"""Outputs of one program of :func:`gated`."""


@triton.jit
def add_norm(
    out, hidden, delta, weight, out_stride, hidden_stride, delta_stride, eps,
    width: tl.constexpr, tile: tl.constexpr, adds: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """One token: out = rms_norm(x) * weight, x = hidden or, where ``adds``, hidden + delta, stored over hidden."""
    started(early)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    real = column < width
    x = tl.load(hidden + token * hidden_stride + column, mask=real, other=0.0)
    if adds:
        more = tl.load(delta + token * delta_stride + column, mask=real, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(hidden + token * hidden_stride + column, x, mask=real)
    wide = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    gain = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, (wide * inverse * gain).to(x.dtype), mask=real)


@triton.jit
def rotate(
    qkv, cos, sin, q_weight, k_weight, stride, eps,
    heads: tl.constexpr, head_dim: tl.constexpr, tile: tl.constexpr, norms: tl.constexpr, early: tl.constexpr = False,
):  # fmt: skip
    """One query or key head of one token, in place: its norm where the model has one, then the turn by its position.

    cos and sin (T, D); the first half of D pairs with the second.
    """
    started(early)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    low = tl.arange(0, tile)
    real = low < half
    place = qkv + token * stride + head * head_dim + low
    a = tl.load(place, mask=real, other=0.0)
    b = tl.load(place + half, mask=real, other=0.0)
    if norms:
        weight = q_weight
        if head >= heads:
            weight = k_weight
        wide_a = a.to(tl.float32)
        wide_b = b.to(tl.float32)
        mean = (tl.sum(wide_a * wide_a, 0) + tl.sum(wide_b * wide_b, 0)) / head_dim
        inverse = 1.0 / tl.sqrt_rn(mean + eps)
        a = (wide_a * inverse * tl.load(weight + low, mask=real, other=0.0).to(tl.float32)).to(a.dtype)
        b = (wide_b * inverse * tl.load(weight + half + low, mask=real, other=0.0).to(tl.float32)).to(b.dtype)
    at = token * head_dim + low
    tl.store(place, _turned(a, -b.to(tl.float32), cos + at, sin + at, real), mask=real)
    tl.store(place + half, _turned(b, a.to(tl.float32), cos + half + at, sin + half + at, real), mask=real)


@triton.jit
def _turned(x, across, cos, sin, real):
    """x * cos + across * sin; both products are rounded to the dtype of x, as torch's are."""
    straight = x.to(tl.float32) * tl.load(cos, mask=real, other=0.0).to(tl.float32)
    turned = across * tl.load(sin, mask=real, other=0.0).to(tl.float32)
    return (straight.to(x.dtype).to(tl.float32) + turned.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def gated(out, gate_up, stride, width: tl.constexpr, tile: tl.constexpr, early: tl.constexpr = False):
    """silu(gate) * up for ``tile`` columns of one token; silu is rounded before the product, as torch's is."""
    started(early)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    real = column < width
    gate = tl.load(gate_up + token * stride + column, mask=real, other=0.0)
    up = tl.load(gate_up + token * stride + width + column, mask=real, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = (opened.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + token * width + column, product, mask=real)


class TritonPointwise:
    """:class:`trtkit.decoder.Pointwise` on a GPU; ``add_norm`` and ``heads`` work in place."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As ``rms_norm``."""
        return _normed(x, None, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(hidden + delta, its norm); the sum is written over ``hidden``."""
        return hidden, _normed(hidden, delta, weight, eps)

    def heads(self, spec: ModelSpec, norms: Norms, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (turned) and v as views of ``qkv`` (T, (heads + 2 kv_heads) * D), which is overwritten."""
        tokens, head_dim = qkv.shape[0], spec.head_dim
        assert qkv.stride(1) == 1
        if tokens:
            q_weight, k_weight = (qkv, qkv) if norms.q is None or norms.k is None else (norms.q, norms.k)
            rotate[(tokens, spec.heads + spec.kv_heads)](
                qkv, rope.cos.contiguous(), rope.sin.contiguous(), q_weight, k_weight, qkv.stride(0), spec.norm_eps,
                heads=spec.heads, head_dim=head_dim, tile=triton.next_power_of_2(head_dim // 2),
                norms=norms.q is not None and norms.k is not None, num_warps=1, **FUSED,
                **dependent(qkv.device),
            )  # fmt: skip
        parts = qkv.view(tokens, -1, head_dim)
        q, k, v = torch.split(parts, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        return q, k, v

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (T, 2 I) -> (T, I)."""
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.stride(1) == 1
        out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
        if tokens:
            gated[(tokens, -(-width // _GATED))](
                out, gate_up, gate_up.stride(0), width=width, tile=_GATED, num_warps=4, **FUSED,
                **dependent(out.device),
            )  # fmt: skip
        return out


def _normed(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    tokens, width = hidden.shape
    assert hidden.stride(1) == 1
    assert delta is None or delta.stride(1) == 1
    out = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    if tokens:
        add_norm[(tokens,)](
            out, hidden, hidden if delta is None else delta, weight, out.stride(0), hidden.stride(0),
            0 if delta is None else delta.stride(0), eps,
            width=width, tile=triton.next_power_of_2(width), adds=delta is not None,
            num_warps=8 if width > 2048 else 4, **FUSED, **dependent(hidden.device),
        )  # fmt: skip
    return out
