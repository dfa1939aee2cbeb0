"""Every kernel against the product by definition (``linear_reference``), for every format and row count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from trtkit.quant.tensor import (
    LinearWeights,
    QuantTensor,
    dense,
    linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from trtkit.runtime.linear import runtime_linear

CPU = torch.device("cpu")
WIDTH, OUT = 256, 384


def _weights(kind: str) -> LinearWeights:
    matrix = torch.randn(OUT, WIDTH) * 0.1
    made: dict[str, QuantTensor] = {
        "bf16": dense(matrix.bfloat16()),
        "int8": quantize_int8(matrix, steps=128),
        "int8-sq": quantize_int8(matrix, steps=127),
        "fp8": quantize_fp8(matrix),
        "int4": quantize_int4(matrix),
    }
    step = {"int8-sq": 4.0 / 127, "fp8": 4.0 / 448}.get(kind)
    return LinearWeights(
        weight=made[kind],
        bias=torch.randn(OUT),
        input_scale=None if step is None else torch.tensor(step),
        pre_scale=torch.rand(WIDTH) + 0.5 if kind in ("int8-sq", "int4") else None,
    )


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8-sq", "fp8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 5, 32])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_match_the_reference(kind: str, rows: int, bias: bool) -> None:
    weights = _weights(kind)
    if not bias:
        weights = dataclasses.replace(weights, bias=None)
    x = torch.randn(rows, WIDTH)

    exact = runtime_linear(weights, device=CPU, dtype=torch.float32)(x)
    torch.testing.assert_close(exact, linear_reference(x, weights), rtol=1e-4, atol=1e-4)

    rounded = x.bfloat16()
    fast = runtime_linear(weights, device=CPU, dtype=torch.bfloat16)(rounded)
    assert fast.dtype == torch.bfloat16
    # The reference sees the same bf16 input; what is left is bf16 rounding of weights, input scaling and output.
    wanted = linear_reference(rounded, weights)
    error = (fast.float() - wanted).norm() / wanted.norm()
    limit = 0.02 if weights.input_scale is not None else 0.006
    assert error < limit, f"{kind} at {rows} rows: relative error {error:.4f}"


def test_activation_quantization_is_really_applied() -> None:
    """Values beyond the static range saturate: a W8A8 kernel that forgot to quantize would not."""
    weights = dataclasses.replace(_weights("int8-sq"), pre_scale=None, bias=None)
    x = torch.full((2, WIDTH), 100.0)
    saturated = runtime_linear(weights, device=CPU, dtype=torch.bfloat16)(x.bfloat16())
    free = linear_reference(x, dataclasses.replace(weights, input_scale=None))
    assert saturated.float().norm() < 0.1 * free.norm()
