"""Which rows run in the next step, and in which KV blocks. Pure Python: no tensor, no clock, no model.

Words: a *request* becomes a *row* when it is admitted. The tokens of a prompt but its last are its *prefix*; requests
with equal prompts share one prefix, computed once. A row's last token is always pending: its keys and values are
computed by the step that draws the next token. Hence ``cached == len(tokens) - 1`` for every running row.

When blocks run out, idle prefixes go first, then the youngest row is *preempted*: its blocks are freed and it waits at
the front of the queue, to be recomputed. The oldest row always proceeds, so every request finishes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trtkit.runtime.api import Request
from trtkit.runtime.blocks import BlockAllocator, blocks_for

__all__ = ["Prefix", "Row", "Schedule", "Scheduler"]


@dataclass(slots=True, kw_only=True, eq=False)
class Prefix:
    """The shared part of equal prompts: every prompt token but the last."""

    tokens: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    filled: bool = False
    """Keys and values are (or will be, by this step's prefill) in ``blocks``."""
    requests: int = 0
    """Unfinished requests with this prompt."""
    rows: int = 0
    """Of those, admitted now."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A request on its way. ``tokens`` is the prompt and what was generated."""

    request: Request
    order: int
    prefix: Prefix
    tokens: list[int]
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    """Line of the block table while admitted."""

    @property
    def generated(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What the next step does, in this order."""

    prefills: tuple[Prefix, ...]
    """Prefixes to compute."""
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy, (from, to): a shared block that a row is about to write into."""
    recomputes: tuple[Row, ...]
    """Preempted rows that are back: compute ``tokens[cached:-1]``, then set ``cached``."""
    rows: tuple[Row, ...]
    """Every running row, oldest first."""
    preempted: int


class Scheduler:
    """Waiting and running rows over one block allocator."""

    def __init__(self, allocator: BlockAllocator, *, block_size: int, max_rows: int) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.max_rows = max_rows
        self.running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._by_id: dict[str, Row] = {}
        self._slots = list(range(max_rows - 1, -1, -1))
        self._submitted = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._by_id)

    def blocks_needed(self, total_tokens: int) -> int:
        """Blocks that a lone row of ``total_tokens`` takes at its longest, its shared partial block copied."""
        return blocks_for(total_tokens, self.block_size) + 1

    def submit(self, request: Request) -> None:
        """Queue a request."""
        key = request.prompt[:-1]
        prefix = self._prefixes.setdefault(key, Prefix(tokens=key))
        prefix.requests += 1
        row = Row(request=request, order=self._submitted, prefix=prefix, tokens=list(request.prompt))
        self._submitted += 1
        self._by_id[request.id] = row
        self._waiting.append(row)

    def finish(self, request_id: str) -> None:
        """Forget a request, wherever it is, and free what it holds."""
        row = self._by_id.pop(request_id)
        if row.slot >= 0:
            self.running.remove(row)
            self._leave(row)
        else:
            self._waiting.remove(row)
        row.prefix.requests -= 1
        if row.prefix.requests == 0:
            self._drop(row.prefix)
            del self._prefixes[row.prefix.tokens]

    def schedule(self, nodes: int) -> Schedule:
        """Give every running row room for ``nodes`` more tokens, then admit what fits.

        ``nodes`` is the number of draft-tree nodes that the step verifies in each row, 1 without a drafter.
        """
        copies: list[tuple[int, int]] = []
        preempted = 0
        grown = 0
        while grown < len(self.running):
            row = self.running[grown]
            missing = self._missing(row, nodes) - self.allocator.free
            if missing > 0 and not self._reclaim(missing):
                # The youngest gives way, possibly the row that asked.
                self._preempt(self.running[-1])
                preempted += 1
                continue
            self._grow(row, nodes, copies)
            grown += 1
        prefills, recomputes = self._admit(nodes, copies) if not preempted else ((), ())
        return Schedule(
            prefills=prefills, copies=tuple(copies), recomputes=recomputes, rows=tuple(self.running),
            preempted=preempted,
        )  # fmt: skip

    def _admit(self, nodes: int, copies: list[tuple[int, int]]) -> tuple[tuple[Prefix, ...], tuple[Row, ...]]:
        prefills: list[Prefix] = []
        recomputes: list[Row] = []
        while self._waiting and self._slots:
            row = self._waiting[0]
            prefix = row.prefix
            length = len(prefix.tokens)
            own = blocks_for(len(row.tokens) - 1 + nodes, self.block_size) - length // self.block_size
            needed = own + (0 if prefix.filled else blocks_for(length, self.block_size))
            # One spare block per running row keeps a fresh row from being preempted at once.
            missing = needed + len(self.running) - self.allocator.free
            if missing > 0 and not self._reclaim(missing, keep=prefix):
                break
            self._waiting.popleft()
            if not prefix.filled:
                prefix.blocks = [self.allocator.take() for _ in range(blocks_for(length, self.block_size))]
                prefix.filled = True
                if length:
                    prefills.append(prefix)
            self._enter(row)
            self._grow(row, len(row.tokens) - 1 - row.cached + nodes, copies)
            if row.cached < len(row.tokens) - 1:
                recomputes.append(row)
        return tuple(prefills), tuple(recomputes)

    def _missing(self, row: Row, nodes: int) -> int:
        """Free blocks that growing by ``nodes`` tokens would take."""
        fresh = blocks_for(row.cached + nodes, self.block_size) - len(row.blocks)
        return max(fresh, 0) + (1 if self._must_copy(row) else 0)

    def _must_copy(self, row: Row) -> bool:
        index = row.cached // self.block_size
        return index < len(row.blocks) and self.allocator.is_shared(row.blocks[index])

    def _grow(self, row: Row, nodes: int, copies: list[tuple[int, int]]) -> None:
        if self._must_copy(row):
            index = row.cached // self.block_size
            shared = row.blocks[index]
            row.blocks[index] = self.allocator.take()
            self.allocator.release([shared])
            copies.append((shared, row.blocks[index]))
        while len(row.blocks) * self.block_size < row.cached + nodes:
            row.blocks.append(self.allocator.take())

    def _enter(self, row: Row) -> None:
        row.slot = self._slots.pop()
        row.prefix.rows += 1
        row.blocks = list(row.prefix.blocks)
        self.allocator.share(row.blocks)
        row.cached = len(row.prefix.tokens)
        self.running.append(row)
        self.running.sort(key=lambda other: other.order)

    def _leave(self, row: Row) -> None:
        self.allocator.release(row.blocks)
        row.blocks = []
        row.cached = 0
        self._slots.append(row.slot)
        row.slot = -1
        row.prefix.rows -= 1

    def _preempt(self, row: Row) -> None:
        self.running.remove(row)
        self._leave(row)
        self._waiting.appendleft(row)

    def _idle(self, keep: Prefix | None) -> Iterator[Prefix]:
        return (p for p in self._prefixes.values() if p.filled and p.rows == 0 and p is not keep)

    def _reclaim(self, missing: int, keep: Prefix | None = None) -> bool:
        """Free idle prefixes until ``missing`` blocks came back; False (and nothing freed) when there are too few."""
        idle = list(self._idle(keep))
        if sum(len(prefix.blocks) for prefix in idle) < missing:
            return False
        for prefix in idle:
            if missing <= 0:
                break
            missing -= len(prefix.blocks)
            self._drop(prefix)
        return True

    def _drop(self, prefix: Prefix) -> None:
        self.allocator.release(prefix.blocks)
        prefix.blocks = []
        prefix.filled = False
