"""The block-based KV cache: tensors for the blocks that the scheduler hands out.

Layout of one layer: (kv_heads, blocks, block_size * D). Selecting a row's blocks along the second axis then gives
(kv_heads, R, S, D) in one contiguous copy, ready for a batched product.

Letters: R rows, N nodes a row adds in this step, S slots (blocks x block_size), D head_dim, g = heads / kv_heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtkit.model_spec import ModelSpec
from trtkit.runtime.scheduler import Row
from trtkit.scheme import KvDtype

__all__ = ["KvCache", "kv_block_bytes"]

_FP8_MAX = 448.0


def _storage(kv_dtype: KvDtype, dtype: torch.dtype) -> torch.dtype:
    return {"model": dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[kv_dtype]


def kv_block_bytes(spec: ModelSpec, kv_dtype: KvDtype, dtype: torch.dtype, block_size: int) -> int:
    """Bytes of one block over all layers, keys and values."""
    return int(spec.kv_bytes_per_token(_storage(kv_dtype, dtype).itemsize)) * block_size


class KvCache:
    """Keys and values of every block, and the block table of the admitted rows."""

    def __init__(
        self, spec: ModelSpec, *, blocks: int, block_size: int, max_rows: int, max_tokens: int,
        kv_dtype: KvDtype, dtype: torch.dtype, device: torch.device,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:  # fmt: skip
        """``scales``: for each layer the size of one step of keys and of values; 8-bit caches only, 1 by default."""
        self.block_size = block_size
        self.kv_dtype = kv_dtype
        self._dtype = dtype
        self._scales = list(scales) if scales is not None else [(1.0, 1.0)] * spec.layers
        self._kv_heads = spec.kv_heads
        self._head_dim = spec.head_dim
        self.spare_block = blocks
        """One block more than the scheduler hands out: where rows that pad a batch may write."""
        shape = (spec.layers, spec.kv_heads, blocks + 1, block_size * spec.head_dim)
        # Zeros, not empty: masked slots still enter the product with the values, and 0 * NaN would be NaN.
        self._keys = torch.zeros(shape, dtype=_storage(kv_dtype, dtype), device=device)
        self._values = torch.zeros_like(self._keys)
        self._table = np.zeros((max_rows, -(-max_tokens // block_size) + 1), dtype=np.int64)
        self._listed: list[list[int]] = [[] for _ in range(max_rows)]
        self.device = device

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), in every layer."""
        if not copies:
            return
        source, target = torch.tensor(copies, device=self.device).unbind(dim=1)
        for pool in (self._bytes(self._keys), self._bytes(self._values)):
            pool[:, :, target] = pool[:, :, source]

    @property
    def table_width(self) -> int:
        """Blocks of the longest row."""
        return int(self._table.shape[1])

    def blocks_for(self, slots: int) -> int:
        """Blocks that cover ``slots`` token slots."""
        return -(-slots // self.block_size)

    def block_table(self, rows: Sequence[Row], width: int) -> npt.NDArray[np.int64]:
        """The first ``width`` block ids of each row: (R, B). Beyond a row's own stand ids of any block."""
        for row in rows:
            listed = self._listed[row.slot]
            if listed != row.blocks:
                self._table[row.slot, : len(row.blocks)] = row.blocks
                self._listed[row.slot] = list(row.blocks)
        lines: npt.NDArray[np.int64] = self._table[[row.slot for row in rows], :width]
        return lines

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the keys and values at slots ``source`` (M,) to ``target`` (M,) in every layer, all at once."""
        for pool in (self._bytes(self._keys), self._bytes(self._values)):
            flat = pool.view(*pool.shape[:2], -1, self._head_dim)
            flat.index_copy_(2, target, flat.index_select(2, source))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, kv_heads, D) at ``slots`` (T,): block id x block_size + offset."""
        for pool, fresh, scale in zip((self._keys, self._values), (k, v), self._scales[layer], strict=True):
            flat = pool[layer].view(self._kv_heads, -1, self._head_dim)
            codes = self._encode(fresh.transpose(0, 1), scale).contiguous()
            self._bytes(flat).index_copy_(1, slots, self._bytes(codes))

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every layer and block as they are stored: (layers, kv_heads, blocks, block_size * D)."""
        return self._keys, self._values

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every block as they are stored: (kv_heads, blocks, block_size * D) each."""
        return self._keys[layer], self._values[layer]

    def scales(self, layer: int) -> tuple[float, float]:
        """Size of one step of the stored keys and values: 1 where they are stored in the compute dtype."""
        return (1.0, 1.0) if self._keys.dtype == self._dtype else self._scales[layer]

    def read(self, layer: int, blocks: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the listed blocks (R * B,), each (kv_heads, R, S, D) in the compute dtype."""
        shape = (self._kv_heads, rows, -1, self._head_dim)
        keys, values = (
            self._decode(self._bytes(pool[layer]).index_select(1, blocks).view(pool.dtype), scale).view(shape)
            for pool, scale in zip((self._keys, self._values), self._scales[layer], strict=True)
        )
        return keys, values

    def _encode(self, x: Tensor, scale: float) -> Tensor:
        if self._keys.dtype == torch.float8_e4m3fn:
            return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        if self._keys.dtype == torch.int8:
            return (x.float() / scale).round().clamp(-128, 127).to(torch.int8)
        return x

    def _decode(self, codes: Tensor, scale: float) -> Tensor:
        values = codes.to(self._dtype)
        return values * scale if codes.dtype != self._dtype and scale != 1.0 else values

    @staticmethod
    def _bytes(pool: Tensor) -> Tensor:
        """fp8 as bytes: indexing kernels do not know the fp8 types."""
        return pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool
