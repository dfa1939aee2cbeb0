"""The ``config.json`` of a TensorRT-LLM checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from drafter.config import DrafterConfig, TreeShape
from trtkit.errors import UsageError
from trtkit.files import JsonObject
from trtkit.model_spec import Family, ModelSpec
from trtkit.scheme import KvDtype, QuantScheme

__all__ = [
    "ARCHITECTURES",
    "EXCLUDED",
    "KV_ALGOS",
    "REDRAFTER_ARCHITECTURES",
    "TrtllmDtype",
    "TrtllmOptions",
    "trtllm_config",
    "trtllm_dtype",
]

TrtllmDtype: TypeAlias = Literal["bfloat16", "float16"]

ARCHITECTURES: dict[Family, str] = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
REDRAFTER_ARCHITECTURES: dict[Family, str] = {
    "qwen2": "ReDrafterForQWenLM",
    "qwen3": "ReDrafterForQWenLM",
    "llama": "ReDrafterForLLaMALM",
}
EXCLUDED = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
    "drafter*",
)  # fmt: skip
"""A list in the file replaces the loader's defaults: its six and the draft head, without which a head with an input
projection is quantized or does not load."""
KV_ALGOS: dict[KvDtype, str | None] = {"model": None, "fp8": "FP8", "int8": "INT8"}
_SEQ_LENGTH = 8192
"""Qwen's decoder layer reads it and uses it for logn attention only; the upstream converter's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmOptions:
    """What a TensorRT-LLM checkpoint fixes beyond the weights."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    drafter: Path | None = None
    """Directory of a draft head; it goes into the rank files."""
    tree: TreeShape | None = None
    """The tree that the engine draws, required with a drafter; config.json may be edited until the engine is built."""
    greedy: bool = False
    """ReDrafter for temperature 0 only."""
    dtype: TrtllmDtype | None = None
    """Of activations and of every tensor that is not quantized; None takes the checkpoint's (float32: bfloat16)."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value}: must be at least 1"
            for name, value in (
                ("tensor parallel", self.tensor_parallel),
                ("pipeline parallel", self.pipeline_parallel),
            )
            if value < 1
        ]
        if (self.drafter is None) != (self.tree is None):
            wrong.append("a draft head and the tree it draws go together")
        if wrong:
            raise UsageError("not a TensorRT-LLM checkpoint", offenders=wrong)

    @property
    def world_size(self) -> int:
        """Number of ranks, one GPU each."""
        return self.tensor_parallel * self.pipeline_parallel


def trtllm_dtype(spec: ModelSpec, options: TrtllmOptions) -> TrtllmDtype:
    """The dtype of activations and unquantized tensors."""
    if options.dtype is not None:
        return options.dtype
    return "float16" if spec.dtype == "float16" else "bfloat16"


def trtllm_config(
    spec: ModelSpec, scheme: QuantScheme, options: TrtllmOptions, head: DrafterConfig | None, *, pre_scale: bool
) -> JsonObject:
    """The contents of config.json; every field is written, because the loader's defaults are another model's."""
    config: JsonObject = {
        "architecture": (ARCHITECTURES if head is None else REDRAFTER_ARCHITECTURES)[spec.family],
        "dtype": trtllm_dtype(spec, options),
        "logits_dtype": "float32",
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_size": spec.head_dim,
        "intermediate_size": spec.intermediate,
        "hidden_act": "silu",
        "norm_epsilon": spec.norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": spec.max_positions,
        "rotary_base": spec.rope.theta,
        "rotary_scaling": _rotary_scaling(spec),
        "attn_bias": spec.qkv_bias,
        "mlp_bias": False,
        "disable_weight_only_quant_plugin": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "tie_word_embeddings": spec.tied,
    }
    if spec.family != "llama":
        config |= {"qwen_type": spec.family, "seq_length": _SEQ_LENGTH, "use_logn_attn": False}
    if head is not None:
        config |= _redrafter(spec, options, head)
    config["mapping"] = {
        "world_size": options.world_size,
        "tp_size": options.tensor_parallel,
        "pp_size": options.pipeline_parallel,
    }
    config["quantization"] = _quantization(scheme, pre_scale=pre_scale, listed=head is not None)
    return config


def _rotary_scaling(spec: ModelSpec) -> JsonObject | None:
    """Read by ``RopeEmbeddingUtils`` in ``tensorrt_llm/functional.py``, by transformers' own keys."""
    rope = spec.rope
    if rope.kind == "default":
        return None
    scaling: JsonObject = {
        # Releases differ in which of the two they read.
        "type": rope.kind,
        "rope_type": rope.kind,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    if rope.kind == "llama3":
        return scaling | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return scaling | {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}


def _redrafter(spec: ModelSpec, options: TrtllmOptions, head: DrafterConfig) -> JsonObject:
    assert options.tree is not None
    return {
        "base_model_architecture": ARCHITECTURES[spec.family],
        "redrafter_num_layers": head.num_draft_layers,
        "redrafter_hidden_size": head.hidden_size,
        "redrafter_exit_dim": head.exit_dim,
        "redrafter_is_rnn": head.rnn,
        "redrafter_num_beams": options.tree.beams,
        "redrafter_draft_len_per_beam": options.tree.length,
        "redrafter_greedy_search": options.greedy,
    }


def _quantization(scheme: QuantScheme, *, pre_scale: bool, listed: bool) -> JsonObject:
    kv_algo = KV_ALGOS[scheme.kv_dtype]
    section: JsonObject = {"quant_algo": scheme.quant_algo, "kv_cache_quant_algo": kv_algo}
    if scheme.group_size is not None:
        section |= {"group_size": scheme.group_size, "has_zero_point": False, "pre_quant_scale": pre_scale}
    if listed or scheme.quant_algo is not None or kv_algo is not None:
        section["exclude_modules"] = list(EXCLUDED)
    return section
