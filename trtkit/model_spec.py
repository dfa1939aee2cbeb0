"""``ModelSpec``: the architecture of a checkpoint, read strictly from its ``config.json``.

We parse the file ourselves. transformers 4.x and 5.x spell the same facts differently (``rope_theta`` at the top level
against ``rope_parameters``, ``torch_dtype`` against ``dtype``) and 4.57 reads a 5.x file with rope_theta = 10000 and no
word about it; a silent default here is a wrong model. So each field is required or explicitly optional, and both
spellings must agree when both are present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from trtkit.errors import ConfigError, UnsupportedError
from trtkit.files import read_json

__all__ = ["Dtype", "Family", "ModelSpec", "RopeSpec", "read_model_spec", "spec_from_config", "spec_to_config"]

Family: TypeAlias = Literal["qwen2", "qwen3", "llama"]
Dtype: TypeAlias = Literal["bfloat16", "float16", "float32"]

_ARCHITECTURES: dict[str, Family] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
_MODEL_TYPES: dict[Family, str] = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}
_MOST_LAYERS = 10_000
"""The names of all tensors are made before the first one is looked for."""
_LARGEST = 1e300
_SCALING_FIELDS = {
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: ``default``, or ``yarn`` (arXiv 2309.00071) or ``llama3`` (of Llama 3.1) with their numbers."""

    theta: float
    kind: Literal["default", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that decides the shapes and the arithmetic of a Qwen2, Qwen3 or Llama decoder."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope: RopeSpec
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    max_positions: int
    dtype: Dtype

    @property
    def q_width(self) -> int:
        """Columns of the query projection: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key (or value) projection: kv_heads x head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linears of a layer, by their Hugging Face names."""
        return {
            "self_attn.q_proj": (self.q_width, self.hidden),
            "self_attn.k_proj": (self.kv_width, self.hidden),
            "self_attn.v_proj": (self.kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.q_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included."""
        layer = sum(out * width for out, width in self.linear_shapes.values()) + 2 * self.hidden
        layer += (self.q_width + 2 * self.kv_width) if self.qkv_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + tables + self.hidden

    def kv_bytes_per_token(self, bytes_per_value: float) -> float:
        """Bytes of keys and values that one token keeps over all layers."""
        return 2 * self.layers * self.kv_width * bytes_per_value


class _Fields:
    """Typed look-ups in a foreign config that collect every complaint before raising once."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.offenders: list[str] = []

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.offenders.append(f"{name}: expected a positive integer, found {value!r}")
            return 1
        if value > most:
            self.offenders.append(f"{name}: more than {most:,}, which no model has")
            return 1
        return value

    def number(self, name: str, source: Mapping[str, Any], default: float | None = None) -> float:
        value = source.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST:
            self.offenders.append(f"{name}: expected a positive number, found {value!r}")
            return 1.0
        return float(value)

    def table(self, name: str) -> Mapping[str, Any]:
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            self.offenders.append(f"{name}: expected a table, found {value!r}")
            return {}
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            self.offenders.append(f"{name}: expected true or false, found {value!r}")
            return False
        return value

    def raise_if_any(self) -> None:
        if self.offenders:
            raise ConfigError(
                "not a complete model configuration",
                where=self.where,
                offenders=self.offenders,
                hint="take the config.json that was published with these weights",
            )


def read_model_spec(directory: Path) -> ModelSpec:
    """The spec of the checkpoint in ``directory``. Raises :class:`ConfigError` or :class:`UnsupportedError`."""
    path = directory / "config.json"
    return spec_from_config(read_json(path), where=str(path))


def spec_from_config(config: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
    """Read a Hugging Face configuration, old spelling or new."""
    family = _family(config, where)
    fields = _Fields(config, where)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    # Qwen3 without the key has heads of 128, whatever its width: transformers' default for this family alone.
    usual = 128 if family == "qwen3" and "head_dim" not in config else hidden // max(heads, 1)
    head_dim = fields.integer("head_dim", default=usual)
    kv_heads = fields.integer("num_key_value_heads", default=heads if family == "llama" else None)
    max_positions = fields.integer("max_position_embeddings")
    spec = ModelSpec(
        family=family,
        layers=fields.integer("num_hidden_layers", most=_MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        rope=_rope(fields, max_positions),
        norm_eps=fields.number("rms_norm_eps", config),
        # Qwen2's bias is part of the architecture; the other two say it (null counts as false, as in transformers).
        qkv_bias=True if family == "qwen2" else fields.flag("attention_bias", default=False),
        qk_norm=family == "qwen3",
        # transformers' own default for a missing key: false for these three families.
        tied=fields.flag("tie_word_embeddings", default=False),
        max_positions=max_positions,
        dtype=_dtype(fields),
    )
    _contradictions(fields, spec)
    fields.raise_if_any()
    return spec


def _family(config: Mapping[str, Any], where: str) -> Family:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is None:
        by_type = {model_type: family for family, model_type in _MODEL_TYPES.items()}
        family = by_type.get(str(config.get("model_type")))
        if family is not None:
            return family
        name = config.get("model_type")
    if str(name) not in _ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {name!r} is not supported",
            where=where,
            hint=f"supported: {', '.join(_ARCHITECTURES)}",
        )
    return _ARCHITECTURES[str(name)]


def _dtype(fields: _Fields) -> Dtype:
    old, new = fields.config.get("torch_dtype"), fields.config.get("dtype")
    if old is not None and new is not None and old != new:
        fields.offenders.append(f"dtype: {new!r} contradicts torch_dtype {old!r}")
    value = str(new if new is not None else old).removeprefix("torch.")
    if value == "bfloat16":
        return "bfloat16"
    if value == "float16":
        return "float16"
    if value != "float32":
        fields.offenders.append(f"dtype (or torch_dtype): expected bfloat16, float16 or float32, found {value!r}")
    return "float32"


def _rope(fields: _Fields, max_positions: int) -> RopeSpec:
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    scaling = new or old
    sources = [source for source in (fields.config, new, old) if source.get("rope_theta") is not None]
    thetas = {fields.number("rope_theta", source) for source in sources}
    if len(thetas) != 1:
        said = "is missing (rope_theta or rope_parameters.rope_theta)" if not thetas else f"has two values {thetas}"
        fields.offenders.append(f"rope theta {said}")
    kinds = {str(s.get("rope_type") or s.get("type") or "default") for s in (new, old) if s} or {"default"}
    kind = kinds.pop() if len(kinds) == 1 else "contradictory"
    theta = thetas.pop() if thetas else 1.0
    if kind == "default":
        if scaling.get("factor") not in (None, 1):
            # transformers 5 takes it for the default and scales nothing, other readers refuse it.
            fields.offenders.append(f"rope scaling: a factor of {scaling['factor']!r}, but no rope_type that uses one")
        return RopeSpec(theta=theta)
    if kind not in _SCALING_FIELDS:
        raise UnsupportedError(
            f"rope scaling {kind!r} is not supported", where=fields.where,
            hint=f"supported: default, {', '.join(_SCALING_FIELDS)}",
        )  # fmt: skip
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise UnsupportedError(f"{kind} with mscale is not supported", where=fields.where)
    known = {*_SCALING_FIELDS[kind], "rope_theta", "rope_type", "type"}
    fields.offenders += [f"rope scaling: unknown key {key!r}" for key in scaling if key not in known]
    fields.offenders += [
        f"{key}: {new[key]!r} in rope_parameters contradicts {old[key]!r} in rope_scaling"
        for key in _SCALING_FIELDS[kind]
        if key in new and key in old and new[key] != old[key]
    ]
    return _yarn(fields, scaling, theta, max_positions) if kind == "yarn" else _llama3(fields, scaling, theta)


def _yarn(fields: _Fields, scaling: Mapping[str, Any], theta: float, max_positions: int) -> RopeSpec:
    attention = scaling.get("attention_factor")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=fields.number("factor", scaling),
        original_max_positions=int(fields.number("original_max_position_embeddings", scaling, default=max_positions)),
        beta_fast=fields.number("beta_fast", scaling, default=32.0),
        beta_slow=fields.number("beta_slow", scaling, default=1.0),
        attention_factor=None if attention is None else fields.number("attention_factor", scaling),
        truncate=bool(scaling.get("truncate", True)),
    )


def _llama3(fields: _Fields, scaling: Mapping[str, Any], theta: float) -> RopeSpec:
    low, high = fields.number("low_freq_factor", scaling), fields.number("high_freq_factor", scaling)
    if low >= high:
        fields.offenders.append(f"rope scaling: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
    return RopeSpec(
        theta=theta,
        kind="llama3",
        factor=fields.number("factor", scaling),
        original_max_positions=int(fields.number("original_max_position_embeddings", scaling)),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _contradictions(fields: _Fields, spec: ModelSpec) -> None:
    """What parses but cannot be meant."""
    if spec.heads % spec.kv_heads:
        fields.offenders.append(
            f"num_attention_heads {spec.heads} is no multiple of num_key_value_heads {spec.kv_heads}"
        )
    if spec.head_dim % 2:
        fields.offenders.append(f"head_dim {spec.head_dim} is odd: rotary embedding needs pairs")
    act = fields.config.get("hidden_act", "silu")
    if act != "silu":
        fields.offenders.append(f"hidden_act {act!r}: only silu is known for this family")
    if fields.config.get("mlp_bias"):
        fields.offenders.append("mlp_bias true: not supported")
    if spec.family != "qwen2" and fields.config.get("attention_bias"):
        fields.offenders.append("attention_bias true: o_proj then has a bias too, which is not supported")
    if fields.config.get("use_sliding_window"):
        fields.offenders.append("use_sliding_window true: sliding-window attention is not supported")
    kinds = fields.config.get("layer_types") or []
    others = sorted({str(kind) for kind in kinds} - {"full_attention"}) if isinstance(kinds, list) else [str(kinds)]
    if others:
        fields.offenders.append(f"layer_types: only full_attention is supported, found {', '.join(others)}")


def spec_to_config(spec: ModelSpec) -> dict[str, Any]:
    """A ``config.json`` that transformers 4.53 to 5.x read alike: both spellings of theta and dtype."""
    rope = {"rope_theta": spec.rope.theta, "rope_type": spec.rope.kind}
    scaling: dict[str, Any] | None = None
    if spec.rope.kind != "default":
        scaling = _scaling_to_config(spec.rope)
        rope = {**scaling, "rope_theta": spec.rope.theta}
    config: dict[str, Any] = {
        "architectures": [next(name for name, family in _ARCHITECTURES.items() if family == spec.family)],
        "model_type": _MODEL_TYPES[spec.family],
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope.theta,
        "rope_parameters": rope,
        "tie_word_embeddings": spec.tied,
        "dtype": spec.dtype,
        "torch_dtype": spec.dtype,
    }
    if scaling is not None:
        config["rope_scaling"] = scaling
    if spec.family != "qwen2":
        config["attention_bias"] = spec.qkv_bias
    return config


def spec_as_dict(spec: ModelSpec) -> dict[str, Any]:
    """Plain data for machine-readable output."""
    return asdict(spec)


def _scaling_to_config(rope: RopeSpec) -> dict[str, Any]:
    scaling = {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    if rope.kind == "llama3":
        return {**scaling, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    if rope.attention_factor is not None:
        scaling["attention_factor"] = rope.attention_factor
    if not rope.truncate:
        scaling["truncate"] = False
    return scaling
