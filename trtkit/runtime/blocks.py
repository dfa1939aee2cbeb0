"""Which KV block belongs to whom: a free list with reference counts. Pure Python.

A block is a run of ``block_size`` token slots in every layer. Samples of one problem hold references to the same blocks
for their prompt; a block is free when its last holder lets go.

A full block may have a name, which says what it holds (``chain_names``). It keeps both when it becomes free, until it
is needed for something else: who asks for the name till then need not compute it. Of these the one that was left first
goes first, and of those left together the last: a block is of no use without the ones before it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["BlockAllocator", "blocks_for", "chain_names"]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` tokens."""
    return -(-tokens // block_size)


def chain_names(tokens: Sequence[int], block_size: int) -> Iterator[bytes]:
    """Names of the full blocks of ``tokens``, the first one's first. Keys and values depend on all tokens up to their
    own, and so does a name."""
    name = b""
    for start in range(0, len(tokens) // block_size * block_size, block_size):
        content = array("q", tokens[start : start + block_size]).tobytes()
        name = hashlib.blake2b(name + content, digest_size=16).digest()
        yield name


class BlockAllocator:
    """Hands out block ids 0..total-1."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._kept: dict[int, None] = {}
        """Free ones with a name: the first goes first."""
        self._holders = [0] * total
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    def take(self) -> int:
        """One free block, held once. The caller has checked that there is one."""
        assert self.free, "no free block: the scheduler must check before it takes"
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._kept))
            del self._kept[block], self._named[self._names.pop(block)]
        self._holders[block] = 1
        return block

    def name(self, block: int, name: bytes) -> None:
        """Say what a block holds that nobody writes to any more; in vain where another one holds the same."""
        if name not in self._named and block not in self._names:
            self._names[block], self._named[name] = name, block

    def find(self, name: bytes) -> int | None:
        """The block of that name, held once more; None where there is none."""
        block = self._named.get(name)
        if block is not None:
            self._kept.pop(block, None)
            self._holders[block] += 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            assert self._holders[block] > 0
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less; blocks without a holder become free."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, "released a free block"
            self._holders[block] -= 1
            if self._holders[block] == 0 and block in self._names:
                self._kept[block] = None
            elif self._holders[block] == 0:
                self._free.append(block)

    def holders(self, block: int) -> int:
        """How many hold the block."""
        return self._holders[block]

    def is_shared(self, block: int) -> bool:
        """True when writing into the block would be seen by another holder."""
        return self._holders[block] > 1
