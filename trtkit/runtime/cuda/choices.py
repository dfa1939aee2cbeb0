"""Which kernel, tile and split for a product: what can be tried, and what is taken where nothing was measured.

Plain data and arithmetic; neither triton nor a device is needed here. Letters: M rows, N output features, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["BUCKETS", "LIBRARY", "Choice", "Gpu", "Kind", "Shape", "bucket_of", "candidates", "default_choice"]

Kind: TypeAlias = Literal["bf16", "int8", "int8-sq", "fp8", "int4"]
"""A weight format together with what it multiplies: int8-sq and fp8 multiply codes, the others bfloat16."""

BUCKETS = (1, 16, 32, 64, 128, 256)
"""Row counts for which a choice is made; a product takes that of the next larger one, and the library's above."""

_WORD_KINDS = ("int8", "int4")
"""What the kernel for words multiplies; its steps are 64 words: 128 inputs of int8, 256 of int4."""
_MAX_PARTIAL_BYTES = 48 << 20
_DEFAULT_SPLIT_ROUNDS = 3
"""Programs per SM to aim for where nothing is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What the choice depends on."""

    sms: int
    capability: tuple[int, int]
    shared_bytes: int
    """Most shared memory that one program may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A weight matrix."""

    kind: Kind
    columns: int
    """N."""
    depth: int
    """K."""
    prepared_input: bool = False
    """x is scaled or quantized before the product: a kernel can do it on the way (``fused``) or find it done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to compute a product."""

    kernel: Literal["product", "one_row", "library"]
    rows: int = 16
    """Rows of x per program."""
    columns: int = 64
    """Rows of W per program."""
    depth: int = 128
    """Inputs per step."""
    splits: int = 1
    """Programs that share the K of one tile."""
    warps: int = 4
    stages: int = 3
    swap: bool = False
    """W as the left operand of the tensor cores."""
    fused: bool = False


LIBRARY = Choice(kernel="library")
"""cuBLAS, behind an expansion of the weights to bfloat16 where it has no kernel for them."""


def bucket_of(rows: int) -> int | None:
    """The bucket of ``rows``; None where there are too many for these kernels."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def default_choice(shape: Shape, bucket: int | None, gpu: Gpu) -> Choice:
    """Without a measurement: reasoned, not tuned."""
    if bucket is None or shape.kind == "bf16" or bucket > 128:
        return LIBRARY
    options = [choice for choice in candidates(shape, bucket, gpu) if choice.kernel == "product"]
    if not options:
        return LIBRARY
    tile = options[0]
    wanted = _splits(shape, tile, _DEFAULT_SPLIT_ROUNDS * gpu.sms)
    return next((choice for choice in options if choice.splits == wanted), tile)


def candidates(shape: Shape, bucket: int, gpu: Gpu) -> list[Choice]:
    """What is worth timing for ``bucket`` rows, the most promising tiles first."""
    found: dict[Choice, None] = {}
    for tile in _tiles(shape.kind, bucket, gpu.capability):
        if _shared_bytes(shape, tile) > gpu.shared_bytes:
            continue
        for rounds in (3, 2, 4, 1, 6):
            splits = _splits(shape, tile, rounds * gpu.sms)
            blocks = -(-bucket // tile.rows) * -(-shape.columns // tile.columns)
            if splits > 1 and 4 * blocks * splits * tile.rows * tile.columns > _MAX_PARTIAL_BYTES:
                continue
            for fused in (True, False) if shape.prepared_input and bucket <= 32 else (False,):
                found[_with(tile, splits, fused)] = None
    if bucket == 1 and shape.kind == "bf16":
        found.update(dict.fromkeys(_one_row()))
    if _library_fits(shape.kind, bucket):
        found[LIBRARY] = None
    return list(found)


def _library_fits(kind: Kind, bucket: int) -> bool:
    if kind == "int8-sq":
        return bucket > 16  # torch._int_mm wants more than 16 rows
    return kind in ("bf16", "fp8") or bucket >= 128


def _one_row() -> Iterator[Choice]:
    for columns, depth, warps in ((8, 1024, 4), (4, 1024, 4), (8, 1024, 8), (16, 512, 8), (4, 2048, 8)):
        yield Choice(kernel="one_row", rows=1, columns=columns, depth=depth, warps=warps, stages=1)


def _tiles(kind: Kind, bucket: int, capability: tuple[int, int]) -> Iterator[Choice]:
    """(columns, depth, warps, stages, swap), for the row tile of the bucket."""
    rows = min(max(bucket, 16), 64)
    hopper = capability[0] == 9
    for columns, depth, warps, stages, swap in _SHAPES[kind, rows]:
        if swap and not hopper:
            continue
        yield Choice(
            kernel="product", rows=rows, columns=columns, depth=depth, warps=warps, stages=stages, swap=swap
        )  # fmt: skip


_SHAPES: dict[tuple[Kind, int], tuple[tuple[int, int, int, int, bool], ...]] = {
    ("bf16", 16): (
        (64, 128, 4, 4, True), (128, 64, 4, 5, True), (64, 128, 4, 5, False), (128, 64, 4, 5, False),
        (32, 128, 2, 5, False),
    ),
    ("bf16", 32): ((64, 128, 4, 4, True), (128, 64, 4, 5, True), (64, 128, 4, 4, False), (128, 64, 4, 5, False)),
    ("bf16", 64): ((128, 64, 4, 4, True), (64, 128, 4, 3, True), (128, 64, 4, 3, False)),
    ("int8", 16): (
        (64, 128, 4, 6, False), (128, 128, 4, 5, False), (64, 128, 4, 6, True), (128, 128, 4, 5, True),
        (64, 128, 2, 5, False),
    ),
    ("int8", 32): (
        (64, 128, 4, 5, False), (128, 128, 4, 4, False), (64, 128, 4, 5, True), (128, 128, 4, 5, True),
    ),
    ("int8", 64): ((128, 128, 4, 4, True), (64, 128, 4, 5, True), (128, 128, 8, 4, True), (64, 128, 4, 4, False)),
    ("fp8", 16): (
        (64, 256, 4, 4, True), (128, 128, 4, 5, True), (64, 128, 4, 6, True), (64, 256, 4, 4, False),
        (128, 128, 4, 4, False),
    ),
    ("fp8", 32): ((64, 256, 4, 4, True), (128, 128, 4, 5, True), (64, 128, 4, 4, False), (128, 128, 4, 4, False)),
    ("fp8", 64): ((128, 128, 4, 4, True), (64, 256, 4, 3, True), (128, 128, 8, 4, True), (128, 128, 4, 3, False)),
    ("int4", 16): (
        (64, 256, 4, 5, True), (128, 256, 4, 4, True), (64, 256, 4, 5, False), (128, 256, 4, 4, False),
        (128, 256, 8, 4, False),
    ),
    ("int4", 32): (
        (64, 256, 4, 4, True), (128, 256, 4, 4, True), (64, 256, 4, 4, False), (128, 256, 4, 3, False),
    ),
    ("int4", 64): ((128, 256, 8, 3, True), (64, 256, 4, 3, True), (64, 256, 4, 3, False)),
}  # fmt: skip
_SHAPES.update({("int8-sq", rows): _SHAPES["fp8", rows] for rows in (16, 32, 64)})


def _with(tile: Choice, splits: int, fused: bool) -> Choice:
    return Choice(
        kernel=tile.kernel, rows=tile.rows, columns=tile.columns, depth=tile.depth, splits=splits, warps=tile.warps,
        stages=tile.stages, swap=tile.swap, fused=fused,
    )  # fmt: skip


def _splits(shape: Shape, tile: Choice, programs: int) -> int:
    """Parts of K so that about ``programs`` run, each of at least two steps, all but the last equally long."""
    steps = -(-shape.depth // tile.depth)
    wanted = max(1, min(programs // -(-shape.columns // tile.columns), steps // 2, 32))
    return -(-steps // -(-steps // wanted))


def _shared_bytes(shape: Shape, tile: Choice) -> int:
    """About what the pipeline of tiles takes: what the tensor cores read from shared memory has one buffer more."""
    words = shape.kind in _WORD_KINDS
    weights = int(tile.depth * tile.columns * {"bf16": 2, "int4": 0.5}.get(shape.kind, 1))
    inputs = 2 * tile.depth * tile.rows
    return weights * (tile.stages - (words or not tile.swap)) + inputs * (tile.stages - (not tile.swap))
