"""What Triton's interpreter lacks for these kernels: bfloat16 and float8 numbers, and the PTX of inline assembly.

The interpreter keeps bfloat16 and float8 as bit patterns and converts them by its own, partly truncating, rules;
products of bfloat16 multiply the bit patterns. Here conversions are torch's (to nearest even, as the hardware's) and
products and sums are those of the numbers. Inline assembly is read and carried out, so a wrong constant is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

_MINIFLOATS = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


def correct_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter for one test."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    def numbers(handle: Any) -> Any:
        kind = _MINIFLOATS.get(str(handle.dtype.scalar))
        if kind is None:
            return handle.data
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.int16 if kind.itemsize == 2 else np.int8))
        return bits.view(kind).float().numpy()

    def handle_of(values: Any, type_: Any) -> Any:
        kind = _MINIFLOATS.get(str(type_.scalar))
        if kind is not None:
            rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(kind)
            values = rounded.view(torch.int16 if kind.itemsize == 2 else torch.int8).numpy()
            return TensorHandle(values.view(_get_np_dtype(type_)), type_.scalar)
        return TensorHandle(np.asarray(values).astype(_get_np_dtype(type_)), type_.scalar)

    def convert(self: Any, source: Any, type_: Any, *_: Any) -> Any:
        return handle_of(numbers(source), type_)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        wide = np.int64 if a.dtype.scalar == tl.int8 else np.float64
        product = np.matmul(numbers(a).astype(wide), numbers(b).astype(wide))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    plain = Builder.binary_op

    def binary(self: Any, left: Any, right: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if str(left.dtype.scalar) not in _MINIFLOATS:
            return plain(self, left, right, operation)
        return handle_of(operation(numbers(left), numbers(right)), left.dtype)

    def assembly(self: Any, text: str, constraints: str, values: list[Any], types: list[Any], *_: Any) -> Any:
        words = np.ascontiguousarray(values[0].data).view(np.uint32).reshape(-1)
        results = carry_out(text, words)
        packed = np.stack(results, axis=-1).view(np.uint16).reshape(values[0].data.shape)
        return _Results([TensorHandle(packed, types[0].scalar)])

    for name in ("cast_impl", "create_fp_to_fp"):
        monkeypatch.setattr(Builder, name, convert)
    monkeypatch.setattr(Builder, "create_dot", dot)
    monkeypatch.setattr(Builder, "binary_op", binary)
    monkeypatch.setattr(Builder, "create_inline_asm", assembly)


class _Results:
    """What the builder of real code returns: an operation with results."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def get_result(self, index: int) -> Any:
        return self._results[index]


def carry_out(text: str, words: Any) -> list[Any]:
    """A straight line of PTX on 32-bit words: the input is the last ``$`` register, the outputs are the others."""
    outputs = sorted({int(number) for number in re.findall(r"\$(\d+)", text)})
    registers = {f"${outputs[-1]}": words}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in text.strip("{} ").split(";"):
        parts = line.replace(",", " ").split()
        if not parts or parts[0] == ".reg":
            continue
        operation, target, *names = parts
        registers[target] = np.broadcast_to(_OPERATIONS[operation](*map(value, names)), words.shape)
    return [registers[f"${number}"] for number in outputs[:-1]]


def _permuted(a: Any, b: Any, selector: Any) -> Any:
    both = (np.asarray(b, np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.shape(both), np.uint32)
    for place in range(4):
        number = (int(selector) >> (4 * place)) & 15
        assert number < 8, "sign replication is not used"
        result |= ((both >> np.uint64(8 * number)) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * place)
    return result


def _lut(a: Any, b: Any, c: Any, table: Any) -> Any:
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _fused(a: Any, b: Any, c: Any) -> Any:
    """fma.rn.bf16x2, with one rounding: float64 holds the exact result of such numbers."""

    def halves(word: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(word, np.uint32).view(np.int16)).view(torch.bfloat16).double()

    exact = halves(a) * halves(b) + halves(c)
    return exact.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint32)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, count: a >> count,
    "prmt.b32": _permuted,
    "lop3.b32": _lut,
    "fma.rn.bf16x2": _fused,
}
