"""Ranks' shares put together are the whole product, by the definition of each format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import save_tiny
from trtkit.checkpoint.rank_share import RankShare, check_shares, share_rows, share_spec
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.errors import UnsupportedError
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.quant.tensor import (
    LinearWeights,
    concat_rows,
    dense,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from trtkit.scheme import SCHEMES

SPEC = ModelSpec(
    family="qwen2", layers=1, hidden=256, heads=8, kv_heads=2, head_dim=64, intermediate=1024, vocab=1000,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=True, qk_norm=False, tied=False, max_positions=512,
    dtype="bfloat16",
)  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """Random weights in ``precision``, with everything that a format may carry."""

    precision: str
    spec: ModelSpec = SPEC

    def parts(self, layer: int, name: LinearName) -> Sequence[LinearWeights]:
        torch.manual_seed(layer + len(name))
        shapes = [SPEC.linear_shapes[part] for part in LINEAR_PARTS[name]]
        matrices = [torch.randn(shape) / 16 for shape in shapes]
        joint = torch.stack([matrix.abs().amax() for matrix in matrices]).amax()
        pre = torch.rand(shapes[0][1]) + 0.5 if self.precision in ("int4", "int8-sq") else None
        step = torch.tensor(0.02) if self.precision in ("fp8", "int8-sq") else None
        stored = {
            "bf16": dense,
            "int8": lambda matrix: quantize_int8(matrix, steps=128),
            "int8-sq": lambda matrix: quantize_int8(matrix, steps=127),
            "fp8": lambda matrix: quantize_fp8(matrix, amax=joint),
            "int4": quantize_int4,
        }[self.precision]
        return [
            LinearWeights(weight=stored(matrix), bias=torch.randn(len(matrix)), input_scale=step, pre_scale=pre)
            for matrix in matrices
        ]

    def norms(self, layer: int) -> Norms:
        return Norms(input=torch.ones(SPEC.hidden), post=torch.ones(SPEC.hidden))

    def kv_scales(self, layer: int) -> None:
        return None

    def embedding(self) -> Tensor:
        return torch.randn(SPEC.vocab, SPEC.hidden)

    def final_norm(self) -> Tensor:
        return torch.ones(SPEC.hidden)

    def lm_head(self) -> Tensor:
        return self.embedding()


def _shares(precision: str, name: LinearName, ranks: int) -> list[LinearWeights]:
    return [RankShare(whole=_Source(precision), rank=rank, ranks=ranks).linear(0, name) for rank in range(ranks)]


def _by_heads(product: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k and v of a qkv product, each (T, heads, D)."""
    return list(product.view(len(product), -1, SPEC.head_dim).split([heads, kv_heads, kv_heads], dim=1))


@pytest.mark.parametrize("precision", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_of_every_product_make_the_whole(precision: str, ranks: int) -> None:
    """Four ranks: each KV head belongs to two of them."""
    torch.manual_seed(1)
    for name in LINEAR_PARTS:
        whole = concat_rows(_Source(precision).parts(0, name))
        x = torch.randn(5, whole.weight.shape[1])
        expected, shares = linear_reference(x, whole), _shares(precision, name, ranks)
        assert all(share.weight.format == whole.weight.format for share in shares)
        if name in ("o", "down"):
            inputs = x.chunk(ranks, dim=1)
            found = sum(linear_reference(part, share) for part, share in zip(inputs, shares, strict=True))
            assert isinstance(found, Tensor)
        elif name == "gate_up":
            halves = [linear_reference(x, share).chunk(2, dim=1) for share in shares]
            found = torch.cat([half for kind in zip(*halves, strict=True) for half in kind], dim=1)
        else:
            local = share_spec(SPEC, ranks)
            split = [_by_heads(linear_reference(x, share), local.heads, local.kv_heads) for share in shares]
            for head in range(SPEC.heads):  # with its own key and value heads on its own rank
                rank, place = divmod(head, local.heads)
                q, k, v = _by_heads(expected, SPEC.heads, SPEC.kv_heads)
                there = head // (SPEC.heads // SPEC.kv_heads)
                here = place // (local.heads // local.kv_heads)
                torch.testing.assert_close(split[rank][0][:, place], q[:, head], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(split[rank][1][:, here], k[:, there], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(split[rank][2][:, here], v[:, there], atol=1e-4, rtol=1e-4)
            continue
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_shares_are_no_larger_than_they_must_be() -> None:
    """A view into the whole would keep the whole in memory."""
    share = _shares("int4", "down", 4)[1]
    assert share.weight.data.untyped_storage().nbytes() == share.weight.data.nbytes == 256 // 2 * 1024 // 4
    assert share.weight.scale is not None
    assert share.weight.scale.shape == (256, 2)
    assert share.pre_scale is not None
    assert share.pre_scale.shape == (256,)


def test_every_row_of_lm_head_is_on_one_rank(tmp_path: Path) -> None:
    whole = open_unified(save_tiny(tmp_path, vocab_size=140))
    parts = [RankShare(whole=whole, rank=rank, ranks=3).lm_head() for rank in range(3)]
    assert [len(part) for part in parts] == [64, 64, 64]
    together = torch.cat(parts)
    assert torch.equal(together[:140], whole.lm_head())
    assert not together[140:].any()
    assert share_rows(torch.empty(151_936, 1), 3, 4).shape == (38_016, 1)


def test_what_cannot_be_shared_out_is_refused_all_at_once() -> None:
    check_shares(SPEC, SCHEMES["int4"], 4)  # KV heads may be there twice
    check_shares(SPEC, SCHEMES["bf16"], 8)
    odd = dataclasses.replace(SPEC, heads=9, kv_heads=3, intermediate=1023)
    with pytest.raises(UnsupportedError) as refused:
        check_shares(odd, SCHEMES["bf16"], 2)
    assert refused.value.offenders == ("9 attention heads", "3 KV heads", "an intermediate size of 1023")
    assert refused.value.hint == "one has to do"
    with pytest.raises(UnsupportedError) as refused:
        check_shares(SPEC, SCHEMES["int4"], 8)
    assert refused.value.offenders == ("queries 512: int4 has groups of 128",)
    assert refused.value.hint == "it can over 4"
    # The published 14B shape in int4: 13,824 columns are 108 groups.
    qwen = dataclasses.replace(SPEC, heads=40, kv_heads=8, head_dim=128, intermediate=13_824)
    check_shares(qwen, SCHEMES["int4"], 4)
    with pytest.raises(UnsupportedError, match="intermediate size 13824: int4 has groups of 128"):
        check_shares(qwen, SCHEMES["int4"], 8)
