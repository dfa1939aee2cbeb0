"""The table of names, and the sharing out of tensors: every value lands on the rank that computes with it."""

from __future__ import annotations

import pytest
import torch

from trtkit.checkpoint.hf import expected_shapes
from trtkit.checkpoint.names import LINEARS, NORMS, TABLES, TrtLinear, tensor_axes
from trtkit.checkpoint.trtllm_split import merge_part, share
from trtkit.model_spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="qwen3", layers=1, hidden=8, heads=8, kv_heads=2, head_dim=2, intermediate=16, vocab=10,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=True, qk_norm=True, tied=False, max_positions=64, dtype="float32",
)  # fmt: skip


def test_every_tensor_of_a_model_has_a_place() -> None:
    named = set(TABLES.values()) | {f"model.layers.0.{name}" for name in NORMS.values()}
    named |= {f"model.layers.0.{part}.weight" for linear in LINEARS for part in linear.parts}
    assert named == {name for name in expected_shapes(SPEC) if not name.endswith(".bias")}


def test_the_naming_trap_of_the_mlp() -> None:
    # TensorRT-LLM: proj(silu(fc x) * gate x).
    parts = {linear.name: linear.parts for linear in LINEARS}
    assert parts["mlp.fc"] == ("mlp.gate_proj",)
    assert parts["mlp.gate"] == ("mlp.up_proj",)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_heads_stay_whole_and_kv_heads_are_repeated(ranks: int) -> None:
    # Each row carries its head's number, so a rank's rows say which heads it has.
    q = torch.arange(8).repeat_interleave(2)[:, None].float()
    k = 100 + torch.arange(2).repeat_interleave(2)[:, None].float()
    v = k + 100
    seen = []
    for rank in range(ranks):
        rows = share([q, k, v], ("out", "in"), "heads", rank=rank, ranks=ranks, kv_heads=2).flatten().tolist()
        mine = [int(row) for row in rows if row < 100]
        keys = {int(row) - 100 for row in rows if 100 <= row < 200}
        assert keys == {head // 4 for head in mine}, "query heads attend to the KV head of their group"
        assert {int(row) - 200 for row in rows if row >= 200} == keys
        seen += mine
    assert seen == q.flatten().int().tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("linear", LINEARS, ids=lambda linear: linear.name)
def test_shares_merge_to_what_was_shared(linear: TrtLinear, ranks: int) -> None:
    for tensor, kind in (("weight", "bf16"), ("weight_scale", "int4"), ("weight_scale", "int8"), ("bias", "bf16")):
        axes = tensor_axes(tensor, kind)
        if tensor == "bias" and linear.split == "columns":
            continue
        sizes = [SPEC.linear_shapes[part] for part in linear.parts]
        parts = [torch.randn(size[: len(axes)]) for size in sizes]
        shares = [share(parts, axes, linear.split, rank=rank, ranks=ranks, kv_heads=2) for rank in range(ranks)]
        for index, part in enumerate(parts):
            merged = merge_part(shares, axes, linear.split, index, heads=8, kv_heads=2)
            assert torch.equal(merged, part)
