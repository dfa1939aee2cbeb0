"""Hugging Face and TensorRT-LLM names side by side, and how a tensor is shared out over tensor-parallel ranks.

The trap in the table: TensorRT-LLM computes proj(silu(fc x) * gate x), so its ``fc`` is our ``gate_proj`` and its
``gate`` our ``up_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from drafter.config import DrafterConfig
from trtkit.checkpoint.hf import EMBEDDING, FINAL_NORM, LM_HEAD
from trtkit.decoder import LinearName
from trtkit.model_spec import ModelSpec
from trtkit.scheme import QuantScheme, WeightFormat

__all__ = [
    "AXES",
    "DRAFTER_PREFIX",
    "LINEARS",
    "NORMS",
    "TABLES",
    "TENSORS",
    "Axis",
    "Split",
    "TrtLinear",
    "drafter_tensors",
    "layer_norms",
    "rank_file",
    "tensor_axes",
    "trt_layer_prefix",
]

Split: TypeAlias = Literal["rows", "columns", "heads"]
"""``rows``: each rank computes its share of the outputs; ``columns``: its share of the inputs, the results are summed;
``heads``: q, k and v each by heads, then stacked, with KV heads repeated where there are fewer than ranks."""
Axis: TypeAlias = Literal["out", "in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtLinear:
    """One linear of TensorRT-LLM and the Hugging Face linears stacked in it."""

    name: str
    product: LinearName
    """The product of our forward that it belongs to; its scales are shared within that."""
    parts: tuple[str, ...]
    split: Split


LINEARS = (
    TrtLinear(
        name="attention.qkv", product="qkv", split="heads",
        parts=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    TrtLinear(name="attention.dense", product="o", split="columns", parts=("self_attn.o_proj",)),
    TrtLinear(name="mlp.fc", product="gate_up", split="rows", parts=("mlp.gate_proj",)),
    TrtLinear(name="mlp.gate", product="gate_up", split="rows", parts=("mlp.up_proj",)),
    TrtLinear(name="mlp.proj", product="down", split="columns", parts=("mlp.down_proj",)),
)  # fmt: skip

NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "post_layernorm.weight": "post_attention_layernorm.weight",
}
"""Of a layer, the same on every rank."""

TABLES = {
    "transformer.vocab_embedding.weight": EMBEDDING,
    "transformer.ln_f.weight": FINAL_NORM,
    "lm_head.weight": LM_HEAD,
}

TENSORS = {
    "weight": "weight",
    "bias": "bias",
    "weight_scale": "weights_scaling_factor",
    "input_scale": "activation_scaling_factor",
    "pre_quant_scale": "prequant_scaling_factor",
}
"""Tensors of a linear: ours -> theirs."""

KV_SCALE = "attention.kv_cache_scaling_factor"
DRAFTER_PREFIX = "drafter."

AXES: dict[str, tuple[Axis, ...]] = {
    "weight": ("out", "in"),
    "bias": ("out",),
    "input_scale": (),
    "pre_quant_scale": ("in",),
}
_SCALE_AXES: dict[WeightFormat, tuple[Axis, ...]] = {"int8": ("out",), "fp8": (), "int4": ("out", "in")}


def tensor_axes(tensor: str, weight_format: WeightFormat) -> tuple[Axis, ...]:
    """What the axes of a linear's tensor (our suffix) run over; packed pairs of rows count as ``out``."""
    return _SCALE_AXES[weight_format] if tensor == "weight_scale" else AXES[tensor]


def trt_layer_prefix(index: int) -> str:
    """``transformer.layers.N.``; N counts from the first layer of the rank's pipeline stage."""
    return f"transformer.layers.{index}."


def rank_file(rank: int) -> str:
    """rank = pipeline stage x tensor parallel size + tensor-parallel rank."""
    return f"rank{rank}.safetensors"


def layer_norms(spec: ModelSpec) -> dict[str, tuple[str, int]]:
    """Norms of one layer: TensorRT-LLM name -> (our name, length)."""
    return {
        theirs: (ours, spec.head_dim if "attention" in theirs else spec.hidden)
        for theirs, ours in NORMS.items()
        if spec.qk_norm or "attention" not in theirs
    }


def stored_tensors(scheme: QuantScheme, *, bias: bool, pre_scale: bool) -> Iterator[str]:
    """Our suffixes of the tensors that one linear has in a rank file."""
    yield "weight"
    # W8A16: the loader makes the codes, the file holds rows that give ours.
    if scheme.weight_format != "bf16" and scheme.quant_algo != "W8A16":
        yield "weight_scale"
    if scheme.activations != "none":
        yield "input_scale"
    if pre_scale:
        yield "pre_quant_scale"
    if bias:
        yield "bias"


def drafter_tensors(config: DrafterConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of a draft head: TensorRT-LLM name -> (public name, shape before the split). All are split by rows."""
    hidden, exit_dim = config.hidden_size, config.exit_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if config.projects_input:
        shapes |= {"input_proj.weight": (exit_dim, 2 * hidden), "input_proj.bias": (exit_dim,)}
    for i in range(config.num_draft_layers):
        shapes |= {f"layers.{i}.linear.weight": (exit_dim, exit_dim), f"layers.{i}.linear.bias": (exit_dim,)}
    shapes["lm_head.weight"] = (config.vocab_size, exit_dim)
    if config.rnn:
        shapes |= {"rnn_u.weight": (hidden, hidden), "rnn_u.bias": (hidden,), "rnn_w.weight": (hidden, hidden)}

    def public(name: str) -> str:
        if name == "lm_head.weight":
            return f"lm_head.{config.num_draft_layers}.weight"
        return re.sub(r"^layers\.", "lm_head.", name)

    return {f"{DRAFTER_PREFIX}{name}": (public(name), shape) for name, shape in shapes.items()}
