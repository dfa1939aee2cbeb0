"""Quantizers by definition, one scalar at a time: slow, obvious, and independent of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def int8_rows(weight: Matrix, steps: int) -> tuple[list[list[int]], list[float]]:
    """Codes and scales: scale = largest magnitude of the row / steps, halves rounded away from zero."""
    codes, scales = [], []
    for row in weight:
        scale = max(abs(value) for value in row) / steps
        scales.append(scale)
        codes.append([0 if scale == 0 else max(-128, min(127, _away(value / scale))) for value in row])
    return codes, scales


def _away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def int4_groups(weight: Matrix, size: int) -> tuple[list[list[int]], list[list[float]]]:
    """Codes (rows x inputs) and scales (rows x groups): scale = largest magnitude of the group / 7, halves to even."""
    codes, scales = [], []
    for row in weight:
        line: list[int] = []
        line_scales: list[float] = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            scale = max(abs(value) for value in group) / 7
            line_scales.append(scale)
            line += [0 if scale == 0 else max(-8, min(7, round(value / scale))) for value in group]
        codes.append(line)
        scales.append(line_scales)
    return codes, scales


def pack_pairs(codes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Byte [r][c] = code[2r][c] in the low nibble, code[2r + 1][c] in the high one, two's complement."""
    packed = []
    for upper in range(0, len(codes), 2):
        pairs = zip(codes[upper], codes[upper + 1], strict=True)
        packed.append([(low % 16) + 16 * (high % 16) for low, high in pairs])
    return packed


def e4m3_values() -> list[float]:
    """Every finite magnitude of float8 e4m3fn, from its definition: 4 exponent bits (bias 7), 3 mantissa bits."""
    subnormal = [mantissa / 8 * 2**-6 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return [*subnormal, *normal[:-1]]  # the last pattern is NaN


def nearest_e4m3(value: float) -> set[float]:
    """The closest representable value, or both neighbours where it lies between them; saturates at 448."""
    magnitudes = e4m3_values()
    distance = min(abs(abs(value) - each) for each in magnitudes)
    return {math.copysign(each, value) for each in magnitudes if abs(abs(abs(value) - each) - distance) < 1e-12}
