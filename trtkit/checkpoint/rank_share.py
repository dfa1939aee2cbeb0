"""A rank's share of a checkpoint (Megatron-LM's split, arXiv 1909.08053 section 3).

qkv by heads, gate and up by rows: each rank computes its share of the outputs. o and down by columns: each rank
multiplies its share of the inputs, and the results are summed. lm_head by rows. So a layer takes two sums and nothing
else: between qkv and o, and between gate_up and down, a rank works on its own heads and columns alone.

Worked example, 40 heads, 8 KV heads and 13,824 columns over 4 ranks: rank 1 has the heads 10 to 19, the KV heads 2 and
3, the columns 3,456 to 6,911 of gate and up, and the same inputs of down.

Embedding and norms are whole on every rank. Codes and scales are those of the checkpoint: a product quantizes its input
by static scales, so sharing it out changes nothing but the order of the sum, and what its parts are rounded to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor

from trtkit.checkpoint.names import LINEARS, Split, tensor_axes
from trtkit.checkpoint.trtllm_split import share
from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.errors import UnsupportedError
from trtkit.model_spec import ModelSpec
from trtkit.plan.refusals import uneven
from trtkit.quant.tensor import LinearWeights, QuantTensor, concat_rows
from trtkit.scheme import QuantScheme

__all__ = ["PartSource", "RankShare", "can_share", "check_shares", "share_rows", "share_spec"]

_SPLITS: dict[str, Split] = {part: linear.split for linear in LINEARS for part in linear.parts}
_ROW_STEP = 64
"""A rank's share of rows that need not be shared out evenly is a multiple of this: what the kernels like."""


class PartSource(Protocol):
    """Where the whole weights come from: a ``UnifiedCheckpoint``."""

    @property
    def spec(self) -> ModelSpec: ...

    def parts(self, layer: int, name: LinearName) -> Sequence[LinearWeights]: ...

    def norms(self, layer: int) -> Norms: ...

    def kv_scales(self, layer: int) -> tuple[float, float] | None: ...

    def embedding(self) -> Tensor: ...

    def final_norm(self) -> Tensor: ...

    def lm_head(self) -> Tensor: ...


def check_shares(spec: ModelSpec, scheme: QuantScheme, ranks: int) -> None:
    """Raise :class:`UnsupportedError` with everything that cannot be shared out evenly over ``ranks``."""
    if wrong := list(_uneven(spec, scheme, ranks)):
        most = next(fewer for fewer in range(ranks - 1, 0, -1) if can_share(spec, scheme, fewer))
        raise UnsupportedError(
            f"this model cannot be shared out over {ranks} GPUs or processes", offenders=wrong,
            hint=f"it can over {most}" if most > 1 else "one has to do",
        )  # fmt: skip


def can_share(spec: ModelSpec, scheme: QuantScheme, ranks: int) -> bool:
    """Whether :func:`check_shares` finds nothing."""
    return not any(_uneven(spec, scheme, ranks))


def _uneven(spec: ModelSpec, scheme: QuantScheme, ranks: int) -> Iterator[str]:
    if ranks == 1:
        return
    yield from uneven(spec, ranks)
    for name, size in (("queries", spec.q_width), ("intermediate size", spec.intermediate)):
        if size % ranks == 0 and size // ranks % (scheme.group_size or 1):
            yield f"{name} {size}: {scheme.name} has groups of {scheme.group_size}"


def share_spec(spec: ModelSpec, ranks: int) -> ModelSpec:
    """The shapes of one rank's layers. KV heads are repeated where there are fewer than ranks."""
    return dataclasses.replace(
        spec,
        heads=spec.heads // ranks,
        kv_heads=max(1, spec.kv_heads // ranks),
        intermediate=spec.intermediate // ranks,
    )


def share_rows(matrix: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's rows of a matrix (N, K) or of a bias (N,): as many on each rank, so the last ones may be zeros."""
    rows = -(-matrix.shape[0] // (ranks * _ROW_STEP)) * _ROW_STEP
    own = matrix[rank * rows : (rank + 1) * rows]
    return torch.cat([own, own.new_zeros(rows - own.shape[0], *own.shape[1:])])


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What a rank's ``DecoderModel`` is made of: a ``WeightSource`` with the shapes of :func:`share_spec`."""

    whole: PartSource
    rank: int
    ranks: int

    @property
    def spec(self) -> ModelSpec:
        """Shapes of this rank; hidden size and vocabulary are those of the model."""
        return share_spec(self.whole.spec, self.ranks)

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        """This rank's share of one of the layer's products."""
        parts = zip(LINEAR_PARTS[name], self.whole.parts(layer, name), strict=True)
        return concat_rows([self._part(part, weights) for part, weights in parts])

    def _part(self, part: str, weights: LinearWeights) -> LinearWeights:
        split = _SPLITS[part]
        copies = max(1, self.ranks // self.whole.spec.kv_heads) if part in LINEAR_PARTS["qkv"][1:] else 1
        rank, ranks = self.rank // copies, self.ranks // copies

        @overload
        def cut(name: str, tensor: Tensor) -> Tensor: ...
        @overload
        def cut(name: str, tensor: None) -> None: ...
        def cut(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            axes = tensor_axes(name, weights.weight.format)
            along: Split = "columns" if split == "columns" else "rows"  # a part of qkv alone is rows
            return share([tensor], axes, along, rank=rank, ranks=ranks, kv_heads=1)

        rows, width = weights.weight.shape
        shape = (rows, width // ranks) if split == "columns" else (rows // ranks, width)
        summed = split == "columns" and self.rank > 0  # the sum has the first rank's bias
        return LinearWeights(
            weight=QuantTensor(
                data=cut("weight", weights.weight.data), scale=cut("weight_scale", weights.weight.scale),
                format=weights.weight.format, shape=shape,
            ),
            bias=None if summed else cut("bias", weights.bias),
            input_scale=cut("input_scale", weights.input_scale),
            pre_scale=cut("pre_quant_scale", weights.pre_scale),
        )  # fmt: skip

    def norms(self, layer: int) -> Norms:
        """Whole: every rank norms the whole stream, and q and k by head."""
        return self.whole.norms(layer)

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """Those of the whole layer."""
        return self.whole.kv_scales(layer)

    def embedding(self) -> Tensor:
        """(V, H)"""
        return self.whole.embedding()

    def final_norm(self) -> Tensor:
        """(H,)"""
        return self.whole.final_norm()

    def lm_head(self) -> Tensor:
        """(V / ranks, H), as :func:`share_rows` has it."""
        return share_rows(self.whole.lm_head(), self.rank, self.ranks)
