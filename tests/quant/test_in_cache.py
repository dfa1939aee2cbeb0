"""The fast quantizers give the bits of the definitions, whatever the block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trtkit.quant.in_cache import fp8_matrix, int4_matrix, int8_matrix, largest_magnitude
from trtkit.quant.tensor import QuantTensor, quantize_fp8, quantize_int4, quantize_int8

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(dtype: torch.dtype, rows: int) -> Tensor:
    """(rows, 256) with rows of every kind: random, ties between two codes, zeros, subnormal numbers, one outlier."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, 256)
    ties = torch.arange(256) / 2 - 64
    weight[0] = ties / ties.abs().amax() * 0.5
    weight[1] = ties / 64
    weight[2] = 0
    weight[3] *= 1e-40
    weight[4, 7] = 300
    weight[5] = -weight[5].abs()
    return weight.to(dtype)


def same(found: QuantTensor, expected: QuantTensor) -> None:
    assert found.scale is not None
    assert expected.scale is not None
    assert (found.format, found.shape, found.data.dtype) == (expected.format, expected.shape, expected.data.dtype)
    assert found.data.view(torch.uint8).equal(expected.data.view(torch.uint8))
    assert found.scale.dtype == expected.scale.dtype
    assert found.scale.equal(expected.scale)


@pytest.fixture(params=[256, 256 * 7, 1 << 18], ids=["pairs of rows", "blocks", "whole"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every size of the blocks."""
    monkeypatch.setattr("trtkit.quant.in_cache._BLOCK_VALUES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [6, 16, 17])
def test_int8_and_fp8_are_the_definitions(dtype: torch.dtype, scaled: bool, rows: int) -> None:
    weight = weights(dtype, rows)
    pre = (torch.rand(256) + 0.5).to(dtype) if scaled else None
    given = weight if pre is None else weight.float() / pre.float()
    for steps in (127, 128):
        same(int8_matrix(weight, steps=steps, pre_scale=pre), quantize_int8(given, steps=steps))
    amax = largest_magnitude(weight)
    assert amax.equal(weight.abs().amax())
    same(fp8_matrix(weight, amax=amax, pre_scale=pre), quantize_fp8(given, amax=amax))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_int4_is_the_definition(dtype: torch.dtype, scaled: bool, clipped: bool) -> None:
    weight = weights(dtype, 16)
    pre = (torch.rand(256) + 0.5).to(dtype) if scaled else None
    clip = torch.rand(16, 2) / 2 + 0.5 if clipped else None
    given = weight if pre is None else weight.float() / pre.float()
    found = int4_matrix(weight, group_size=128, pre_scale=pre, clip=clip)
    same(found, quantize_int4(given, group_size=128, clip=clip))


@pytest.mark.parametrize("steps", [127, 128])
def test_every_bfloat16_rounds_like_the_definition(steps: int) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    weight = every[every.isfinite()].reshape(2, -1).sort(dim=1).values
    # Few magnitudes of a row lie near its largest: rows of neighbours are what tests the rounding.
    rows = weight.reshape(-1, 128)
    same(int8_matrix(rows, steps=steps), quantize_int8(rows, steps=steps))
    same(int4_matrix(rows, group_size=128), quantize_int4(rows))
