"""One decoder for Qwen2, Qwen3 and Llama, driven by ``ModelSpec``: pure functions over flat tokens.

Calibration, the quality report and the torch runtime all run this forward; they differ only in the two callables that
they hand in: ``linear`` (how a weight multiplies) and ``attend`` (where keys and values live).

Letters: T tokens (rows x nodes, flattened), H hidden, D head_dim, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.model_spec import ModelSpec, RopeSpec

__all__ = [
    "LINEAR_PARTS",
    "Attend",
    "Linear",
    "LinearName",
    "Norms",
    "PlainPointwise",
    "Pointwise",
    "Rope",
    "Stream",
    "causal_attention",
    "decoder_layer",
    "inverse_frequencies",
    "rms_norm",
    "rope_at",
    "stream_layer",
]

LinearName: TypeAlias = Literal["qkv", "o", "gate_up", "down"]

LINEAR_PARTS: dict[LinearName, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The four matrix products of a layer and the Hugging Face tensors that are stacked in each, in row order."""


class Linear(Protocol):
    """One of the layer's four products: (T, in) -> (T, out)."""

    def __call__(self, name: LinearName, x: Tensor) -> Tensor: ...


class Attend(Protocol):
    """Attention over the cache: q (T, heads, D), k and v (T, kv_heads, D) -> (T, heads * D)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norm weights of one layer; ``q`` and ``k`` (D,) exist in Qwen3 only."""

    input: Tensor
    post: Tensor
    q: Tensor | None = None
    k: Tensor | None = None


class Rope(NamedTuple):
    """cos and sin at the tokens' positions, each (T, 1, D), in the dtype of the activations."""

    cos: Tensor
    sin: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Rotation speeds (D / 2,) in float32, and the factor that yarn puts on cos and sin.

    Yarn as in transformers' ``_compute_yarn_parameters`` (arXiv 2309.00071): dimensions that turn more than
    ``beta_fast`` times within the original context keep their speed, those below ``beta_slow`` are slowed down by
    ``factor``, a linear ramp over the dimensions lies between. Llama3 as in ``_compute_llama3_parameters``: the same
    with ``high_freq_factor`` and ``low_freq_factor`` turns and a ramp over the turns, and a factor of 1.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    periods = rope.theta**exponents
    if rope.kind == "default":
        return 1.0 / periods, 1.0
    if rope.kind == "llama3":
        turns = rope.original_max_positions / (2 * math.pi * periods)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return ((1 - kept) / rope.factor + kept) / periods, 1.0

    def dimension_turning(turns: float) -> float:
        span = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    frequencies = (1.0 / (rope.factor * periods)) * (1 - keep) + (1.0 / periods) * keep
    mscale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return frequencies, rope.attention_factor if rope.attention_factor is not None else mscale


def rope_at(spec: ModelSpec, positions: Tensor, dtype: torch.dtype) -> Rope:
    """The rotation of the tokens at ``positions`` (T,)."""
    frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim)
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]
    return Rope((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """x (T, heads, D) turned by its position; the first half of D pairs with the second (GPT-NeoX order)."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * rope.cos + turned * rope.sin


class Pointwise(Protocol):
    """What a layer does between its products and its attention. Inputs may be overwritten."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``rms_norm`` of x (T, H)."""
        ...

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(hidden + delta, the norm of that sum), each (T, H)."""
        ...

    def heads(self, spec: ModelSpec, norms: Norms, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (T, (heads + 2 kv_heads) * D) -> q (T, heads, D), k and v (T, kv_heads, D); q and k normed and turned."""
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up: (T, 2 I) -> (T, I)."""
        ...


class PlainPointwise:
    """:class:`Pointwise` in plain torch: the definition."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :class:`Pointwise`."""
        return rms_norm(x, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :class:`Pointwise`."""
        total = hidden + delta
        return total, rms_norm(total, weight, eps)

    def heads(self, spec: ModelSpec, norms: Norms, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`Pointwise`."""
        parts = qkv.view(qkv.shape[0], -1, spec.head_dim)
        q, k, v = torch.split(parts, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
        if norms.q is not None and norms.k is not None:
            q, k = rms_norm(q, norms.q, spec.norm_eps), rms_norm(k, norms.k, spec.norm_eps)
        return _rotate(q, rope), _rotate(k, rope), v

    def gated(self, gate_up: Tensor) -> Tensor:
        """See :class:`Pointwise`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


_PLAIN = PlainPointwise()


class Stream(NamedTuple):
    """What runs from layer to layer: hidden (T, H), and what the layer before still has to add to it (T, H), which the
    next norm does on its way; None before the first layer."""

    hidden: Tensor
    delta: Tensor | None


def stream_layer(
    spec: ModelSpec, norms: Norms, stream: Stream, rope: Rope, linear: Linear, attend: Attend, pointwise: Pointwise
) -> Stream:  # fmt: skip
    """One layer over flat tokens. ``stream.hidden`` may be overwritten."""
    hidden, delta = stream
    if delta is None:
        normed = pointwise.norm(hidden, norms.input, spec.norm_eps)
    else:
        hidden, normed = pointwise.add_norm(hidden, delta, norms.input, spec.norm_eps)
    q, k, v = pointwise.heads(spec, norms, linear("qkv", normed), rope)
    hidden, normed = pointwise.add_norm(hidden, linear("o", attend(q, k, v)), norms.post, spec.norm_eps)
    return Stream(hidden, linear("down", pointwise.gated(linear("gate_up", normed))))


def decoder_layer(
    spec: ModelSpec, norms: Norms, hidden: Tensor, rope: Rope, linear: Linear, attend: Attend
) -> Tensor:  # fmt: skip
    """One layer in plain torch: hidden (T, H) -> (T, H)."""
    hidden, delta = stream_layer(spec, norms, Stream(hidden, None), rope, linear, attend, _PLAIN)
    assert delta is not None
    return hidden + delta


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention of one sequence over itself: an ``Attend`` without a cache."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)
