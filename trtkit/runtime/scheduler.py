"""Which rows run in the next step, and in which KV blocks. Pure Python: no tensor, no clock, no model.

Words: a *request* becomes a *row* when it is admitted. The tokens of a prompt but its last are its *prefix*; requests
with equal prompts share one prefix, computed once. A row's last token is always pending: its keys and values are
computed by the step that draws the next token. Hence ``cached == len(tokens) - 1`` for every running row.

A row that is *resting* (held after its end, or paused) is not in the batch; it keeps its blocks until others need them.

When blocks run out, idle prefixes go first, then the blocks of rows outside the batch, then the youngest row is
*preempted*: its blocks are freed and it waits at the front of the queue, to be recomputed. The oldest row always
proceeds, so every request finishes.

A long prefix is computed a part per step while rows run, so that these need not wait for all of it.

With a *prefix cache* the full blocks of what was computed keep their contents while they are free (``blocks.py``): a
prompt that begins with the same tokens takes them over, be it another problem's, or one with what a sample has written.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtkit.runtime.api import Request
from trtkit.runtime.blocks import BlockAllocator, blocks_for, chain_names

__all__ = ["Part", "Prefix", "Row", "Schedule", "Scheduler"]

_LEAST_REUSED = 512
"""Tokens. Fewer are computed in the time of a step or two; and samples of an ordinary problem have the same bits,
whatever was asked before it."""


@dataclass(slots=True, kw_only=True, eq=False)
class Prefix:
    """The shared part of equal prompts: every prompt token but the last."""

    tokens: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are (or will be, by this step's prefill) in ``blocks``."""
    requests: int = 0
    """Unfinished requests with this prompt."""
    rows: int = 0
    """Of those, with blocks of their own: the prefix's blocks would not come back if it were dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens of a prefix, from place ``start`` on, to be computed into its ``blocks``."""

    start: int
    tokens: tuple[int, ...]
    blocks: Sequence[int]


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
    limit: int = 0
    """Length (prompt and output) at which the row ends."""
    ended: bool = False
    """Its end was reported: it rests because it is held."""

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What the next step does, in this order."""

    prefills: tuple[Part, ...]
    """What to compute, in this order: a prefix may begin with what the one before it computes."""
    copies: tuple[tuple[int, int], ...]
    """Blocks to copy, (from, to): a shared block that a row is about to write into."""
    recomputes: tuple[Row, ...]
    """Preempted rows that are back: compute ``tokens[cached:-1]``, then set ``cached``."""
    rows: tuple[Row, ...]
    """Every running row, oldest first."""
    preempted: int


class Scheduler:
    """Waiting and running rows over one block allocator."""

    def __init__(
        self, allocator: BlockAllocator, *, block_size: int, max_rows: int, part: int = 1024, prefix_cache: bool = False
    ) -> None:  # fmt: skip
        """``part``: most prompt tokens of a step while rows run."""
        self.allocator = allocator
        self.block_size = block_size
        self._most, self._prefix_cache = part, prefix_cache
        self.running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._resting: dict[str, Row] = {}
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._by_id: dict[str, Row] = {}
        self._slots = list(range(max_rows - 1, -1, -1))
        self._submitted = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.running or self._waiting)

    def resting(self, request_id: str) -> Row | None:
        """The row of a resting request."""
        return self._resting.get(request_id)

    def blocks_needed(self, total_tokens: int) -> int:
        """Blocks that a lone row of ``total_tokens`` takes at its longest, its shared partial block copied."""
        return blocks_for(total_tokens, self.block_size) + 1

    def submit(self, request: Request) -> None:
        """Queue a request."""
        key = request.prompt[:-1]
        prefix = self._prefixes.setdefault(key, Prefix(tokens=key))
        prefix.requests += 1
        row = Row(
            request=request, order=self._submitted, prefix=prefix, tokens=list(request.prompt),
            limit=len(request.prompt) + request.max_tokens,
        )  # fmt: skip
        self._submitted += 1
        self._by_id[request.id] = row
        self._waiting.append(row)

    def finish(self, request_id: str) -> None:
        """Forget a request, wherever it is, and free what it holds."""
        row = self._by_id.pop(request_id)
        self._take_out(row)
        self._free(row)
        row.prefix.requests -= 1
        if row.prefix.requests == 0:
            self._drop(row.prefix)
            del self._prefixes[row.prefix.tokens]

    def can_rest(self, request_id: str) -> bool:
        """Whether the request is held and waits or runs."""
        row = self._by_id.get(request_id)
        return row is not None and row.request.hold and request_id not in self._resting

    def rest(self, request_id: str) -> None:
        """Take a request out of the batch or the queue; it keeps its blocks while nobody else needs them."""
        row = self._by_id[request_id]
        self._take_out(row)
        self._resting[request_id] = row

    def resume(self, request_id: str, tokens: Sequence[int], *, drop: int, limit: int) -> None:
        """Put a resting request at the front of the queue, its last ``drop`` tokens replaced by ``tokens``.

        What its cache lacks is computed when it is admitted.
        """
        row = self._resting.pop(request_id)
        kept = len(row.tokens) - drop
        row.tokens[kept:] = tokens
        row.cached = min(row.cached, kept, len(row.tokens) - 1)
        row.limit = limit
        row.ended = False
        self._waiting.appendleft(row)

    def _take_out(self, row: Row) -> None:
        if row.slot >= 0:
            self.running.remove(row)
            self._slots.append(row.slot)
            row.slot = -1
        elif self._resting.pop(row.request.id, None) is None:
            self._waiting.remove(row)

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
            if missing > 0 and not self._reclaim(missing, keep=row):
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

    def look_ahead(self, tokens: int, nodes: int) -> bool:
        """Room for ``tokens`` more in every running row, for a step that is launched before the one in flight is read.

        Only free blocks are taken: nobody is preempted, admitted or dropped. False, and nothing taken, when they are
        too few, or when a waiting row would be admitted by :meth:`schedule`: then it is that one's turn.
        """
        if self._waiting and self._slots and self._shortage(self._waiting[0], nodes) <= 0:
            return False
        if sum(self._missing(row, tokens) for row in self.running) > self.allocator.free:
            return False
        for row in self.running:
            assert not self._must_copy(row), "schedule has made the block that a row writes into its own"
            self._grow(row, tokens, [])
        return True

    def _shortage(self, row: Row, nodes: int) -> int:
        """Blocks that lack for admitting a waiting row, after all that may be reclaimed; 0 or less: it fits."""
        missing = self._missing_to_enter(row, nodes)
        return missing if missing <= 0 else missing - self._reclaimable(self._outside(row), row)

    def _missing_to_enter(self, row: Row, nodes: int) -> int:
        """Free blocks that lack for admitting a waiting row."""
        length = len(row.prefix.tokens)
        total = blocks_for(len(row.tokens) - 1 + nodes, self.block_size)
        if row.blocks:  # back from a rest
            needed = max(0, total - len(row.blocks)) + (1 if self._must_copy(row) else 0)
        else:
            needed = total - length // self.block_size
            needed += 0 if row.prefix.blocks else blocks_for(length, self.block_size)
        # One spare block per running row keeps a fresh row from being preempted at once.
        return needed + len(self.running) - self.allocator.free

    def _admit(self, nodes: int, copies: list[tuple[int, int]]) -> tuple[tuple[Part, ...], tuple[Row, ...]]:
        prefills: list[Part] = []
        recomputes: list[Row] = []
        most = room = self._most if self.running else self.allocator.total * self.block_size
        while self._waiting and self._slots:
            row = self._waiting[0]
            missing = self._missing_to_enter(row, nodes)
            if missing > 0 and not self._reclaim(missing, keep=row):
                break
            if not row.blocks and (left := self._uncomputed(row.prefix)):
                if room < min(left, most):
                    break  # more in the next step
                prefills.append(self._part(row.prefix, most))
                room -= min(left, most)
                if left > most:
                    break
            self._waiting.popleft()
            self._enter(row)
            self._grow(row, len(row.tokens) - 1 - row.cached + nodes, copies)
            if row.cached < len(row.tokens) - 1:
                recomputes.append(row)
        return tuple(prefills), tuple(recomputes)

    def _uncomputed(self, prefix: Prefix) -> int:
        """How many tokens of a prefix are to be computed. It has its blocks from then on, those among them that hold
        its first tokens already, or will before it is computed."""
        if not prefix.blocks:
            prefix.blocks = self._found(prefix.tokens)
            prefix.computed = len(prefix.blocks) * self.block_size
            while len(prefix.blocks) * self.block_size < len(prefix.tokens):
                prefix.blocks.append(self.allocator.take())
        return len(prefix.tokens) - prefix.computed

    def _part(self, prefix: Prefix, most: int) -> Part:
        """The next part of a prefix, to be computed in this step."""
        start = prefix.computed
        prefix.computed = min(start + most, len(prefix.tokens))
        self._name(prefix.blocks, prefix.tokens[: prefix.computed])
        return Part(start=start, tokens=prefix.tokens[start : prefix.computed], blocks=prefix.blocks)

    def _found(self, tokens: Sequence[int]) -> list[int]:
        """The blocks, now held, that hold the first of ``tokens``."""
        blocks: list[int] = []
        for name in chain_names(tokens, self.block_size) if self._prefix_cache else ():
            block = self.allocator.find(name)
            if block is None:
                break
            blocks.append(block)
        if len(blocks) * self.block_size < _LEAST_REUSED:
            self.allocator.release(blocks)
            return []
        return blocks

    def _name(self, blocks: Sequence[int], tokens: Sequence[int]) -> None:
        """``blocks`` hold ``tokens``: whoever wants the same finds them until they are needed for something else."""
        if self._prefix_cache:
            for block, name in zip(blocks, chain_names(tokens, self.block_size), strict=False):
                self.allocator.name(block, name)

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
        if not row.blocks:
            row.prefix.rows += 1
            row.blocks = list(row.prefix.blocks)
            self.allocator.share(row.blocks)
            row.cached = len(row.prefix.tokens)
        self.running.append(row)
        self.running.sort(key=lambda other: other.order)

    def _free(self, row: Row) -> None:
        """Give back a row's blocks. A row of an empty prefix may be admitted and hold none."""
        self._name(row.blocks, row.tokens[: row.cached])
        self.allocator.release(row.blocks)
        if row.blocks:
            row.prefix.rows -= 1
        row.blocks = []
        row.cached = 0

    def _preempt(self, row: Row) -> None:
        self._take_out(row)
        self._free(row)
        self._waiting.appendleft(row)

    def _reclaim(self, missing: int, keep: Row) -> bool:
        """Free idle prefixes, then the blocks of rows outside the batch (youngest first), until ``missing`` blocks came
        back. False, and nothing freed, when there are too few; what ``keep`` needs stays."""
        outside = self._outside(keep)
        if self._reclaimable(outside, keep) < missing:
            return False
        wanted = self.allocator.free + missing
        self._drop_idle(wanted, keep)
        for row in sorted(outside, key=lambda row: -row.order):
            if self.allocator.free >= wanted:
                break
            self._free(row)
            self._drop_idle(wanted, keep)
        return True

    def _outside(self, keep: Row) -> list[Row]:
        """Rows outside the batch that hold blocks, but ``keep``."""
        return [row for row in (*self._resting.values(), *self._waiting) if row.blocks and row is not keep]

    def _reclaimable(self, outside: Sequence[Row], keep: Row) -> int:
        """Blocks that come back when every row in ``outside`` and every prefix that is idle then is dropped."""
        holders = Counter(block for row in outside for block in row.blocks)
        rows = Counter(id(row.prefix) for row in outside)
        for prefix in self._prefixes.values():
            if prefix is not keep.prefix and prefix.rows == rows[id(prefix)]:
                holders.update(prefix.blocks)
        return sum(count == self.allocator.holders(block) for block, count in holders.items())

    def _drop_idle(self, wanted: int, keep: Row) -> None:
        for prefix in self._prefixes.values():
            if self.allocator.free >= wanted:
                return
            if prefix.rows == 0 and prefix is not keep.prefix:
                self._drop(prefix)

    def _drop(self, prefix: Prefix) -> None:
        self.allocator.release(prefix.blocks)
        prefix.blocks = []
        prefix.computed = 0
