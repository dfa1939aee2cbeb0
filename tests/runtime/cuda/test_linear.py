"""Every kernel of the CUDA linears against the product by definition: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tests.runtime.cuda.interpreting import correct_numerics
from trtkit.quant.tensor import (
    LinearWeights,
    QuantTensor,
    dense,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from trtkit.runtime.cuda import launch, workspace
from trtkit.runtime.cuda.choices import LIBRARY, Choice
from trtkit.runtime.cuda.layout import from_words, group_ratios, to_words
from trtkit.runtime.cuda.linear import CudaLinear, fits

KINDS = ("bf16", "int8", "int8-sq", "fp8", "int4")


@pytest.fixture(autouse=True)
def _numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        correct_numerics(monkeypatch)


def made(kind: str, columns: int, depth: int, *, bias: bool = True, pre: bool = False) -> LinearWeights:
    matrix = torch.randn(columns, depth) * 0.1
    weight: dict[str, QuantTensor] = {
        "bf16": dense(matrix.bfloat16()),
        "int8": quantize_int8(matrix, steps=128),
        "int8-sq": quantize_int8(matrix, steps=127),
        "fp8": quantize_fp8(matrix),
        "int4": quantize_int4(matrix) if depth % 128 == 0 else dense(matrix),
    }
    step = {"int8-sq": 3.0 / 127, "fp8": 3.0 / 448}.get(kind)
    return LinearWeights(
        weight=weight[kind],
        bias=torch.randn(columns) if bias else None,
        input_scale=None if step is None else torch.tensor(step),
        pre_scale=torch.rand(depth) + 0.5 if pre else None,
    )


def tile(kind: str, **changes: object) -> Choice:
    depth = 256 if kind == "int4" else 128
    plain = Choice(kernel="product", rows=16, columns=32, depth=depth, stages=2)
    return dataclasses.replace(plain, **changes)


def close(found: torch.Tensor, weights: LinearWeights, x: torch.Tensor) -> None:
    wanted = linear_reference(x, weights)
    assert found.shape == wanted.shape
    assert found.dtype == torch.bfloat16
    error = ((found.float().cpu() - wanted).norm() / wanted.norm()).item()
    # Half of bfloat16's last bit is 0.2 % at most, 0.11 % in the mean square.
    assert error < 0.0025, f"relative error {error:.5f}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 33, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (3, 8, 16))])
def test_products_match_the_reference(kind: str, rows: int, device: torch.device) -> None:
    # 48 columns are no multiple of the tile; two and a half steps, the last of them alone in its part.
    depth = 640 if kind == "int4" else 320
    weights = made(kind, 48, depth)
    x = torch.randn(rows, depth).bfloat16()
    linear = CudaLinear(weights, device)
    close(linear.run(x.to(device), tile(kind, rows=16 if rows <= 16 else 32, splits=2)), weights, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fused", "swap"), [(True, False), (False, True)])
def test_every_way_through_the_kernel(kind: str, fused: bool, swap: bool, device: torch.device) -> None:
    weights = made(kind, 64, 512, bias=False, pre=kind != "bf16")
    x = torch.randn(8, 512).bfloat16()
    linear = CudaLinear(weights, device)
    one, split = (linear.run(x.to(device), tile(kind, columns=64, swap=swap, fused=fused, splits=n)) for n in (1, 2))
    close(one, weights, x)
    close(split, weights, x)


def test_the_probe(device: torch.device) -> None:
    launch.probe(device)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8", "int8-sq"])
def test_inputs_that_end_within_a_step(kind: str, device: torch.device) -> None:
    weights = made(kind, 32, 208)
    x = torch.randn(3, 208).bfloat16()
    close(CudaLinear(weights, device).run(x.to(device), tile(kind, splits=2)), weights, x)


@pytest.mark.parametrize("depth", [512, 272])
@pytest.mark.parametrize("pre", [True, False])
def test_one_row(depth: int, pre: bool, device: torch.device) -> None:
    weights = made("bf16", 48, depth, pre=pre)
    x = torch.randn(1, depth).bfloat16()
    choice = Choice(kernel="one_row", rows=1, columns=32, depth=128, fused=pre)
    close(CudaLinear(weights, device).run(x.to(device), choice), weights, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: str, device: torch.device) -> None:
    linear = CudaLinear(made(kind, 32, 256), device)
    x = torch.randn(9, 256).bfloat16().to(device)
    choice = tile(kind, splits=2)
    together = linear.run(x, choice)
    x[:4] = torch.randn(4, 256).bfloat16()
    x[8] = 1e9 if kind == "int8-sq" else float("nan")
    torch.testing.assert_close(linear.run(x, choice)[4:8], together[4:8], rtol=0, atol=0)
    torch.testing.assert_close(linear.run(x[5:6], choice), together[5:6], rtol=0, atol=0)


def test_values_beyond_the_static_range_saturate(device: torch.device) -> None:
    for kind in ("int8-sq", "fp8"):
        weights = made(kind, 32, 64, bias=False)
        x = torch.full((2, 64), 100.0).bfloat16()
        for fused in (True, False):
            close(CudaLinear(weights, device).run(x.to(device), tile(kind, fused=fused)), weights, x)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "int8-sq"])
def test_many_rows(kind: str, device: torch.device) -> None:
    weights = made(kind, 64, 384, pre=kind == "int4")
    x = torch.randn(20, 384).bfloat16()
    found = CudaLinear(weights, device).run(x.to(device), LIBRARY)
    if kind in ("int8", "int4"):  # their weights are rounded to bfloat16 as well
        wanted = linear_reference(x, weights)
        assert (found.float().cpu() - wanted).norm() < 0.004 * wanted.norm()
    else:
        close(found, weights, x)


@pytest.mark.parametrize(("kind", "bias"), [("int8", True), ("int4", False), ("fp8", True)])
def test_a_large_matrix_is_expanded_part_by_part(
    kind: str, bias: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lm_head of a 14B takes as numbers is more than an engine leaves free."""
    stored = made(kind, 112, 384, bias=bias)
    weights = dataclasses.replace(stored, input_scale=None)
    x = torch.randn(20, 384).bfloat16()
    workspace.workspace_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_EXPANDED_VALUES", 40 * 384)
        found = CudaLinear(weights, device).run(x.to(device), LIBRARY)
    assert 0 < workspace.workspace_of(found.device).expanded.numel() <= 64 * 384
    wanted = linear_reference(x, weights)
    assert (found.float().cpu() - wanted).norm() < 0.004 * wanted.norm()
    torch.testing.assert_close(CudaLinear(weights, device).run(x.to(device), LIBRARY), found, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("depth", [64, 128, 256, 640])
def test_words_come_apart_again(bits: int, depth: int) -> None:
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (6, depth), dtype=torch.int8)
    words = to_words(codes, bits)
    assert words.shape == (6, -(-depth // (1024 // bits)) * 64)
    assert torch.equal(from_words(words, bits, depth), codes)


def test_group_scales_survive_as_ratios() -> None:
    scale = torch.rand(6, 5) + 0.01
    ratios, row_scale = group_ratios(scale)
    assert ratios.shape == (6, 6)
    # Half of float16's last bit.
    torch.testing.assert_close(ratios.T[:, :5].float() * row_scale[:, None], scale, rtol=2**-11, atol=0)


def test_shapes_that_the_kernels_refuse() -> None:
    assert fits(made("int8", 64, 512))
    assert not fits(made("int8", 60, 512))
    assert not fits(made("int8", 64, 504))
    assert not fits(LinearWeights(weight=quantize_int4(torch.randn(64, 512), group_size=64)))
