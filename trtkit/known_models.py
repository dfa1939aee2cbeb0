"""The architectures of the Fast-Math 14B checkpoints as data, so that ``plan`` works without a download.

A build never uses these: it reads the checkpoint's own config.json.
"""

from __future__ import annotations

from dataclasses import replace

from trtkit.model_spec import ModelSpec, RopeSpec

__all__ = ["KNOWN_MODELS", "known_hub_id", "known_model"]

_QWEN25_14B = ModelSpec(
    family="qwen2", layers=48, hidden=5120, heads=40, kv_heads=8, head_dim=128, intermediate=13824, vocab=152064,
    rope=RopeSpec(theta=1e6), norm_eps=1e-5, qkv_bias=True, qk_norm=False, tied=False, max_positions=131072,
    dtype="bfloat16",
)  # fmt: skip
_QWEN3_14B = replace(
    _QWEN25_14B, family="qwen3", layers=40, intermediate=17408, vocab=151936, norm_eps=1e-6, qkv_bias=False,
    qk_norm=True, max_positions=40960,
)  # fmt: skip

KNOWN_MODELS: dict[str, tuple[str, ModelSpec]] = {
    "fast-math-r1-14b": ("RabotniKuma/Fast-Math-R1-14B", _QWEN25_14B),
    "nemotron-14b": ("RabotniKuma/Fast-OpenMath-Nemotron-14B", _QWEN25_14B),
    "fast-math-qwen3-14b": ("RabotniKuma/Fast-Math-Qwen3-14B", _QWEN3_14B),
}
"""Short name -> (hub id, architecture)."""


def known_model(name: str) -> ModelSpec | None:
    """The architecture of a short name or a hub id from the table, in any case; None for any other name."""
    found = _lookup(name)
    return None if found is None else found[1]


def known_hub_id(name: str) -> str | None:
    """The hub id behind any name that :func:`known_model` knows; None for any other name."""
    found = _lookup(name)
    return None if found is None else found[0]


def _lookup(name: str) -> tuple[str, ModelSpec] | None:
    wanted = name.lower()
    for short, (hub_id, spec) in KNOWN_MODELS.items():
        if wanted in (short, hub_id.lower(), hub_id.lower().rpartition("/")[2]):
            return hub_id, spec
    return None
