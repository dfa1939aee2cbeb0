"""Configurations as they were published, in the old spelling and the new, and those that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_model
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


@pytest.mark.parametrize("kind", ["llama3", "linear", "dynamic"])
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
    ],
)
def test_what_cannot_be_meant_is_named(changes: dict[str, Any], offender: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_from_config({**QWEN25_14B, **changes})
    assert offender in caught.value.offenders


def test_an_architecture_that_is_no_name() -> None:
    with pytest.raises(UnsupportedError, match="not supported"):
        spec_from_config({**QWEN25_14B, "architectures": [["Qwen2ForCausalLM"]]})
