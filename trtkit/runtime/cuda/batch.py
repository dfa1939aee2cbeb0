"""What the CUDA attention needs to know about a verify step: device tensors only, so that a CUDA graph can replay it.

No triton here: who fills the batch need not load the kernels. Letters: R rows, N nodes, B blocks of the widest row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CudaVerifyBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaVerifyBatch:
    """R rows that each add N nodes after what they have in the cache.

    Node n of a row stands at slot ``cached + n``. It sees every slot before ``cached`` and the nodes in its mask. B
    only bounds the lengths: a row gives the same bits in a wider table. A row that pads the batch has ``cached`` 0 and
    slots in a block that nobody reads.
    """

    rows: int
    nodes: int
    blocks: Tensor
    """int32 or int64 (R, B), contiguous: the block table. B x block_size >= cached + N in each row."""
    cached: Tensor
    """int32 or int64 (R,): tokens in the cache."""
    mask: Tensor
    """bool or int32 (R, N, N): ``mask[r, n, j]`` where node n may look at node j, itself included (``TokenTree.mask``).
    May be expanded along R. The kernel reads int32 (bytes would change the order in which tensor cores sum): convert
    once a step, or every layer does.
    """
    slots: Tensor
    """int64 (R * N,): where the nodes' keys and values go, block id x block_size + offset."""
