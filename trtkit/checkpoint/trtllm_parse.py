"""Read the ``config.json`` of a TensorRT-LLM checkpoint back into a spec, a scheme and options: strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from drafter.config import DrafterConfig, TreeShape
from trtkit.checkpoint.hf import read_config
from trtkit.checkpoint.trtllm_check import check_trtllm, refuse_algo
from trtkit.checkpoint.trtllm_config import (
    ARCHITECTURES,
    KV_ALGOS,
    REDRAFTER_ARCHITECTURES,
    TrtllmDtype,
    TrtllmOptions,
)
from trtkit.errors import ConfigError, UnsupportedError
from trtkit.model_spec import Dtype, Family, ModelSpec, RopeSpec
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = ["TrtllmConfig", "read_trtllm_config"]

_SCALING = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("low_freq_factor", "high_freq_factor")}
"""The keys of ``rotary_scaling`` that differ from kind to kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmConfig:
    """What a config.json says."""

    spec: ModelSpec
    scheme: QuantScheme
    options: TrtllmOptions
    """Without the drafter's directory and the tree: the head is in the rank files."""
    head: DrafterConfig | None
    tree: TreeShape | None
    greedy: bool
    pre_scale: bool


class _Reader:
    """Typed look-ups that collect every complaint."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.offenders: list[str] = []

    def integer(self, name: str, source: Mapping[str, Any] | None = None) -> int:
        value = (self.config if source is None else source).get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.offenders.append(f"{name}: expected a positive integer, found {value!r}")
            return 1
        return value

    def number(self, name: str, source: Mapping[str, Any] | None = None) -> float:
        value = (self.config if source is None else source).get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.offenders.append(f"{name}: expected a positive number, found {value!r}")
            return 1.0
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if not isinstance(value, bool):
            self.offenders.append(f"{name}: expected true or false, found {value!r}")
        return value is True

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.config.get(name)
        if not isinstance(value, dict):
            self.offenders.append(f"{name}: expected a table, found {value!r}")
            return {}
        return value

    def must(self, name: str, *values: object) -> None:
        if self.config.get(name) not in values:
            said = " or ".join(str(value).lower() for value in values)
            self.offenders.append(f"{name}: only {said} is read, found {self.config.get(name)!r}")


def read_trtllm_config(directory: Path) -> TrtllmConfig:
    """Raises :class:`ConfigError` with everything missing, :class:`UnsupportedError` for what trtkit does not know."""
    config = read_config(directory)
    where = str(directory / "config.json")
    family = _family(config, where)
    reader = _Reader(config)
    scheme, pre_scale = _scheme(reader, family, where)
    spec = _spec(reader, family)
    head, tree = _redrafter(reader, spec) if "redrafter_exit_dim" in config else (None, None)
    mapping = reader.section("mapping")
    ranks, stages = reader.integer("tp_size", mapping), reader.integer("pp_size", mapping)
    if mapping.get("world_size") != ranks * stages:
        reader.offenders.append(f"mapping.world_size: expected {ranks * stages}, found {mapping.get('world_size')!r}")
    reader.must("use_parallel_embedding", False)
    if reader.offenders:
        raise ConfigError(
            "not a complete TensorRT-LLM configuration",
            where=where,
            offenders=reader.offenders,
            hint="write the checkpoint with `trtkit export --format trtllm`",
        )
    dtype: TrtllmDtype = "float16" if spec.dtype == "float16" else "bfloat16"
    options = TrtllmOptions(tensor_parallel=ranks, pipeline_parallel=stages, dtype=dtype)
    check_trtllm(spec, scheme, options)
    return TrtllmConfig(
        spec=spec,
        scheme=scheme,
        options=options,
        head=head,
        tree=tree,
        greedy=head is not None and config.get("redrafter_greedy_search") is True,
        pre_scale=pre_scale,
    )


def _family(config: Mapping[str, Any], where: str) -> Family:
    name = config.get("architecture")
    families = [family for family in ARCHITECTURES if name in (ARCHITECTURES[family], REDRAFTER_ARCHITECTURES[family])]
    if len(families) > 1:
        families = [family for family in families if family == config.get("qwen_type")]
    if not families:
        known = sorted({*ARCHITECTURES.values(), *REDRAFTER_ARCHITECTURES.values()})
        raise UnsupportedError(
            f"architecture {name!r} (qwen_type {config.get('qwen_type')!r}) is not supported",
            where=where,
            hint=f"supported: {', '.join(known)}",
        )
    return families[0]


def _scheme(reader: _Reader, family: Family, where: str) -> tuple[QuantScheme, bool]:
    section = reader.section("quantization")
    algo, kv_algo = section.get("quant_algo"), section.get("kv_cache_quant_algo")
    wrong = refuse_algo(algo if algo is None else str(algo), family)
    if wrong:
        raise UnsupportedError("this quantization is not supported", where=where, offenders=[wrong])
    scheme = next(scheme for scheme in SCHEMES.values() if scheme.quant_algo == algo)
    kv_dtypes = {name: dtype for dtype, name in KV_ALGOS.items()}
    if not isinstance(kv_algo, str | None) or kv_algo not in kv_dtypes:
        reader.offenders.append(f"quantization.kv_cache_quant_algo: expected FP8, INT8 or null, found {kv_algo!r}")
        kv_algo = None
    pre_scale = scheme.name == "int8-sq"
    if scheme.group_size is not None:
        if section.get("group_size") != scheme.group_size or section.get("has_zero_point") is not False:
            reader.offenders.append(f"quantization: only symmetric groups of {scheme.group_size} are known")
        if not isinstance(section.get("pre_quant_scale"), bool):
            reader.offenders.append("quantization.pre_quant_scale: expected true or false")
        pre_scale = section.get("pre_quant_scale") is True
    return dataclasses.replace(scheme, kv_dtype=kv_dtypes[kv_algo]), pre_scale


def _spec(reader: _Reader, family: Family) -> ModelSpec:
    reader.must("hidden_act", "silu")
    reader.must("position_embedding_type", "rope_gpt_neox")
    reader.must("mlp_bias", False)
    if family != "llama":
        reader.must("qwen_type", family)
        reader.integer("seq_length")
    dtype: Dtype = reader.config.get("dtype", "")
    if dtype not in get_args(TrtllmDtype):
        reader.offenders.append(f"dtype: expected bfloat16 or float16, found {dtype!r}")
    return ModelSpec(
        family=family,
        layers=reader.integer("num_hidden_layers"),
        hidden=reader.integer("hidden_size"),
        heads=reader.integer("num_attention_heads"),
        kv_heads=reader.integer("num_key_value_heads"),
        head_dim=reader.integer("head_size"),
        intermediate=reader.integer("intermediate_size"),
        vocab=reader.integer("vocab_size"),
        rope=_rope(reader),
        norm_eps=reader.number("norm_epsilon"),
        qkv_bias=reader.flag("attn_bias"),
        qk_norm=family == "qwen3",
        # lm_head is always in the files, so other writers need not say it.
        tied=reader.config.get("tie_word_embeddings") is True,
        max_positions=reader.integer("max_position_embeddings"),
        dtype=dtype,
    )


def _rope(reader: _Reader) -> RopeSpec:
    theta = reader.number("rotary_base")
    if reader.config.get("rotary_scaling") is None:
        return RopeSpec(theta=theta)
    scaling = reader.section("rotary_scaling")
    kind = scaling.get("type", scaling.get("rope_type"))
    if not isinstance(kind, str) or kind not in _SCALING:
        reader.offenders.append(f"rotary_scaling: only yarn and llama3 are known, found {kind!r}")
        return RopeSpec(theta=theta)
    known = {"type", "rope_type", "factor", "original_max_position_embeddings", *_SCALING[kind]}
    reader.offenders += [f"rotary_scaling.{name}: unknown key" for name in scaling if name not in known]
    rope = RopeSpec(
        theta=theta,
        factor=reader.number("factor", scaling),
        original_max_positions=reader.integer("original_max_position_embeddings", scaling),
    )
    first, second = (reader.number(name, scaling) for name in _SCALING[kind])
    if kind == "llama3":
        return dataclasses.replace(rope, kind="llama3", low_freq_factor=first, high_freq_factor=second)
    return dataclasses.replace(rope, kind="yarn", beta_fast=first, beta_slow=second)


def _redrafter(reader: _Reader, spec: ModelSpec) -> tuple[DrafterConfig, TreeShape]:
    reader.must("redrafter_hidden_size", spec.hidden)
    reader.flag("redrafter_greedy_search")
    layers = reader.config.get("redrafter_num_layers")
    if not isinstance(layers, int) or layers < 0:
        reader.offenders.append(f"redrafter_num_layers: expected a count, found {layers!r}")
        layers = 0
    head = DrafterConfig(
        hidden_size=spec.hidden,
        vocab_size=spec.vocab,
        exit_dim=reader.integer("redrafter_exit_dim"),
        num_draft_layers=layers,
        rnn=reader.flag("redrafter_is_rnn"),
    )
    beams, length = reader.integer("redrafter_num_beams"), reader.integer("redrafter_draft_len_per_beam")
    return head, TreeShape(beams=beams, length=length)
