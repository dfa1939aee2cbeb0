"""All layers of a decoder in one call, for decode steps: ``native/layers.cpp``.

The definition is ``stream_layer`` with ``NativePointwise``, packed products and ``attend``, whose bits it gives; it
saves the interpreter's time between them. Letters: T tokens, H hidden, L layers, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trtkit.decoder import LinearName, Norms, Rope
from trtkit.model_spec import ModelSpec
from trtkit.runtime.native.packed import PackedLinear

__all__ = ["NativeLayers", "open_layers"]

_ORDER: tuple[LinearName, ...] = ("qkv", "o", "gate_up", "down")


class NativeLayers:
    """The layers and the final norm of a model, with weights packed for this CPU."""

    def __init__(self, layers: Any) -> None:
        self._layers = layers

    def run(
        self, hidden: Tensor, rope: Rope, stored: tuple[Tensor, Tensor], table: Tensor, slots: Tensor, dark: Tensor
    ) -> Tensor:
        """hidden (T, H), which is overwritten -> (T, H) after the final norm.

        ``stored``: keys and values of all layers, (L, kv_heads, blocks, block_size * D) each, where those of the tokens
        are written to; ``table``, ``slots`` and ``dark`` as ``native.kernels.attend`` has them.
        """
        out: Tensor = self._layers.run(hidden, rope.cos, rope.sin, *stored, table, slots, dark)
        return out


def open_layers(
    spec: ModelSpec, layers: Sequence[tuple[Norms, Mapping[LinearName, object]]], final_norm: Tensor
) -> NativeLayers | None:
    """From each layer's norms (float32) and products. None unless all products are of one packed kind."""
    products = [linears[name] for _norms, linears in layers for name in _ORDER]
    packed = [product for product in products if isinstance(product, PackedLinear)]
    if not packed or len(packed) < len(products) or len({product.operator for product in packed}) > 1:
        return None
    opened = torch.classes.trtkit_cpu.Layers(
        f"trtkit_cpu::{packed[0].operator}", final_norm, spec.heads, spec.kv_heads, spec.norm_eps
    )
    for index, (norms, _linears) in enumerate(layers):
        opened.layer(norms.input, norms.post, norms.q, norms.k)
        for product in packed[index * len(_ORDER) :][: len(_ORDER)]:
            opened.linear(*product.weights, *product.form)
    return NativeLayers(opened)
