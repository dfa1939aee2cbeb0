"""How tensors are shared out over the ranks of a TensorRT-LLM checkpoint, and put together again.

Letters: N output features, K input features, of one rank or of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtkit.checkpoint.names import Axis, Split
from trtkit.errors import CheckpointError

__all__ = ["held_scale", "merge_part", "share", "weight_only_rows"]


def share(
    parts: Sequence[Tensor], axes: tuple[Axis, ...], split: Split, *, rank: int, ranks: int, kv_heads: int
) -> Tensor:
    """One rank's share of a tensor whose Hugging Face parts are ``parts``.

    ``axes`` says what each axis runs over. What the split does not cut is the same on every rank and in every part.
    """
    cut: Axis = "in" if split == "columns" else "out"
    if cut not in axes:
        return parts[0]
    axis = axes.index(cut)
    if split != "heads":
        assert len(parts) == 1
        return parts[0].chunk(ranks, dim=axis)[rank]
    copies = max(1, ranks // kv_heads)
    q, *kv = parts
    shares = [q.chunk(ranks, dim=axis)[rank]]
    shares += [part.chunk(ranks // copies, dim=axis)[rank // copies] for part in kv]
    return torch.cat(shares, dim=axis)


def merge_part(
    shares: Sequence[Tensor], axes: tuple[Axis, ...], split: Split, part: int, *, heads: int, kv_heads: int
) -> Tensor:
    """The inverse of :func:`share`: one Hugging Face part (index into the linear's parts) from all ranks' tensors."""
    ranks = len(shares)
    cut: Axis = "in" if split == "columns" else "out"
    if cut not in axes:
        return shares[0]
    axis = axes.index(cut)
    if split != "heads":
        return torch.cat(list(shares), dim=axis)
    copies = max(1, ranks // kv_heads)
    local = [heads // ranks, max(1, kv_heads // ranks), max(1, kv_heads // ranks)]
    unit = shares[0].shape[axis] // sum(local)
    start = sum(local[:part]) * unit
    pieces = [tensor.narrow(axis, start, local[part] * unit) for tensor in shares]
    return torch.cat(pieces if part == 0 else pieces[::copies], dim=axis)


def weight_only_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype, *, where: str) -> Tensor:
    """Rows (N, K) from which the W8A16 loader makes int8 ``codes`` and ``scale`` (N,), the latter rounded to ``dtype``.

    The loader takes scale = amax / 128 per row. A row that holds the code -128 gives its own scale back; where the
    extreme is +127, which stands for a clipped +128, one such element is written as +128 scale and is clipped again.
    A rank's share of the inputs may hold neither; the loader then chooses a finer scale and other codes.

    Raises :class:`CheckpointError` when ``dtype`` is too narrow for a scale.
    """
    assert codes.dtype == torch.int8
    stored = scale.to(dtype)
    lost = ((stored == 0) | ~(128 * stored).isfinite()) & (codes != 0).any(dim=1)
    if bool(lost.any()):
        raise CheckpointError(
            f"{int(lost.sum())} row(s) have scales that {str(dtype).removeprefix('torch.')} cannot hold",
            where=where,
            hint="write bfloat16",
        )
    values = codes.float() * stored.float()[:, None]
    top, column = codes.max(dim=1)
    rows = ((top == 127) & ~(codes == -128).any(dim=1)).nonzero().flatten()
    values[rows, column[rows]] = 128 * stored.float()[rows]
    return values.to(dtype)


def held_scale(scale: Tensor, dtype: torch.dtype, *, where: str) -> Tensor:
    """The scale () of an fp8 linear's input, rounded to ``dtype`` and in float32 again.

    The engine rounds its input with the scale in ``dtype`` and multiplies the product with the one in the file
    (``FP8Linear`` in ``quantization/layers.py``): were they two, every product would be off by their ratio.

    Raises :class:`CheckpointError` when ``dtype`` is too narrow.
    """
    held = scale.to(dtype).float()
    if not (bool(held.isfinite()) and held > 0):
        raise CheckpointError(
            f"the scale of its input is {float(scale):.3g}, which {str(dtype).removeprefix('torch.')} cannot hold",
            where=where,
            hint="write bfloat16",
        )
    return held
