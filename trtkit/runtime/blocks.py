"""Which KV block belongs to whom: a free list with reference counts. Pure Python.

A block is a run of ``block_size`` token slots in every layer. Samples of one problem hold references to the same blocks
for their prompt; a block is free when its last holder lets go.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BlockAllocator", "blocks_for"]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` tokens."""
    return -(-tokens // block_size)


class BlockAllocator:
    """Hands out block ids 0..total-1."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """One free block, held once. The caller has checked that there is one."""
        assert self._free, "no free block: the scheduler must check before it takes"
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less; blocks without a holder become free."""
        for block in blocks:
            assert self._holders[block] > 0, "released a free block"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def holders(self, block: int) -> int:
        """How many hold the block."""
        return self._holders[block]

    def is_shared(self, block: int) -> bool:
        """True when writing into the block would be seen by another holder."""
        return self._holders[block] > 1
