"""A decode step as one CUDA graph launch: fixed shapes, fixed addresses, one copy in, one small read out.

A step of a 14B model is some 700 kernels; launched one by one they leave the GPU waiting for Python. A graph is
captured for each (rows, width of the block table, draft tree, sampling cuts), rows and width rounded up to a few sizes,
when it is first needed. A long run needs hundreds, and each takes some memory of the device: those not used for the
longest time are given back. Rows that pad a batch hold nothing: they write into the cache's spare block and the
contexts' last line.

Per step the host fills one buffer in pinned memory (pending tokens, lengths, sampling parameters, block table), which
is copied to the device in one go; the graph leaves (lengths, tokens) in one output buffer, which is read back.

The graph also writes where it left the rows into the input on the device. So the next step of the same rows can be
launched before the host has read this one (``follow``): it needs the block table alone, which must cover whatever this
step may still emit. Everything is enqueued on one stream, so each launch finds its predecessor's tokens, keys and
values. The host's buffers are two of each kind: one launch may wait on the stream while another one is read.

On a CPU the same buffers and shapes are run without a graph: slower than the plain step, and how the padding is tested.
Letters: R rows (padded), N nodes, B width of the block table, D nodes of the longest path.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drafter.config import TreeShape
from trtkit.log import logger
from trtkit.runtime.api import Request
from trtkit.runtime.cuda.step_input import (
    StepKey,
    cuts_of,
    padded_rows,
    padded_width,
    read_input,
    sampling_words,
    write_sampling,
)
from trtkit.runtime.decode import (
    Pending,
    Stepper,
    after,
    decode_step,
    emitted,
    fill_pending,
    log_probabilities,
    stand_words,
)
from trtkit.runtime.memory import free_bytes
from trtkit.runtime.sampling import SamplingRows, sampling_rows
from trtkit.runtime.scheduler import Row

__all__ = ["HostBuffers", "Launched", "StepGraphs", "graphs_kept"]

_WARM_UPS = 2
"""Runs before a capture: kernels are compiled and tuned, and libraries set up, outside of it."""
_BYTES_A_LAYER = 1 << 19
"""About what a graph takes beside its tensors, which all of them share: others report 24 MiB for 48 to 64 layers."""
_FEWEST_KEPT, _MOST_KEPT = 24, 256
"""The trees that are looked at with two numbers of rows and two widths; more than a run ever makes."""


def graphs_kept(free: int, layers: int) -> int:
    """How many graphs of a model may be there at a time, with ``free`` bytes beside its keys and values: they may take
    a third."""
    return min(max(_FEWEST_KEPT, free // (3 * _BYTES_A_LAYER * layers)), _MOST_KEPT)


@dataclass(slots=True, kw_only=True, eq=False)
class HostBuffers:
    """What one launch sends and gets, on the host (pinned memory on CUDA). Not to be touched while it is in flight."""

    inputs: Tensor
    """int64"""
    out: Tensor
    """int64"""
    scores: Tensor
    """float32"""
    filled: tuple[StepKey, tuple[Request, ...]] | None = None
    """Whose sampling parameters stand in ``inputs``."""
    read: torch.cuda.Event | None = None
    """Done when ``out`` and ``scores`` are there; CUDA only."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Launched:
    """A step on its way."""

    key: StepKey
    rows: tuple[Row, ...]
    host: HostBuffers
    began: float
    """Seconds of ``time.perf_counter`` at its launch."""


class StepGraphs:
    """Runs decode steps of ``on`` with fixed shapes: as CUDA graphs on a GPU, plainly on a CPU.

    ``max_drafts``: most tokens that the host drafts for a row. ``prepare(rows, shape)`` is called before a capture:
    kernels may tune themselves for such a step. Where a capture fails, a warning says why, and the steps run plainly
    from then on.
    """

    def __init__(
        self, on: Stepper, *, max_rows: int, max_path: int, max_drafts: int = 0,
        prepare: Callable[[int, TreeShape | None], None] = lambda _rows, _shape: None,
    ) -> None:  # fmt: skip
        device = on.cache.device
        self._on = on
        self._prepare = prepare
        self._on_cuda = self._captures = device.type == "cuda"
        rows = padded_rows(max_rows)
        words = rows * (stand_words(on.cache.table_width) + max_drafts) + sampling_words(rows)
        self._in = torch.zeros(words, dtype=torch.int64, device=device)
        self._out = torch.zeros(rows * (1 + max_path), dtype=torch.int64, device=device)
        self._scores = torch.zeros(rows * max_path, dtype=torch.float32, device=device)
        self._free = [self._host_buffers() for _ in range(2)]
        self._graphs: dict[StepKey, torch.cuda.CUDAGraph] = {}
        """The one that was used last is the last."""
        self.recorded = 0
        """Graphs captured so far."""
        self._sampling: tuple[tuple[Request, ...], SamplingRows] | None = None
        if self._on_cuda:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            kept, ranks = graphs_kept(free_bytes(device), on.model.spec.layers), on.model.ranks
            self._kept = kept if ranks is None else ranks.least(kept)  # a capture is a matter of all of them

    def _host_buffers(self) -> HostBuffers:
        inputs, out, scores = (
            torch.zeros(like.shape, dtype=like.dtype, pin_memory=self._on_cuda)
            for like in (self._in, self._out, self._scores)
        )
        event = torch.cuda.Event() if self._on_cuda else None  # type: ignore[no-untyped-call]
        return HostBuffers(inputs=inputs, out=out, scores=scores, read=event)

    def __len__(self) -> int:
        """Graphs that are there."""
        return len(self._graphs)

    def close(self) -> None:
        """Give the graphs back now, whoever holds this: NCCL does not end while one of them has an exchange in it."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def run(self, rows: Sequence[Row], shape: TreeShape | None) -> tuple[list[list[int]], list[list[float]]]:
        """One decode step, launched and read."""
        return self.collect(self.launch(rows, shape))

    def launch(
        self, rows: Sequence[Row], shape: TreeShape | None, drafts: npt.NDArray[np.int64] | None = None, *,
        began: float | None = None,
    ) -> Launched:  # fmt: skip
        """Start a step of ``rows`` where the host has them standing; ``drafts`` of ``shape``: what it looked up, since
        ``began``."""
        began, host = time.perf_counter() if began is None else began, self._free[-1]
        key = self._fill(host, rows, shape, drafts)
        launched = Launched(key=key, rows=tuple(rows), host=host, began=began)
        self._enqueue(launched, slice(0, key.words))
        return launched

    def covers(self, earlier: Launched, tokens: int) -> bool:
        """Whether a step can follow ``earlier`` that goes up to ``tokens`` slots beyond what the host knows of."""
        return self._on.cache.blocks_for(max(row.cached for row in earlier.rows) + tokens) <= earlier.key.width

    def follow(self, earlier: Launched, shape: TreeShape | None) -> Launched:
        """Start the step after ``earlier``, the last one launched, which need not have been read: the rows go on where
        it leaves them. Their blocks must reach as far as both can get, see ``covers``."""
        began, host = time.perf_counter(), self._free[-1]
        key = dataclasses.replace(earlier.key, shape=shape)
        table = slice(3 * key.rows, 3 * key.rows + len(earlier.rows) * key.width)
        host.inputs[table].view(-1, key.width).numpy()[:] = self._on.cache.block_table(earlier.rows, key.width)
        host.filled = None  # the table may lie where they were
        launched = Launched(key=key, rows=earlier.rows, host=host, began=began)
        self._enqueue(launched, table)
        return launched

    def collect(self, launched: Launched) -> tuple[list[list[int]], list[list[float]]]:
        """Wait for a step: each row's number of emitted tokens and the tokens drawn on its path, as ``emitted``; and
        the log-probabilities of these where a row asks for them."""
        self._wait(launched)
        key, host, count = launched.key, launched.host, len(launched.rows)
        lines: list[list[int]] = host.out[: key.rows * (1 + key.path)].view(key.rows, -1)[:count].tolist()
        scores: list[list[float]] = [[]] * count
        if key.scored:
            scores = host.scores[: key.rows * key.path].view(key.rows, -1)[:count].tolist()
        self._free.append(host)
        return lines, scores

    def _enqueue(self, launched: Launched, words: slice) -> None:
        """Copy these words of the host's input to the device, run the step, copy its output to the host."""
        self._start(launched, words)
        self._free.remove(launched.host)

    def _start(self, launched: Launched, words: slice) -> None:
        key, host = launched.key, launched.host
        self._in[words].copy_(host.inputs[words], non_blocking=True)
        graph = self._graph(key) if self._captures else None
        if graph is None:
            self._advance(key)
        else:
            graph.replay()
        read, scored = key.rows * (1 + key.path), key.rows * key.path if key.scored else 0
        host.out[:read].copy_(self._out[:read], non_blocking=True)
        host.scores[:scored].copy_(self._scores[:scored], non_blocking=True)
        if host.read is not None:
            host.read.record(torch.cuda.current_stream(self._in.device))

    def _wait(self, launched: Launched) -> None:
        if launched.host.read is not None:
            launched.host.read.synchronize()

    def load(self, rows: Sequence[Row], shape: TreeShape | None) -> StepKey:
        """Put a step's input on the device without running it."""
        host = self._free[-1]
        key = self._fill(host, rows, shape)
        self._in[: key.words].copy_(host.inputs[: key.words])
        return key

    def _fill(
        self, host: HostBuffers, rows: Sequence[Row], shape: TreeShape | None,
        drafts: npt.NDArray[np.int64] | None = None,
    ) -> StepKey:  # fmt: skip
        """Write the step's input into the host's buffer."""
        requests = tuple(row.request for row in rows)
        if self._sampling is None or self._sampling[0] != requests:
            params, seeds = [request.sampling for request in requests], [request.seed for request in requests]
            self._sampling = (requests, sampling_rows(params, seeds, torch.device("cpu")))
        sampling = self._sampling[1]
        cache = self._on.cache
        nodes = 1 if shape is None else shape.max_nodes
        blocks = cache.blocks_for(max(row.cached for row in rows) + nodes)
        key = StepKey(
            rows=padded_rows(len(rows)), width=padded_width(blocks, cache.table_width), shape=shape,
            cuts=cuts_of(sampling), scored=any(request.logprobs for request in requests),
            looked_up=0 if drafts is None else drafts.shape[1],
        )  # fmt: skip
        fill_pending(
            host.inputs[: key.stand].numpy(), cache, rows, size=key.rows, width=key.width, pad_line=self._pad_line,
            drafts=drafts,
        )  # fmt: skip
        if host.filled != (key, requests):  # the parameters stay as they are while the batch does
            write_sampling(host.inputs, key, sampling)
            host.filled = (key, requests)
        return key

    @property
    def _pad_line(self) -> int:
        return self._on.contexts.shape[0] - 1

    def step(self, key: StepKey) -> Tensor:
        """The step from the input to the output buffer, both on the device. The input stays: returns where the step
        leaves the rows, see ``after``."""
        at, sampling = self.inputs(key)
        path, verified = decode_step(self._on, at, key.shape, sampling, fixed=True)
        if key.scored:
            scores = log_probabilities(verified.logits, path)
            self._scores[: key.rows * key.path].view(key.rows, -1).copy_(scores)
        self._out[: key.rows * (1 + key.path)].view(key.rows, -1).copy_(emitted(path))
        return after(at, path, self._pad_line)

    def _advance(self, key: StepKey) -> None:
        """The step, and the input made that of the step after it. What a graph is captured of."""
        self._in[: 2 * key.rows].view(2, -1).copy_(self.step(key))

    def inputs(self, key: StepKey) -> tuple[Pending, SamplingRows]:
        """What the step reads, as views of the input buffer on the device."""
        return read_input(self._in, key)

    def _graph(self, key: StepKey) -> torch.cuda.CUDAGraph | None:
        """The graph of ``key``, captured where it is not there; None when that is not possible."""
        graph = self._graphs.pop(key, None)
        if graph is not None:
            self._graphs[key] = graph
            return graph
        self._make_room()
        why = self._capture(key)
        if "out of memory" in why and len(self._graphs) > 1 and self._on.model.ranks is None:
            self._kept = len(self._graphs) // 2 + 1
            logger.debug("CUDA graphs: %d and no more, for want of memory", self._kept)
            self._make_room()
            why = self._capture(key)
        if why:
            self._captures = False
            logger.warning("decode steps run without CUDA graphs: %s", why)
        return self._graphs.get(key)

    def _make_room(self) -> None:
        """For one more graph."""
        if len(self._graphs) < self._kept:
            return
        torch.cuda.synchronize(self._in.device)  # one of them may be running
        for key in list(self._graphs)[: len(self._graphs) + 1 - self._kept]:
            self._graphs.pop(key).reset()

    def _capture(self, key: StepKey) -> str:
        """Warm up, then record: why that is not possible, or nothing. Of several ranks all can, or none."""
        logger.debug("capturing a decode step: %d rows, %d blocks, tree %s", key.rows, key.width, key.shape)
        ranks, why = self._on.model.ranks, ""
        try:
            self._warm_up(key)
        except RuntimeError as problem:
            if ranks is not None:
                raise  # the others go on to exchanges that this one has not come to
            return str(problem).strip()[:500]
        try:
            self._graphs[key] = self._record(key)
            self.recorded += 1
        except RuntimeError as problem:
            why = str(problem).strip()[:500]
        if ranks is not None and not ranks.least(0 if why else 1):
            self._graphs.pop(key, None)
            why = why or "another rank cannot record them"
        return why

    def _warm_up(self, key: StepKey) -> None:
        """Run the step on a side stream. The input and the rows' contexts are left as they were."""
        self._prepare(key.rows, key.shape)
        contexts, current = self._on.contexts.clone(), torch.cuda.current_stream(self._in.device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                for _ in range(_WARM_UPS):
                    self.step(key)
        finally:  # also where a step fails: what is launched next shares the workspace with it
            current.wait_stream(self._side)
            self._on.contexts.copy_(contexts)

    def _record(self, key: StepKey) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            self._advance(key)
        return graph
