"""Pre-quant scales put where other loaders look for them: into the norm in front.

A scale on the input of q, k, v (gate, up) multiplies what a norm has made, so that the norm's weight can take it up:
W (s * norm(x)) is W norm'(x) with norm' = s * norm. The linears behind one norm share their scale.
"""

from __future__ import annotations

from torch import Tensor

from trtkit.checkpoint.hf import MODEL_DTYPES, narrow
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.errors import CheckpointError

__all__ = ["BEHIND_NORM", "check_folding", "folded_norm"]

BEHIND_NORM = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_FIRST_BEHIND = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}


def folded_norm(source: UnifiedCheckpoint, name: str) -> Tensor | None:
    """The tensor ``name`` times the scale that it takes up, in the model's dtype; None where it takes up none."""
    prefix, _, norm = name.removesuffix(".weight").rpartition(".")
    part = _FIRST_BEHIND.get(norm)
    scale = f"{prefix}.{part}.pre_quant_scale" if part else ""
    if scale not in source.shards:
        return None
    product = source.shards.tensor(name).float() * source.shards.tensor(scale).float()
    return narrow(product, MODEL_DTYPES[source.spec.dtype], name)


def check_folding(source: UnifiedCheckpoint) -> None:
    """One norm can take up one scale: the linears behind it must share theirs. Raises :class:`CheckpointError`."""
    names = [name for name in source.shards.entries if name.endswith("pre_quant_scale")]
    if not names:
        return
    for layer in range(source.spec.layers):
        for product in ("qkv", "gate_up"):
            source.parts(layer, product)
    wrong = [name for name in names if not bool((source.shards.tensor(name).float() > 0).all())]
    if wrong:
        raise CheckpointError(
            "scales that no kernel can use", where=str(source.directory), offenders=wrong[:20],
            hint="build the checkpoint again",
        )  # fmt: skip
