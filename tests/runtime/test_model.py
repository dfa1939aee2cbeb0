"""The decoder over the block cache against transformers: the logits of every family, prefilled and decoded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import random_prompts, request
from tests.tiny import LLAMA3, YARN, save_tiny, tiny_model
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.decoder import LinearName, causal_attention, inverse_frequencies
from trtkit.model_spec import read_model_spec
from trtkit.quant.tensor import LinearWeights, dense
from trtkit.runtime import decode
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.prefill import Stretch, prefill
from trtkit.runtime.scheduler import Scheduler
from trtkit.scheme import OutputLayer

CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 128}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen2", {"rope_scaling": YARN}),
    ("qwen3", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": LLAMA3}),
]


def _harness(
    directory: Path, dtype: torch.dtype, output_layer: OutputLayer, **kv: Any
) -> tuple[DecoderModel, KvCache, Scheduler]:
    model = DecoderModel(
        open_unified(directory), device=torch.device("cpu"), dtype=dtype, max_tokens=256, output_layer=output_layer
    )
    cache = KvCache(
        model.spec, blocks=64, block_size=16, max_rows=4, max_tokens=256, dtype=dtype,
        device=torch.device("cpu"), **{"kv_dtype": "model", **kv},
    )  # fmt: skip
    return model, cache, Scheduler(BlockAllocator(64), block_size=16, max_rows=4)


def decode_logits(directory: Path, prompt: tuple[int, ...], following: tuple[int, ...], dtype: torch.dtype,
                  output_layer: OutputLayer = "model", **kv: Any) -> torch.Tensor:  # fmt: skip
    """Logits after the prompt and after each following token, prompt prefilled, the rest one by one. (1 + n, V)"""
    model, cache, scheduler = _harness(directory, dtype, output_layer, **kv)
    scheduler.submit(request("r", prompt, max_tokens=len(following) + 1))
    collected = []
    with torch.inference_mode():
        for token in (*following, None):
            plan = scheduler.schedule(nodes=1)
            fresh = [Stretch(tokens=p.tokens, cached=0, blocks=p.blocks) for p in plan.prefills]
            prefill(model, cache, fresh)
            cache.copy_blocks(plan.copies)
            at = decode.pending(cache, plan.rows, 1)
            verified = decode.verify(model, cache, at, decode.root_only(at))
            collected.append(verified.logits[0, 0].float())
            if token is not None:
                plan.rows[0].tokens.append(token)
                plan.rows[0].cached += 1
    return torch.stack(collected)


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda case: str(case)[:40])
def test_logits_match_transformers(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    save_tiny(tmp_path, family, **changes)
    (tokens,) = random_prompts(1, [130])
    wanted = tiny_model(family, **changes)(torch.tensor([tokens])).logits[0].detach()
    for split in (1, 16, 17, 100):
        ours = decode_logits(tmp_path, tokens[:split], tokens[split : split + 20], torch.float32)
        torch.testing.assert_close(ours, wanted[split - 1 : split + 20], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 0.5},
        {"attention_factor": 1.3},
        {"truncate": False},
        {"beta_fast": 8.0, "beta_slow": 0.25},
        {"original_max_position_embeddings": 5},
        {"original_max_position_embeddings": 10_000_000},
    ],
    ids=str,
)
def test_the_options_of_yarn_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_model(num_hidden_layers=1, rope_scaling={**YARN, **changes}).config
    config.save_pretrained(tmp_path)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    spec = read_model_spec(tmp_path)
    speeds, factor = inverse_frequencies(spec.rope, spec.head_dim)
    torch.testing.assert_close(speeds, wanted, rtol=1e-6, atol=0)
    assert factor == pytest.approx(wanted_factor)


class _Scaled:
    """A checkpoint with a scale in front of every product, which the weights take back."""

    def __init__(self, checkpoint: UnifiedCheckpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        weights = self._checkpoint.linear(layer, name)
        scale = torch.empty(weights.weight.data.shape[1]).uniform_(0.3, 3)
        return dataclasses.replace(weights, weight=dense(weights.weight.data / scale), pre_scale=scale)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_scales_in_front_of_the_products_are_applied(tmp_path: Path, family: str) -> None:
    """Those of AWQ and SmoothQuant, some of them folded into norms."""
    scaled = _Scaled(open_unified(save_tiny(tmp_path, family)))
    model = DecoderModel(scaled, device=torch.device("cpu"), dtype=torch.float32, max_tokens=32)
    tokens = torch.randint(0, 320, (32,))
    found = model.logits(model.forward(tokens, torch.arange(32), lambda layer: causal_attention))
    torch.testing.assert_close(found, tiny_model(family)(tokens[None]).logits[0], rtol=0, atol=1e-4)


def test_prefill_in_passes_equals_prefill_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than one pass is cut, and later parts see the earlier ones through the cache."""
    save_tiny(tmp_path)
    (tokens,) = random_prompts(2, [120])
    whole = decode_logits(tmp_path, tokens, (), torch.float32)
    monkeypatch.setattr("trtkit.runtime.prefill.PREFILL_TOKENS", 37)
    torch.testing.assert_close(decode_logits(tmp_path, tokens, (), torch.float32), whole, rtol=0, atol=1e-4)


def test_bfloat16_and_fp8_cache_stay_close(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tokens,) = random_prompts(3, [60])
    exact = decode_logits(tmp_path, tokens[:40], tokens[40:], torch.float32)
    for dtype, kv_dtype, limit in ((torch.bfloat16, "model", 0.05), (torch.float32, "fp8", 0.15)):
        ours = decode_logits(tmp_path, tokens[:40], tokens[40:], dtype, kv_dtype=kv_dtype)
        error = (ours - exact).norm() / exact.norm()
        assert 0 < error < limit, f"{dtype} with {kv_dtype} cache: {error:.3f}"
