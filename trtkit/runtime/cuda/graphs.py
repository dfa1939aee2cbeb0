"""A decode step as one CUDA graph launch: fixed shapes, fixed addresses, one copy in, one small read out.

A step of a 14B model is some 700 kernels; launched one by one they leave the GPU waiting for Python. A graph is
captured for each (rows, width of the block table, draft tree, sampling cuts), rows and width rounded up to a few sizes,
when it is first needed. Rows that pad a batch hold nothing: they write into the cache's spare block and the contexts'
last line.

Per step the host fills one buffer in pinned memory (pending tokens, lengths, sampling parameters, block table), which
is copied to the device in one go; the graph leaves (lengths, tokens) in one output buffer, which is read back.

On a CPU the same buffers and shapes are run without a graph: slower than the plain step, and how the padding is tested.
Letters: R rows (padded), N nodes, B width of the block table, D nodes of the longest path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.config import TreeShape
from trtkit.log import logger
from trtkit.runtime.api import Request
from trtkit.runtime.decode import Pending, Stepper, decode_step, emitted, fill_pending, log_probabilities, pending_from
from trtkit.runtime.sampling import SamplingRows, sampling_rows
from trtkit.runtime.scheduler import Row

__all__ = ["ROW_SIZES", "StepGraphs", "StepKey", "padded_rows", "padded_width"]

ROW_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of rows that a graph is captured for; above, multiples of 128."""
_WARM_UPS = 2
"""Runs before a capture: kernels are compiled and tuned, and libraries set up, outside of it."""


def padded_rows(rows: int) -> int:
    """The number of rows of the graph that runs ``rows``."""
    return next((size for size in ROW_SIZES if size >= rows), -(-rows // 128) * 128)


def padded_width(blocks: int, most: int) -> int:
    """The width of its block table: a power of two, ``most`` (the longest row's) at the most."""
    return min(1 << (blocks - 1).bit_length(), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKey:
    """What a graph has baked in."""

    rows: int
    width: int
    shape: TreeShape | None
    cuts: tuple[bool, ...]
    """The host's part of :class:`SamplingRows`: which cuts any row asks for."""
    scored: bool
    """A row asks for log-probabilities."""

    @property
    def path(self) -> int:
        """Nodes of the longest path: D."""
        return 1 if self.shape is None else 1 + self.shape.length

    @property
    def words(self) -> int:
        """int64 words of the input: where the rows stand, then ``_INTEGERS``, then ``_FLOATS``."""
        return self.rows * (3 + self.width) + _sampling_words(self.rows)


_INTEGERS = ("seeds", "top_k", "cold")
_FLOATS = ("temperature", "top_p", "min_p")
_CUTS = ("greedy", "any_greedy", "any_top_k", "any_top_p", "any_min_p", "any_switch")
_PAD = {"temperature": 1.0, "top_p": 1.0}
"""Sampling parameters of a row that pads the batch; the others are 0."""


def _sampling_words(rows: int) -> int:
    return len(_INTEGERS) * rows + -(-len(_FLOATS) * rows // 2)


def _sampling_views(words: Tensor, rows: int) -> dict[str, Tensor]:
    """Views of the sampling parameters in the int64 words that hold them: integers, then floats, two to a word."""
    integers = words[: len(_INTEGERS) * rows].view(len(_INTEGERS), rows).unbind()
    floats = words[len(_INTEGERS) * rows :].view(torch.float32)[: len(_FLOATS) * rows].view(len(_FLOATS), rows).unbind()
    return dict(zip((*_INTEGERS, *_FLOATS), (*integers, *floats), strict=True))


class StepGraphs:
    """Runs decode steps of ``on`` with fixed shapes: as CUDA graphs on a GPU, plainly on a CPU.

    ``prepare(rows, shape)`` is called before a capture: kernels may tune themselves for such a step. Where a capture
    fails, a warning says why, and the steps run plainly from then on.
    """

    def __init__(
        self, on: Stepper, *, max_rows: int, max_path: int,
        prepare: Callable[[int, TreeShape | None], None] = lambda _rows, _shape: None,
    ) -> None:  # fmt: skip
        device = on.cache.device
        self._on = on
        self._prepare = prepare
        self._on_cuda = self._captures = device.type == "cuda"
        rows = padded_rows(max_rows)
        words = rows * (3 + on.cache.table_width) + _sampling_words(rows)
        self._host_in = torch.zeros(words, dtype=torch.int64, pin_memory=self._captures)
        self._host_out = torch.zeros(rows * (1 + max_path), dtype=torch.int64, pin_memory=self._captures)
        self._in = torch.zeros(words, dtype=torch.int64, device=device)
        self._out = torch.zeros(rows * (1 + max_path), dtype=torch.int64, device=device)
        self._scores = torch.zeros(rows * max_path, dtype=torch.float32, device=device)
        self._graphs: dict[StepKey, torch.cuda.CUDAGraph] = {}
        self._sampling: tuple[tuple[Request, ...], SamplingRows] | None = None
        self._filled: tuple[StepKey, tuple[Request, ...]] | None = None
        if self._on_cuda:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Graphs captured so far."""
        return len(self._graphs)

    def run(self, rows: Sequence[Row], shape: TreeShape | None) -> tuple[list[list[int]], list[list[float]]]:
        """One decode step: each row's number of emitted tokens and the tokens drawn on its path, as ``emitted``; and
        the log-probabilities of these where a row asks for them."""
        key = self.fill(rows, shape)
        self.upload(key)
        graph = self._graph(key) if self._captures else None
        if graph is None:
            self.step(key)
        else:
            graph.replay()
        read = key.rows * (1 + key.path)
        self._host_out[:read].copy_(self._out[:read], non_blocking=True)
        if self._on_cuda:
            self._read.record(torch.cuda.current_stream(self._in.device))
            self._read.synchronize()
        lines: list[list[int]] = self._host_out[:read].view(key.rows, -1)[: len(rows)].tolist()
        scores: list[list[float]] = [[]] * len(rows)
        if key.scored:
            scores = self._scores[: key.rows * key.path].view(key.rows, -1)[: len(rows)].tolist()
        return lines, scores

    def fill(self, rows: Sequence[Row], shape: TreeShape | None) -> StepKey:
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
            cuts=_cuts(sampling), scored=any(request.logprobs for request in requests),
        )  # fmt: skip
        stand = key.rows * (3 + key.width)
        fill_pending(
            self._host_in[:stand].numpy(), cache, rows, size=key.rows, width=key.width,
            pad_line=self._on.contexts.shape[0] - 1,
        )  # fmt: skip
        if self._filled != (key, requests):  # the parameters stay as they are while the batch does
            for name, view in _sampling_views(self._host_in[stand : key.words], key.rows).items():
                view[: len(rows)] = getattr(sampling, name)
                view[len(rows) :] = _PAD.get(name, 0)
            self._filled = (key, requests)
        return key

    def upload(self, key: StepKey) -> None:
        """Copy what ``fill`` wrote to the device."""
        self._in[: key.words].copy_(self._host_in[: key.words], non_blocking=True)

    def step(self, key: StepKey) -> None:
        """The step from the input to the output buffer, both on the device. What a graph is captured of."""
        at, sampling = self.inputs(key)
        path, verified = decode_step(self._on, at, key.shape, sampling, fixed=True)
        if key.scored:
            scores = log_probabilities(verified.logits, path)
            self._scores[: key.rows * key.path].view(key.rows, -1).copy_(scores)
        self._out[: key.rows * (1 + key.path)].view(key.rows, -1).copy_(emitted(path))

    def inputs(self, key: StepKey) -> tuple[Pending, SamplingRows]:
        """What the step reads, as views of the input buffer on the device."""
        stand = key.rows * (3 + key.width)
        views = _sampling_views(self._in[stand : key.words], key.rows)
        sampling = SamplingRows(
            seeds=views["seeds"], temperature=views["temperature"], top_k=views["top_k"], top_p=views["top_p"],
            min_p=views["min_p"], cold=views["cold"] != 0, **dict(zip(_CUTS, key.cuts, strict=True)),
        )  # fmt: skip
        return pending_from(self._in[:stand], key.rows, key.width), sampling

    def _graph(self, key: StepKey) -> torch.cuda.CUDAGraph | None:
        """The graph of ``key``, captured on the first call; None when that is not possible."""
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(key)
            except RuntimeError as problem:
                self._captures = False
                logger.warning("decode steps run without CUDA graphs: %s", str(problem).strip()[:500])
                return None
        return self._graphs[key]

    def _capture(self, key: StepKey) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, then record. The rows' contexts are left as they were."""
        logger.debug("capturing a decode step: %d rows, %d blocks, tree %s", key.rows, key.width, key.shape)
        self._prepare(key.rows, key.shape)
        contexts, current = self._on.contexts.clone(), torch.cuda.current_stream(self._in.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                self.step(key)
        current.wait_stream(self._side)
        self._on.contexts.copy_(contexts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            self.step(key)
        return graph


def _cuts(sampling: SamplingRows) -> tuple[bool, ...]:
    """``_CUTS`` of these rows. For fewer graphs a batch is all greedy, or said to be partly so."""
    return tuple(name == "any_greedy" or bool(getattr(sampling, name)) for name in _CUTS)
