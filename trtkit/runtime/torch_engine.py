"""The embedded runtime: an ``Engine`` in PyTorch, on CPU or CUDA.

One ``step`` is: schedule, prefill what is new, draft, verify, accept. See ``prefill.py`` and ``decode.py`` for the
phases, ``scheduler.py`` for who runs. With a drafter the tokens are the same, only sooner.

With ``overlap``, the device computes a step while the host reads and books the one before. ``step`` launches the next
decode step first, on the tokens and lengths that the one in flight leaves on the device, then waits for the one in
flight and returns its outputs. It launches ahead only for the very same rows, and only where no row can reach its
length limit in the step in flight: so no launch goes beyond the positions and blocks that a row may ever use.

A row that ends otherwise (stop id, cancel, pause) has one superfluous launch, whose output is discarded. Its blocks may
be free while that launch still writes into them, but nobody gets them before it is done. Blocks change hands in
``Scheduler.schedule``, which is called with nothing in flight, the host having waited for the device; and in
``look_ahead``, which is called only while every row in flight is running, hence after the last launch of any row that
has ended was read. What a superfluous launch wrote lies in free blocks, or beyond the cached length of a row that
rests: nobody reads it before it is overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from drafter.config import TreeShape
from trtkit.closing import Closing
from trtkit.errors import CapacityError, RequestError
from trtkit.log import logger
from trtkit.runtime import decode
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput
from trtkit.runtime.blocks import BlockAllocator
from trtkit.runtime.counters import Counters
from trtkit.runtime.cuda.graphs import Launched, StepGraphs
from trtkit.runtime.draft_head import prepare_head
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.lookup import GUESS, Lookup
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.prefill import PART_TOKENS, Stretch, prefill
from trtkit.runtime.processors import switch_rows
from trtkit.runtime.sampling import SamplingRows, sampling_rows
from trtkit.runtime.scheduler import Row, Schedule, Scheduler
from trtkit.runtime.thread_choice import ThreadChooser
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.runtime.tree_choice import TreeChooser
from trtkit.runtime.tree_memory import recall, remember

__all__ = ["TorchEngine"]


class TorchEngine(Closing):
    """Runs requests in one in-flight batch.

    ``model`` must know positions up to ``limits.total_tokens`` plus the length of a draft.
    """

    def __init__(
        self, model: DecoderModel, limits: TorchLimits, drafting: Drafting | None = None,
        threads: ThreadChooser | None = None,
    ) -> None:  # fmt: skip
        """``threads`` chooses how many CPU threads a step takes; None leaves the process's number as it is. The ranks
        that share ``model`` make the same calls."""
        self._model = model
        self._threads = threads
        self._limits = limits
        self._drafting = drafting
        self._chooser = TreeChooser((None,)) if drafting is None else TreeChooser(drafting.trees, drafting.kind)
        self._memory = None if drafting is None or len(drafting.trees) == 1 else drafting.memory
        for kind, shares in drafting.first_shares().items() if drafting is not None else ():
            self._chooser.expect(kind, shares)
        if self._memory is not None:
            recall(self._memory, self._chooser)
        self._nodes = self._chooser.max_nodes
        cache = KvCache(
            model.spec, blocks=limits.kv_blocks, block_size=limits.block_size, max_rows=limits.rows,
            max_tokens=limits.total_tokens + self._nodes, kv_dtype=limits.kv_dtype, dtype=model.dtype,
            device=model.device, scales=model.kv_scales,
        )  # fmt: skip
        self._stepper = decode.Stepper(
            model=model, cache=cache, head=None if drafting is None else drafting.head,
            contexts=torch.zeros(limits.rows + 1, model.spec.hidden, dtype=model.dtype, device=model.device),
        )  # fmt: skip
        fixed = model.device.type == "cuda" if limits.fixed_shapes is None else limits.fixed_shapes
        self._lookup = Lookup() if drafting is not None and drafting.lookup else None
        self._graphs = self._fixed_steps() if fixed else None
        # What is looked up begins with what the step before has emitted.
        overlap = model.device.type == "cuda" if limits.overlap is None else limits.overlap
        self._overlap = overlap and self._lookup is None
        self._flight: Launched | None = None
        self._booked = 0.0
        self._allocator = BlockAllocator(limits.kv_blocks)
        self._scheduler = Scheduler(
            self._allocator, block_size=limits.block_size, max_rows=limits.rows,
            part=PART_TOKENS[model.device.type], prefix_cache=limits.prefix_cache,
        )  # fmt: skip
        self._cancelled: list[str] = []
        self._sampling: tuple[tuple[Request, ...], SamplingRows] | None = None
        self._counters = Counters(max_length=self._chooser.max_length)
        self._phase = self._counters.phase

    def _fixed_steps(self) -> StepGraphs:
        return StepGraphs(
            self._stepper, max_rows=self._limits.rows, max_path=1 + self._chooser.max_length,
            max_drafts=0 if self._lookup is None else self._nodes - 1, prepare=self._tune,
        )  # fmt: skip

    def _tune(self, rows: int, shape: TreeShape | None) -> None:
        """Let the kernels measure themselves for a step of ``rows`` rows."""
        self._model.prepare(rows * (1 if shape is None else shape.max_nodes))
        drafting = self._drafting
        if drafting is not None and drafting.head is not None and shape is not None:
            prepare_head(drafting.head, rows * max(1, shape.beams - drafting.looked_up(shape)))

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""
        return self._limits.total_tokens

    @property
    def max_rows(self) -> int:
        """Most requests that run at once."""
        return self._limits.rows

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not been reported as finished; resting ones do not count."""
        return self._scheduler.has_work or bool(self._cancelled)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises :class:`RequestError` when it can never run."""
        self._check(request)
        self._scheduler.submit(request)
        self._counters.prompt_tokens += len(request.prompt)

    def _check(self, request: Request) -> None:
        wrong: list[str] = []
        longest = self._limits.total_tokens
        if request.id in self._scheduler:
            wrong.append("the id is in use by an unfinished request")
        if not request.prompt:
            wrong.append("the prompt is empty")
        outside = (token for token in request.prompt if not self._known(token))
        wrong += [f"token id {token} lies outside the vocabulary of {self._model.spec.vocab}" for token in outside][:1]
        if request.sampling.switch and not all(map(self._known, request.sampling.switch.tokens)):
            wrong.append(f"a switch token lies outside the vocabulary of {self._model.spec.vocab}")
        if request.max_tokens < 1:
            wrong.append(f"max_tokens {request.max_tokens}: must be at least 1")
        if len(request.prompt) >= longest:
            wrong.append(f"the prompt has {len(request.prompt)} tokens, the engine takes {longest} with the answer")
        elif self._scheduler.blocks_needed(self._total(request) + self._nodes) > self._limits.kv_blocks:
            slots = self._limits.kv_blocks * self._limits.block_size
            wrong.append(f"{self._total(request)} tokens do not fit into a KV cache of {slots}")
        if wrong:
            raise RequestError("the request cannot run", where=f"request {request.id}", offenders=wrong)

    def _total(self, request: Request) -> int:
        return min(len(request.prompt) + request.max_tokens, self._limits.total_tokens)

    def cancel(self, request_id: str) -> None:
        """End a request now; the next ``step`` reports it as CANCELLED. Unknown or finished ids are ignored."""
        if request_id in self._scheduler:
            row = self._scheduler.resting(request_id)
            self._scheduler.finish(request_id)
            if row is None or not row.ended:
                self._cancelled.append(request_id)

    def pause(self, request_id: str) -> None:
        """Take a held request out of the batch; see :class:`trtkit.runtime.api.Engine`."""
        if not self._scheduler.can_rest(request_id):
            raise RequestError("only a held request that waits or runs can be paused", where=f"request {request_id}")
        self._scheduler.rest(request_id)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Let a resting request go on; see :class:`trtkit.runtime.api.Engine`."""
        row = self._scheduler.resting(request_id)
        if row is None:
            raise RequestError("only a resting request can be extended", where=f"request {request_id}")
        length = len(row.tokens) - drop + len(tokens)
        limit = min(length + max_tokens, self._limits.total_tokens)
        wrong = [f"token id {token} is not in the vocabulary" for token in tokens if not self._known(token)][:1]
        if not 0 <= drop <= row.generated:
            wrong.append(f"drop {drop}: {row.generated} tokens were generated")
        if max_tokens < 1:
            wrong.append(f"max_tokens {max_tokens}: must be at least 1")
        if length >= self._limits.total_tokens:
            wrong.append(f"{length} tokens, the engine takes {self._limits.total_tokens} with the answer")
        elif self._scheduler.blocks_needed(limit + self._nodes) > self._limits.kv_blocks:
            wrong.append(f"{limit} tokens do not fit into the KV cache")
        if wrong:
            raise RequestError("the request cannot be extended", where=f"request {request_id}", offenders=wrong)
        if drop and self._lookup is not None:
            self._lookup.rewritten(row)
        self._scheduler.resume(request_id, tokens, drop=drop, limit=limit)

    def _known(self, token: int) -> bool:
        return 0 <= token < self._model.spec.vocab

    @torch.inference_mode()
    def step(self) -> Sequence[StepOutput]:
        """One decode step over all running rows, after admitting waiting ones. These join one step later where a step
        is in flight."""
        outputs = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._cancelled]
        self._cancelled.clear()
        if not self._scheduler.has_work:
            return outputs
        if self._flight is not None and not any(map(_runs, self._flight.rows)):
            self._discard_flight()
        if self._flight is not None:
            return outputs + self._collect(self._flight)
        if self._threads is not None and torch.get_num_threads() != self._threads.threads:
            torch.set_num_threads(self._threads.threads)
        rows = self._schedule()
        began = time.perf_counter()
        shape, drafts = self._look_up(rows)
        if self._graphs is None or any(row.request.sampling.switch is not None for row in rows):
            return outputs + self._book(rows, shape, began, *self._emit(rows, shape, drafts))
        recorded = self._graphs.recorded
        with self._phase("verify"):
            launched = self._graphs.launch(rows, shape, drafts, began=began)
        return outputs + self._collect(launched, timed=self._graphs.recorded == recorded)

    def _look_up(self, rows: Sequence[Row]) -> tuple[TreeShape | None, npt.NDArray[np.int64] | None]:
        """The tree of the next step, and those of its beams that are looked up (R, beams, length); none for plain
        decoding, where nothing was found of a tree that is looked up altogether."""
        if self._lookup is None or self._drafting is None:
            return self._choose(len(rows)), None
        if len(self._chooser.options) > 1:
            with self._phase("draft"):
                right = self._lookup.check(rows)
            self._chooser.learn(self._drafting.kind(GUESS), right, GUESS.length)
        shape = self._choose(len(rows))
        beams = 0 if shape is None else self._drafting.looked_up(shape)
        if shape is None or not beams:
            return shape, None
        with self._phase("draft"):
            found = self._lookup.draft(rows, TreeShape(beams=beams, length=shape.length))
        return (None if found is None and beams == shape.beams else shape), found

    def _choose(self, rows: int) -> TreeShape | None:
        """The draft tree of the next step, by what the first rank has measured."""
        choice, options, ranks = self._chooser.choose(rows), self._chooser.options, self._model.ranks
        return choice if ranks is None or len(options) == 1 else options[ranks.agree(options.index(choice))]

    def _schedule(self) -> Sequence[Row]:
        """The rows of the next step, their prompts prefilled."""
        assert self._flight is None, "blocks change hands while nothing is in flight"
        plan = self._scheduler.schedule(nodes=self._nodes)
        if not plan.rows:
            raise CapacityError("no row fits into the KV cache", hint="open the engine with a larger KV budget")
        self._counters.preemptions += plan.preempted
        with self._phase("prefill"):
            self._prefill(plan)
        return plan.rows

    def _collect(self, launched: Launched, *, timed: bool = True) -> list[StepOutput]:
        """The outputs of a step in flight, after the next one has been launched where that can be."""
        assert self._graphs is not None
        recorded = self._graphs.recorded
        with self._phase("verify"):  # one launch: its parts have no time of their own
            ahead = self._launch_ahead(self._graphs, launched)
            lines, scores = self._graphs.collect(launched)
            self._flight = ahead
        timed = timed and self._graphs.recorded == recorded
        return self._book(launched.rows, launched.key.shape, launched.began, lines, scores, timed=timed)

    def _launch_ahead(self, graphs: StepGraphs, earlier: Launched) -> Launched | None:
        """The step after ``earlier``, launched before ``earlier`` is read. None where the host must see it first: the
        batch changes, a row may reach its limit, or blocks are short."""
        if not (self._overlap and all(map(_runs, earlier.rows))):
            return None
        if any(len(row.tokens) + earlier.key.path >= self._end(row) for row in earlier.rows):
            return None
        reach = earlier.key.path + self._nodes
        if not (graphs.covers(earlier, reach) and self._scheduler.look_ahead(reach, self._nodes)):
            return None
        return graphs.follow(earlier, self._choose(len(earlier.rows)))

    def _discard_flight(self) -> None:
        """Wait for the launch in flight and forget it. Rows that still run lose nothing: the same is drawn again."""
        if self._flight is not None and self._graphs is not None:
            self._graphs.collect(self._flight)
            self._counters.discarded_row_steps += len(self._flight.rows)
            self._flight = None

    def _book(
        self, rows: Sequence[Row], shape: TreeShape | None, began: float, lines: Sequence[Sequence[int]],
        scores: Sequence[Sequence[float]], *, timed: bool = True,
    ) -> list[StepOutput]:  # fmt: skip
        """The outputs of a step that was launched at ``began``, for the rows that still run; counters, and what the
        step took, if it was ``timed`` without disturbance."""
        live = [(row, line, score) for row, line, score in zip(rows, lines, scores, strict=True) if _runs(row)]
        with self._phase("accept"):
            outputs = [self._advance(row, tokens[:length], score) for row, (length, *tokens), score in live]
        depths = range(1, 1 + (shape.length if shape else 0))
        accepted = [sum(length > depth for _, (length, *_), _ in live) for depth in depths]
        now = time.perf_counter()
        if timed and len(live) == len(rows):
            # Launched ahead, it began when the one before it was done.
            self._learn(len(rows), shape, now - max(began, self._booked), accepted)
        self._booked = now
        self._counters.step(len(live), accepted, drafted=shape is not None)
        self._counters.discarded_row_steps += len(rows) - len(live)
        return outputs

    def _learn(self, rows: int, shape: TreeShape | None, seconds: float, accepted: Sequence[int]) -> None:
        threads = self._threads
        if threads is None or not threads.looks:
            self._chooser.observe(rows, shape, seconds=seconds, accepted=accepted)
        if threads is not None:
            before = threads.count
            threads.observe(rows, shape, seconds)
            if threads.count != before:
                logger.debug("steps are faster with %d threads than with %d", threads.count, before)

    def _emit(
        self, rows: Sequence[Row], shape: TreeShape | None, drafts: npt.NDArray[np.int64] | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Draft, verify, accept, one after the other. For each row the number of emitted tokens and the tokens drawn on
        its path; their log-probabilities where a row asks for them."""
        at = decode.pending(self._stepper.cache, rows, 1 if shape is None else shape.max_nodes, drafts)
        switch = switch_rows(rows, self._model.device)
        sampling = self._sampling_of(rows)
        path, verified = decode.decode_step(self._stepper, at, shape, sampling, switch=switch, phase=self._phase)
        with self._phase("accept"):
            lines: list[list[int]] = decode.emitted(path).tolist()
            scores: list[list[float]] = [[]] * len(rows)
            if any(row.request.logprobs for row in rows):
                scores = decode.log_probabilities(verified.logits, path).tolist()
        return lines, scores

    def _prefill(self, plan: Schedule) -> None:
        fresh = [Stretch(tokens=part.tokens, cached=part.start, blocks=part.blocks) for part in plan.prefills]
        prefill(self._model, self._stepper.cache, fresh)
        self._stepper.cache.copy_blocks(plan.copies)
        again = [
            Stretch(tokens=row.tokens[row.cached : -1], cached=row.cached, blocks=row.blocks) for row in plan.recomputes
        ]
        prefill(self._model, self._stepper.cache, again)
        for row in plan.recomputes:
            row.cached = len(row.tokens) - 1
        self._counters.prefill_tokens += sum(len(stretch.tokens) for stretch in (*fresh, *again))

    def _sampling_of(self, rows: Sequence[Row]) -> SamplingRows:
        requests = tuple(row.request for row in rows)
        if self._sampling is None or self._sampling[0] != requests:
            params, seeds = [request.sampling for request in requests], [request.seed for request in requests]
            self._sampling = (requests, sampling_rows(params, seeds, self._model.device))
        return self._sampling[1]

    def _advance(self, row: Row, emitted: Sequence[int], scores: Sequence[float]) -> StepOutput:
        """Append what was accepted, up to a stop id or the budget: what follows those inside the run is dropped."""
        finish = None
        kept = 0
        for token in emitted:
            row.tokens.append(token)
            kept += 1
            if token in row.request.stop_ids:
                finish = FinishReason.STOP
            elif len(row.tokens) >= self._end(row):
                finish = FinishReason.LENGTH
            if finish is not None:
                break
        row.cached = len(row.tokens) - 1
        self._counters.new_tokens += kept
        if finish is not None and row.request.hold:
            self._scheduler.rest(row.request.id)
            row.ended = True
        elif finish is not None:
            self._scheduler.finish(row.request.id)
        logprobs = tuple(scores[:kept]) if row.request.logprobs else ()
        return StepOutput(request_id=row.request.id, tokens=tuple(emitted[:kept]), finish=finish, logprobs=logprobs)

    def _end(self, row: Row) -> int:
        """Length at which a row ends."""
        return min(row.limit, self._limits.total_tokens)

    def stats(self) -> EngineStats:
        """Counters so far."""
        return self._counters.stats(self._allocator)

    def close(self) -> None:
        """Free the cache and the weights."""
        if self._memory is not None:
            remember(self._memory, self._chooser)
            self._memory = None
        if self._threads is not None:
            torch.set_num_threads(self._threads.counts[-1])
        try:
            self._discard_flight()
        finally:
            if self._graphs is not None:
                self._graphs.close()
        del self._graphs, self._stepper, self._model, self._drafting
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _runs(row: Row) -> bool:
    """Whether the row is in the batch. A row that left it comes back with the next schedule at the earliest."""
    return row.slot >= 0
