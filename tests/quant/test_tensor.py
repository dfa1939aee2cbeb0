"""The formats against their definitions, and the bounds that follow from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import quantizers as reference
from trtkit.quant.packing import pack_int4, unpack_int4
from trtkit.quant.tensor import (
    LinearWeights,
    QuantTensor,
    concat_rows,
    dense,
    dequantize,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)


def weights(rows: int, width: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Random rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, width, generator=generator)
    return plain * torch.logspace(-spread, spread, rows)[:, None]


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10_000))
def test_pack_and_unpack_are_inverses(pairs: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2 * pairs, width), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.tolist() == reference.pack_pairs(codes.tolist())
    assert torch.equal(unpack_int4(packed), codes)


@pytest.mark.parametrize("steps", [127, 128])
def test_int8_codes_follow_the_definition(steps: int) -> None:
    # float64 arithmetic in the reference, float32 in the code: the values are chosen so that both divide exactly.
    weight = torch.tensor([[0.5, -1.0, 0.25, 1.0], [-3.0, 1.5, 0.0, 0.046875], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = reference.int8_rows(weight.double().tolist(), steps)
    found = quantize_int8(weight, steps=steps)
    assert found.data.tolist() == codes
    assert found.scale is not None
    assert found.scale.tolist() == pytest.approx(scales)


def test_int8_rounds_halves_away_from_zero() -> None:
    weight = torch.tensor([[128.0, 0.5, 1.5, -0.5, -2.5]])
    assert quantize_int8(weight, steps=128).data.tolist() == [[127, 1, 2, -1, -3]]


def test_w8a16_makes_codes_with_the_unrounded_scale_and_stores_the_rounded_one() -> None:
    small = weights(16, 64, 3).half() * 2e-3
    scale = quantize_int8(small, steps=128).scale
    assert scale is not None
    # In float16 small scales are subnormal numbers, and lose digits.
    assert torch.equal(scale, (small.float().abs().amax(dim=1) / 128).half().float())
    assert not torch.equal(scale, small.float().abs().amax(dim=1) / 128)
    weight = weights(16, 64, 3).bfloat16()
    found = quantize_int8(weight, steps=128)
    exact = weight.float().abs().amax(dim=1) / 128
    assert found.scale is not None
    assert torch.equal(found.scale, exact.bfloat16().float())
    codes, _ = reference.int8_rows(weight.double().tolist(), 128)
    assert (found.data.int() - torch.tensor(codes)).abs().max() <= 1  # ties fall either way between 32 and 64 bit
    assert (found.data.int() == torch.tensor(codes)).float().mean() > 0.999


def test_int4_codes_follow_the_definition() -> None:
    weight = weights(6, 256, 5)
    codes, scales = reference.int4_groups(weight.double().tolist(), 128)
    found = quantize_int4(weight)
    assert found.data.tolist() == reference.pack_pairs(codes)
    assert found.scale is not None
    torch.testing.assert_close(found.scale, torch.tensor(scales))


def test_fp8_codes_are_the_nearest_e4m3_values() -> None:
    weight = weights(4, 64, 7)
    found = quantize_fp8(weight)
    assert found.scale is not None
    for value, code in zip(
        (weight / found.scale).flatten().tolist(), found.data.float().flatten().tolist(), strict=True
    ):
        assert code in reference.nearest_e4m3(value)


@given(st.integers(0, 10_000), st.sampled_from(["int8", "int8-sq", "fp8", "int4"]))
def test_error_is_bounded_by_the_step(seed: int, kind: str) -> None:
    weight = weights(8, 256, seed)
    if kind == "int4":
        found = quantize_int4(weight)
        assert found.scale is not None
        bound = found.scale.repeat_interleave(128, dim=1) / 2
    elif kind == "fp8":
        found = quantize_fp8(weight)
        assert found.scale is not None
        # Half of the last of 3 mantissa bits, and half the subnormal step near zero.
        bound = torch.maximum(weight.abs() / 16, found.scale * 2.0**-10)
    else:
        found = quantize_int8(weight, steps=128 if kind == "int8" else 127)
        assert found.scale is not None
        # With 128 steps the positive extreme is cut by one step.
        bound = found.scale[:, None] * (1.0 if kind == "int8" else 0.5)
    assert ((dequantize(found) - weight).abs() <= bound * 1.0001 + 1e-12).all()


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_zero_weights_stay_zero_and_finite(kind: str) -> None:
    zero = torch.zeros(4, 128)
    found: QuantTensor = {
        "int8": lambda: quantize_int8(zero, steps=128), "fp8": lambda: quantize_fp8(zero),
        "int4": lambda: quantize_int4(zero),
    }[kind]()  # fmt: skip
    assert found.scale is not None
    assert torch.isfinite(found.scale).all()
    assert torch.equal(dequantize(found), zero)


def test_reference_product_applies_pre_scale_then_rounds_then_multiplies() -> None:
    linear = LinearWeights(
        weight=QuantTensor(data=torch.tensor([[2, -1]], dtype=torch.int8), scale=torch.tensor([0.5]),
                           format="int8", shape=(1, 2)),
        bias=torch.tensor([10.0]),
        input_scale=torch.tensor(0.1),
        pre_scale=torch.tensor([1.0, 2.0]),
    )  # fmt: skip
    # x * pre = (0.34, 1.12) -> steps (3, 11) -> (0.3, 1.1); 0.5 * (2 * 0.3 - 1.1) + 10
    assert float(linear_reference(torch.tensor([[0.34, 0.56]]), linear)) == pytest.approx(9.75)
    assert not math.isnan(float(linear_reference(torch.tensor([[1e6, -1e6]]), linear)))


def test_concat_rows_is_the_product_of_the_parts() -> None:
    x = torch.randn(3, 256)
    parts = [LinearWeights(weight=quantize_int4(weights(rows, 256, rows)), bias=torch.randn(rows)) for rows in (4, 2)]
    together = linear_reference(x, concat_rows(parts))
    torch.testing.assert_close(together, torch.cat([linear_reference(x, part) for part in parts], dim=1))
    assert concat_rows([LinearWeights(weight=dense(torch.ones(2, 2)))]).weight.shape == (2, 2)
