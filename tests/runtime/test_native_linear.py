"""The C++ linears against the product by definition, and the order of their sums, which nothing may change.

All kinds, on whatever CPU has the instructions: ``panels`` (AVX2 or AVX512), ``dots`` (its BF16) and ``tiles`` (AMX).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.runtime.native_here import need_kernels, need_product
from trtkit.quant.tensor import (
    LinearWeights,
    QuantTensor,
    dense,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from trtkit.runtime import linear
from trtkit.runtime.native.linear import PACKERS, Product, packed_product
from trtkit.runtime.native.packed import PackedLinear

KINDS = ["bf16", "int8", "int8-sq", "fp8", "fp8-weights", "int4"]
# Whole panels, part of a panel, less than one; widths of no multiple of 4; several pieces of 256; one group.
SHAPES = [(384, 256), (130, 333), (7, 30), (66, 1100), (64, 128)]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    need_kernels()


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights to a kernel; skips where this CPU has none for them."""

    product: Product

    def __call__(self, weights: LinearWeights) -> PackedLinear:
        need_product(self.product, weights)
        return PACKERS[self.product](weights)


@pytest.fixture(params=["panels", "dots", "tiles"])
def linear_of(request: pytest.FixtureRequest) -> Linear:
    return Linear(request.param)


def _weights(kind: str, out: int, width: int, *, plain: bool = False) -> LinearWeights:
    if kind == "int4":
        out, width = out + out % 2, -(-width // 128) * 128
    matrix = torch.randn(out, width) * 0.1
    makers: dict[str, Callable[[Tensor], QuantTensor]] = {
        "bf16": lambda w: dense(w.bfloat16()),
        "int8": lambda w: quantize_int8(w, steps=128),
        "int8-sq": lambda w: quantize_int8(w, steps=127),
        "fp8": quantize_fp8,
        "fp8-weights": quantize_fp8,
        "int4": quantize_int4,
    }
    step = {"int8-sq": 3.0 / 127, "fp8": 3.0 / 448}.get(kind)
    return LinearWeights(
        weight=makers[kind](matrix),
        bias=None if plain else torch.randn(out),
        input_scale=None if step is None else torch.tensor(step),
        pre_scale=None if plain else torch.rand(width) + 0.5,
    )


def _input(rows: int, weights: LinearWeights) -> Tensor:
    return torch.randn(rows, weights.weight.shape[1]).bfloat16()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_row_count_matches_the_definition(
    kind: str, shape: tuple[int, int], plain: bool, linear_of: Linear
) -> None:
    weights = _weights(kind, *shape, plain=plain)
    kernel = linear_of(weights)
    # Where bf16 is multiplied, pre_scale * x is rounded once more, to half of 2^-8 each.
    as_they_are = {"panels": KINDS, "dots": ["int8-sq"], "tiles": ["int8", "int8-sq"]}
    rounded_input = not plain and kind not in as_they_are[linear_of.product]
    spread = 2**-7 if rounded_input else 1e-3
    for rows in (1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 20, 32, 33, 121):
        x = _input(rows, weights)
        out, wanted = kernel(x), linear_reference(x, weights)
        assert out.dtype == torch.bfloat16
        assert out.shape == wanted.shape
        # One rounding to bf16 (half of 2^-8) and float32 sums: a hundredth of it for cancellation.
        torch.testing.assert_close(out.float(), wanted, rtol=2**-8, atol=spread * float(wanted.std()))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8-sq", "fp8", "int4"])
def test_a_row_does_not_depend_on_its_company(kind: str, linear_of: Linear) -> None:
    """Bit for bit: neither on the other rows, nor on how many there are, nor on the threads."""
    weights = _weights(kind, 2000, 640)
    kernel = linear_of(weights)
    x = _input(250, weights)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = kernel(x)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 11, 17, 32, 130, 250):
                for start in {0, 250 - rows, (250 - rows) // 3}:
                    assert torch.equal(kernel(x[start : start + rows]), whole[start : start + rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_large_input_leaves_the_others_exact(kind: str, linear_of: Linear) -> None:
    """The offset inside the packed numbers is taken off: an outlier against zero weights adds nothing visible."""
    weights = _weights(kind, 64, 256, plain=True)
    codes = weights.weight.data
    codes[:, 17] = 0
    x = _input(3, weights)
    x[:, 17] = 1000.0
    wanted = linear_reference(x, weights)
    torch.testing.assert_close(linear_of(weights)(x).float(), wanted, rtol=2**-8, atol=0.01 * float(wanted.std()))


@pytest.mark.parametrize("kind", ["fp8", "int8-sq"])
def test_activations_are_rounded_as_defined(kind: str, linear_of: Linear) -> None:
    """Every bf16 number but NaN, one at a time through an identity: codes, ties, subnormals and saturation."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    values = values[values.isfinite()]
    x = torch.zeros(len(values), 4, dtype=torch.bfloat16)
    x[:, 2] = values
    identity = torch.eye(4)
    weight = quantize_fp8(identity) if kind == "fp8" else quantize_int8(identity, steps=127)
    weights = LinearWeights(weight=weight, input_scale=torch.tensor(0.25))
    torch.testing.assert_close(linear_of(weights)(x), linear_reference(x, weights).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [3, 9, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_a_number_stays_alone(value: float, rows: int, linear_of: Linear) -> None:
    weights = _weights("int8", 64, 128)
    x = _input(rows, weights)
    clean = linear_of(weights)(x)
    x[2, 5] = value
    out = linear_of(weights)(x)
    assert not out[2].isfinite().any()
    others = [row for row in range(rows) if row != 2]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_multiplied_exactly(kind: str, linear_of: Linear) -> None:
    """All codes of a format, one at a time through a one: -128, e4m3's subnormal numbers, each of a byte's nibbles."""
    wide = torch.arange(-128, 128, dtype=torch.float32).view(1, 256).expand(64, 256).contiguous()
    if kind.startswith("fp8"):
        bytes_ = torch.arange(256, dtype=torch.uint8)
        bytes_[[0x7F, 0xFF]] = 0  # not a number
        stored = QuantTensor(
            data=bytes_.view(torch.float8_e4m3fn).expand(64, 256).contiguous(), scale=torch.tensor(0.5), format="fp8",
            shape=(64, 256),
        )  # fmt: skip
    elif kind == "int4":
        stored = quantize_int4(wide.remainder(15) - 7)
    elif kind == "bf16":
        stored = dense((wide / 3).bfloat16())
    else:
        stored = QuantTensor(data=wide.to(torch.int8), scale=torch.full((64,), 0.25), format="int8", shape=(64, 256))
    step = torch.tensor(1.0) if kind in ("int8-sq", "fp8") else None
    weights = LinearWeights(weight=stored, input_scale=step)
    x = torch.eye(256).bfloat16()
    torch.testing.assert_close(linear_of(weights)(x), linear_reference(x, weights).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("product", ["dots", "tiles"])
def test_int8_weights_meet_every_digit_of_the_input(product: Product) -> None:
    """Next to an input of 2^13 the others still count: its own weights are zero here. Two digits would fail."""
    need_product(product)
    weights = _weights("int8", 64, 300, plain=True)
    weights.weight.data[:, 100] = 0
    for rows in (1, 4, 12, 20):
        x = _input(rows, weights)
        x[:, 100] = 2.0**13
        out, wanted = PACKERS[product](weights)(x).double(), _exact(x, weights)
        assert (out - wanted).abs().max() < 2**-8 * wanted.abs().max()
        small = wanted.abs() < wanted.std() / 8
        assert (out - wanted)[small].abs().max() < 0.01 * wanted.std()


def _exact(x: Tensor, weights: LinearWeights) -> Tensor:
    scale = weights.weight.scale
    assert scale is not None
    return x.double() @ (weights.weight.data.double() * scale.double()[:, None]).T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_are_packed_for_bf16_once_the_kernels_are_loaded(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "loaded", lambda: True)
    made = [linear.runtime_linear(_weights(kind, 64, 128), device=torch.device("cpu"), dtype=dtype) for kind in KINDS]
    assert [isinstance(kernel, PackedLinear) for kernel in made] == [dtype == torch.bfloat16] * len(KINDS)


def test_groups_of_no_whole_tiles_and_very_wide_codes_take_panels() -> None:
    """A tile holds 32 inputs; int32 sums of codes hold 65,535 products."""
    odd = quantize_int4(torch.randn(64, 192), group_size=48)
    assert packed_product(LinearWeights(weight=odd)) == "panels"
    wide = QuantTensor(
        data=torch.zeros(1, 2**16, dtype=torch.int8), scale=torch.ones(1), format="int8", shape=(1, 2**16)
    )
    assert packed_product(LinearWeights(weight=wide)) == "panels"
