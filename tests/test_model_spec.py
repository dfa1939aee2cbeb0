"""Configurations as they were published, in the old spelling and the new, and those that cannot be meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from tests.tiny import tiny_model
from trtkit.decoder import inverse_frequencies
from trtkit.errors import ConfigError, UnsupportedError
from trtkit.known_models import known_model
from trtkit.model_spec import RopeSpec, spec_from_config, spec_to_config

QWEN25_14B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 13824, "max_position_embeddings": 131072, "max_window_layers": 48, "num_attention_heads": 40,
    "num_hidden_layers": 48, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN3_14B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17408, "max_position_embeddings": 40960,
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it."""
    left = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = dict(config.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), "rope_theta": config["rope_theta"], **scaling}
    layers = ["full_attention"] * config["num_hidden_layers"]
    return {**left, "dtype": config["torch_dtype"], "rope_parameters": rope, "layer_types": layers}


@pytest.mark.parametrize("spelling", [dict, new_spelling])
def test_published_configurations(spelling: Any) -> None:
    assert spec_from_config(spelling(QWEN25_14B)) == known_model("nemotron-14b")
    assert spec_from_config(spelling(QWEN3_14B)) == known_model("fast-math-qwen3-14b")
    long = spec_from_config(spelling({**QWEN25_14B, "rope_scaling": YARN}))
    assert long.rope == RopeSpec(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32768)
    assert spec_from_config(spec_to_config(long)) == long
    bare = {name: value for name, value in QWEN25_14B.items() if name not in ("tie_word_embeddings", "sliding_window")}
    assert spec_from_config(spelling({**bare, "head_dim": None})) == known_model("nemotron-14b")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_parameters_are_counted_as_transformers_does(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied, head_dim=32, num_key_value_heads=1)
    spec = spec_from_config({**model.config.to_dict(), "dtype": "float32"})
    assert spec.parameters == model.num_parameters()
    shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in spec.linear_shapes.items():
        assert shapes[f"model.layers.1.{name}"] == shape
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert 3 * spec.kv_bytes_per_token(4) == held


@pytest.mark.parametrize(
    "key", ["head_dim", "tie_word_embeddings", "attention_bias", "num_key_value_heads", "hidden_act"]
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_key_that_is_missing_means_what_it_means_to_transformers(family: str, key: str) -> None:
    config = tiny_model(family, tie_word_embeddings=False).config
    bare = {**config.to_dict(), "dtype": "float32"}
    bare.pop(key, None)
    if key == "num_key_value_heads" and family != "llama":
        with pytest.raises(ConfigError):  # theirs is 32, whatever the model: nobody can have meant that
            spec_from_config(bare)
        return
    spec, theirs = spec_from_config(bare), type(config).from_dict(bare)
    assert spec.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (spec.kv_heads, spec.tied) == (theirs.num_key_value_heads, theirs.tie_word_embeddings)


@pytest.mark.parametrize(
    "scaling",
    [
        {}, {"original_max_position_embeddings": 1024}, {"beta_fast": 20.0, "beta_slow": 2.0}, {"truncate": False},
        {"attention_factor": 0.75}, {"beta_fast": None, "beta_slow": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("written_back", [False, True])
def test_yarn_turns_like_transformers(scaling: dict[str, Any], written_back: bool) -> None:
    """Also where fields are left out, and from the config.json that we write."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, **scaling}
    base = {name: value for name, value in QWEN3_14B.items() if name not in ("rope_theta", "rope_scaling")}
    config = {**base, "max_position_embeddings": 4096, "rope_parameters": rope}
    if "original_max_position_embeddings" not in rope:
        config["max_position_embeddings"] = 1024
    spec = spec_from_config(config)
    if written_back:
        config = spec_to_config(spec)
        assert spec_from_config(config) == spec
    theirs = Qwen3RotaryEmbedding(Qwen3Config.from_dict(config))
    found, factor = inverse_frequencies(spec.rope, spec.head_dim)
    torch.testing.assert_close(found, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
"""Of Llama 3.1 and what was distilled into it."""


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"low_freq_factor": 0.5, "high_freq_factor": 9.0},
                                     {"original_max_position_embeddings": 64}])  # fmt: skip
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "written back"])
def test_llama3_turns_like_transformers(changes: dict[str, Any], spelling: str) -> None:
    rope = {**LLAMA3, **changes}
    base = {name: value for name, value in QWEN3_14B.items() if name not in ("rope_theta", "rope_scaling")}
    base |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config = {**base, "rope_parameters": rope}
    if spelling == "rope_scaling":
        old = {name: value for name, value in rope.items() if name != "rope_theta"}
        config = {**base, "rope_theta": rope["rope_theta"], "rope_scaling": old}
    spec = spec_from_config(config)
    if spelling == "written back":
        config = spec_to_config(spec)
        assert spec_from_config(config) == spec
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(config))
    found, factor = inverse_frequencies(spec.rope, spec.head_dim)
    torch.testing.assert_close(found, theirs.inv_freq, rtol=2e-6, atol=0)
    assert factor == theirs.attention_scaling == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"low_freq_factor": None}, "low_freq_factor"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings"),
        ({"low_freq_factor": 4.0}, "must be below high_freq_factor 4"),
        ({"beta_fast": 32.0}, "unknown key 'beta_fast'"),
    ],
)
def test_half_a_llama3_is_refused(changes: dict[str, Any], complaint: str) -> None:
    rope = {name: value for name, value in {**LLAMA3, **changes}.items() if value is not None}
    base = {name: value for name, value in QWEN3_14B.items() if name not in ("rope_theta", "rope_scaling")}
    with pytest.raises(ConfigError) as refused:
        spec_from_config({**base, "rope_parameters": rope})
    assert any(complaint in offender for offender in refused.value.offenders)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_what_we_write_is_what_transformers_reads(family: str) -> None:
    config = tiny_model(family).config
    spec = spec_from_config({**config.to_dict(), "dtype": "float32"})
    written = spec_to_config(replace(spec, dtype="float16"))
    read = type(config).from_dict(written)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "model_type",
    )  # fmt: skip
    assert {name: getattr(read, name) for name in names} == {name: getattr(config, name) for name in names}
    assert read.rope_parameters["rope_theta"] == config.rope_parameters["rope_theta"]
    assert str(read.dtype).removeprefix("torch.") == "float16"
    assert spec_from_config(written) == replace(spec, dtype="float16")


@pytest.mark.parametrize("kind", ["longrope", "linear", "dynamic"])
def test_other_rope_scalings_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        spec_from_config({**QWEN25_14B, "rope_scaling": {"rope_type": kind, "factor": 8.0}})


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_bias_on_the_output_projection_is_refused(family: str) -> None:
    model = tiny_model(family, attention_bias=True)
    assert any(name.endswith("o_proj.bias") for name in model.state_dict())  # which no layer of ours adds
    with pytest.raises(ConfigError, match="o_proj"):
        spec_from_config({**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"})


@pytest.mark.parametrize(
    ("changes", "offender"),
    [
        ({"rope_theta": "1e6"}, "rope_theta: expected a positive number, found '1e6'"),
        ({"rope_theta": [1e6]}, "rope_theta: expected a positive number, found [1000000.0]"),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected a table, found 'yarn'"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": "32k"}},
            "original_max_position_embeddings: expected a positive number, found '32k'",
        ),
        ({"rope_scaling": {**YARN, "factor": float("inf")}}, "factor: expected a positive number, found inf"),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "factor: 2.0 in rope_parameters contradicts 4.0 in rope_scaling",
        ),
        ({"rope_scaling": {**YARN, "fator": 4.0}}, "rope scaling: unknown key 'fator'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope theta has two values"),
        ({"rope_theta": None}, "rope theta is missing (rope_theta or rope_parameters.rope_theta)"),
        ({"dtype": "float16"}, "dtype: 'float16' contradicts torch_dtype 'bfloat16'"),
        ({"torch_dtype": "int8"}, "dtype (or torch_dtype): expected bfloat16, float16 or float32, found 'int8'"),
        ({"num_key_value_heads": 7}, "num_attention_heads 40 is no multiple of num_key_value_heads 7"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only silu"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: only full_attention is supported"),
        ({"rope_scaling": {"factor": 4.0}}, "rope scaling: a factor of 4.0, but no rope_type that uses one"),
        ({"hidden_size": True}, "hidden_size: expected a positive integer, found True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, found 0"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: more than 10,000, which no model has"),
        ({"hidden_size": 10**400}, "hidden_size: more than 2,147,483,647, which no model has"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a positive number, found 1000"),
        ({"vocab_size": 1.5}, "vocab_size: expected a positive integer, found 1.5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, found 'no'"),
        ({"num_key_value_heads": None}, "num_key_value_heads: expected a positive integer, found None"),
    ],
)
def test_what_cannot_be_meant_is_named(changes: dict[str, Any], offender: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_from_config({**QWEN25_14B, **changes})
    assert [said for said in caught.value.offenders if said.startswith(offender)]


def test_rope_that_says_two_things_or_what_we_do_not_do_is_refused() -> None:
    for scaling in ({**YARN, "mscale": 0.7}, {**YARN, "mscale_all_dim": 1.0}):
        with pytest.raises(UnsupportedError, match="mscale"):
            spec_from_config({**QWEN25_14B, "rope_scaling": scaling})
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN}
    with pytest.raises(UnsupportedError, match="contradictory"):
        spec_from_config({**QWEN25_14B, **both})


def test_dtypes_as_torch_prints_them() -> None:
    for name in ("bfloat16", "float16", "float32"):
        assert spec_from_config({**QWEN25_14B, "torch_dtype": f"torch.{name}"}).dtype == name


def test_an_architecture_that_is_no_name() -> None:
    with pytest.raises(UnsupportedError, match="not supported"):
        spec_from_config({**QWEN25_14B, "architectures": [["Qwen2ForCausalLM"]]})
