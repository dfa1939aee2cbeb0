"""The pointwise kernels against plain torch: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.runtime.cuda.interpreting import correct_numerics
from trtkit.decoder import Norms, PlainPointwise, Rope
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.runtime.cuda.pointwise import TritonPointwise

PLAIN, FAST = PlainPointwise(), TritonPointwise()
SPEC = ModelSpec(
    family="qwen3", layers=1, hidden=200, heads=3, kv_heads=1, head_dim=24, intermediate=1100, vocab=1000,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied=True, max_positions=512,
    dtype="bfloat16",
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        correct_numerics(monkeypatch)


def normal(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes).mul(3).to(device, dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """Within one step of the dtype: the sums of a norm may be taken in another order."""
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=step, atol=step / 100)


@DTYPES
def test_norms_are_those_of_torch(device: torch.device, dtype: torch.dtype) -> None:
    x, delta = normal(device, dtype, 3, 200), normal(device, dtype, 3, 200)
    weight = torch.rand(200, device=device) + 0.5
    close(FAST.norm(x, weight, 1e-6), PLAIN.norm(x, weight, 1e-6))
    # A small row shows the epsilon, and a slice of a wider matrix the stride.
    close(FAST.norm(x[:, :150] / 3000, weight[:150], 1e-6), PLAIN.norm(x[:, :150] / 3000, weight[:150], 1e-6))
    total, normed = PLAIN.add_norm(x, delta, weight, 1e-6)
    mine, mine_normed = FAST.add_norm(x, delta, weight, 1e-6)
    assert torch.equal(mine, total), "the residual is rounded once, like torch's sum"
    close(mine_normed, normed)


@DTYPES
@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_are_normed_and_turned(device: torch.device, dtype: torch.dtype, qk_norm: bool) -> None:
    qkv, weight = normal(device, dtype, 2, 5 * 24), torch.rand(2, 24, device=device) + 0.5
    # Not a real rotation: each of its numbers counts.
    rope = Rope(normal(device, dtype, 2, 1, 24), normal(device, dtype, 2, 1, 24))
    norms = Norms(input=weight[0], post=weight[0])
    if qk_norm:
        norms = dataclasses.replace(norms, q=weight[0], k=weight[1])
    expected = PLAIN.heads(SPEC, norms, qkv.clone(), rope)
    found = FAST.heads(SPEC, norms, qkv, rope)
    for mine, theirs in zip(found, expected, strict=True):
        if qk_norm:  # a norm that is one step off, times cos and sin of up to 10
            step = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=step)
        else:
            assert torch.equal(mine, theirs), "nothing but roundings in the same places"


@DTYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_gate_is_rounded_as_torch_rounds_it(device: torch.device, dtype: torch.dtype) -> None:
    gate_up = normal(device, dtype, 2, 2200)
    gate_up[0, :3] = torch.tensor([-90.0, 90.0, 0.0])
    found, expected = FAST.gated(gate_up), PLAIN.gated(gate_up)
    close(found, expected)
    # An exponential that is a step off in float32 seldom shows in bf16; a rounding in another place shows in a third.
    assert dtype == torch.float32 or (found == expected).float().mean() > 0.98


def test_no_token_is_no_launch(device: torch.device) -> None:
    empty = torch.empty(0, 2200, device=device)
    assert FAST.gated(empty).shape == (0, 1100)
    assert FAST.norm(empty, torch.ones(2200, device=device), 1e-6).shape == (0, 2200)
