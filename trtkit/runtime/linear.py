"""The matrix product against a stored weight, by the best kernel measured for the device and the row count.

CPU, bfloat16: our own C++ kernels (``native/linear.py``). Without a compiler, oneDNN where it has bf16 (AVX512): packed
bf16 weights for any row count; int8 and int4 read their packed codes while there are few rows (a decode step of a few
sequences is bound by weight traffic) and expanded ones above; W8A8 runs oneDNN's int8 product; fp8 has no kernel there,
its codes are expanded once at load (e4m3 values are exact in bf16).
CUDA, bfloat16: ``cuda/linear.py``.
Everything else (float32, no compiler, odd shapes on CUDA) multiplies expanded codes: the same numbers, plainly.

``linear_reference`` in ``quant/tensor.py`` is the definition that each kernel is tested against; see
``docs/cpu.md`` for the CPU.
Letters: T tokens, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import FP8_MAX, LinearWeights, dequantize
from trtkit.runtime.native.kernels import loaded
from trtkit.runtime.native.linear import PACKERS, packed_product

__all__ = ["Kernel", "runtime_linear"]

Kernel: TypeAlias = Callable[[Tensor], Tensor]
"""(T, K) -> (T, N), both in the compute dtype."""

INT8_PACKED_ROWS = 4
"""Up to here ``_weight_int8pack_mm`` beats prepacked bf16: 39, 49, 93 against 49 ms at 1, 4, 8 rows (0.5B shape)."""
INT4_PACKED_ROWS = 3
"""Up to here ``_weight_int4pack_mm_for_cpu`` beats prepacked bf16 and W8A8."""


def runtime_linear(weights: LinearWeights, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for one linear. ``weights`` may be released afterwards; the kernel keeps what it needs."""
    if device.type == "cuda":
        # Triton comes with CUDA builds of torch only.
        from trtkit.runtime.cuda.linear import cuda_linear

        on_cuda = cuda_linear(weights, device=device, dtype=dtype)
        if on_cuda is not None:
            return on_cuda
    kind = weights.weight.format
    cpu = device.type == "cpu" and dtype == torch.bfloat16
    if cpu and loaded():
        return PACKERS[packed_product(weights)](weights)
    onednn = cpu and _has_onednn_bf16()
    if kind == "int8" and weights.input_scale is not None and onednn:
        kernel = _w8a8_onednn(weights)
    else:
        kernel = _expanded(weights, device, dtype, prepack=onednn)
        if onednn and kind == "int8":
            kernel = _by_rows(INT8_PACKED_ROWS, _int8_packed(weights), kernel)
        if onednn and kind == "int4":
            kernel = _by_rows(INT4_PACKED_ROWS, _int4_packed(weights), kernel)
    if weights.pre_scale is None:
        return kernel
    scale = weights.pre_scale.to(device=device, dtype=dtype)
    return lambda x: kernel(x * scale)


def _has_onednn_bf16() -> bool:
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _by_rows(limit: int, few: Kernel, many: Kernel) -> Kernel:
    return lambda x: few(x) if x.shape[0] <= limit else many(x)


def _matmul(matrix: Tensor, bias: Tensor | None, *, prepack: bool) -> Kernel:
    if not prepack:
        return lambda x: F.linear(x, matrix, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 4)
    product = torch.ops.mkldnn._linear_pointwise

    def run(x: Tensor) -> Tensor:
        out: Tensor = product(x, packed, bias, "none", [], "")
        return out

    return run


def _expanded(weights: LinearWeights, device: torch.device, dtype: torch.dtype, *, prepack: bool) -> Kernel:
    """Codes as numbers of the compute dtype; the scale multiplies the output, where it is exact, not the weight."""
    weight = weights.weight
    bias = None if weights.bias is None else weights.bias.to(device=device, dtype=dtype)
    if weight.format == "bf16" or weight.format == "int4":
        values = weight.data if weight.format == "bf16" else dequantize(weight)
        return _matmul(values.to(device=device, dtype=dtype), bias, prepack=prepack)
    assert weight.scale is not None
    product = _matmul(weight.data.to(device=device, dtype=dtype), None, prepack=prepack)
    scale = weight.scale.to(device)
    quantize = None
    if weights.input_scale is not None:
        step = weights.input_scale.to(device)
        scale = scale * step
        quantize = _to_fp8(1 / step) if weight.format == "fp8" else _to_int8(1 / step)
    wide_bias = None if weights.bias is None else weights.bias.to(device).float()

    def run(x: Tensor) -> Tensor:
        steps = x if quantize is None else quantize(x).to(dtype)
        out = product(steps).float() * scale
        return (out if wide_bias is None else out + wide_bias).to(dtype)

    return run


def _to_fp8(inverse: Tensor) -> Kernel:
    return lambda x: (x.float() * inverse).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _to_int8(inverse: Tensor) -> Kernel:
    return lambda x: (x.float() * inverse).round_().clamp_(-128, 127).to(torch.int8)


def _w8a8_onednn(weights: LinearWeights) -> Kernel:
    weight, step = weights.weight, weights.input_scale
    assert weight.scale is not None
    assert step is not None
    packed = torch.ops.onednn.qlinear_prepack(weight.data, None)
    scale, zeros = weight.scale.float(), torch.zeros(weight.shape[0], dtype=torch.int32)
    bias = None if weights.bias is None else weights.bias.float()
    inverse, step_value = 1 / step, float(step)
    product = torch.ops.onednn.qlinear_pointwise

    def run(x: Tensor) -> Tensor:
        # Unsigned codes with zero point 128: signed ones have no kernel on CPUs without AMX (100x slower there).
        codes = (x.float() * inverse).round_().add_(128).clamp_(0, 255).to(torch.uint8)
        out: Tensor = product(
            codes, step_value, 128, packed, scale, zeros, bias, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return out

    return run


def _int8_packed(weights: LinearWeights) -> Kernel:
    assert weights.weight.scale is not None
    codes, scale = weights.weight.data.contiguous(), weights.weight.scale.to(torch.bfloat16)
    bias = None if weights.bias is None else weights.bias.to(torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x, codes, scale)
        return out if bias is None else out + bias

    return run


def _int4_packed(weights: LinearWeights) -> Kernel:
    weight = weights.weight
    assert weight.scale is not None
    group = weight.shape[1] // weight.scale.shape[1]
    packed = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(weight.data).int() + 8, 1)
    scale = weight.scale.T.to(torch.bfloat16)
    scales_and_zeros = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    bias = None if weights.bias is None else weights.bias.to(torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        out = torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)
        return out if bias is None else out + bias

    return run
