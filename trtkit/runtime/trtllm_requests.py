"""The requests of a TensorRT-LLM engine: the ``Engine`` protocol in terms of its executor's requests and responses.

Requests stream: every response brings the tokens since the last one. How a request rests and goes on is in
``restarting.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

from trtkit.errors import EngineError
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput
from trtkit.runtime.restarting import RestartingEngine, Started, joined
from trtkit.runtime.trtllm_facts import CompiledFacts
from trtkit.runtime.trtllm_sampling import check_sampling, executor_sampling, notices

__all__ = ["TrtllmEngine"]

_PATIENCE = timedelta(milliseconds=100)
"""Longest wait of one step, so that Ctrl-C and clocks are heard."""
_STATS_EVERY = 256
"""Steps between two collections of the executor's statistics, of which it keeps the last thousand."""
_FINISH = {
    "END_ID": FinishReason.STOP,
    "STOP_WORDS": FinishReason.STOP,
    "LENGTH": FinishReason.LENGTH,
    "TIMED_OUT": FinishReason.LENGTH,
}


class TrtllmEngine(RestartingEngine[int]):
    """Runs requests on one executor. Made by ``trtllm_engine.open_compiled``.

    ``bindings`` is the module ``tensorrt_llm.bindings.executor``, ``eos_ids`` what ends a turn of the model.
    """

    def __init__(self, bindings: Any, executor: Any, facts: CompiledFacts, eos_ids: Collection[int]) -> None:
        super().__init__()
        self._trt = bindings
        self._executor = executor
        self._facts = facts
        self._eos_ids = frozenset(eos_ids)
        self._steps = self._new_tokens = self._row_steps = 0
        self._context_tokens = self._peak_rows = self._kv_blocks = self._kv_blocks_free = 0

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""
        return self._facts.total_tokens

    @property
    def max_rows(self) -> int:
        """Most requests that run at once."""
        return self._facts.rows

    @property
    def _vocab(self) -> int:
        return self._facts.vocab

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know before a run."""
        return notices(self._facts.kind)

    def _check(self, request: Request) -> None:
        check_sampling(request.sampling, self._facts.kind, logprobs=request.logprobs)

    def _eos(self, request: Request) -> int | None:
        """The id that the executor leaves out of the output when it stops there."""
        return next((token for token in request.stop_ids if token in self._eos_ids), None)

    def _start(self, started: Started[int]) -> int:
        trt, request = self._trt, started.request
        eos = self._eos(request)
        stop_words = [[token] for token in request.stop_ids if token != eos]
        handle = self._executor.enqueue_request(
            trt.Request(
                input_token_ids=started.prompt,
                max_tokens=started.limit,
                streaming=True,
                sampling_config=trt.SamplingConfig(
                    **executor_sampling(request.sampling, started.seed, self._facts.kind)
                ),
                output_config=trt.OutputConfig(exclude_input_from_output=True),
                end_id=eos,
                stop_words=stop_words or None,
            )
        )
        return int(handle)

    def _stop(self, handle: int) -> None:
        self._executor.cancel_request(handle)

    def step(self) -> Sequence[StepOutput]:
        """Wait for new tokens, a tenth of a second at most, and return all that are there."""
        outputs = self._report_cancelled()
        if not self._by_handle:
            return outputs
        self._peak_rows = max(self._peak_rows, min(len(self._by_handle), self._facts.rows))
        responses = self._executor.await_responses(timeout=timedelta(0) if outputs else _PATIENCE)
        outputs += joined(map(self._receive, responses))
        self._steps += 1
        if self._steps % _STATS_EVERY == 0:
            self._collect()
        return outputs

    def _receive(self, response: Any) -> StepOutput | None:
        name = self._by_handle.get(response.request_id)
        if name is None:  # the last words of a request that was cancelled, paused or has ended
            return None
        if response.has_error():
            self._forget(name)
            raise EngineError(f"TensorRT-LLM gave up on request {name}: {response.error_msg}")
        result, started = response.result, self._requests[name]
        tokens = list(result.output_token_ids[0]) if result.output_token_ids else []
        finish = _finish_of(result) if result.is_final else None
        stops, eos = started.request.stop_ids, self._eos(started.request)
        at = next((index for index, token in enumerate(tokens) if token in stops), None)
        if at is not None:
            tokens = tokens[: at + 1]
            finish = FinishReason.STOP
            if not result.is_final:
                self._executor.cancel_request(response.request_id)
        elif finish is FinishReason.STOP:
            # The end id is left out of the output. A draft tree's step may also reach past the limit and stop there:
            # the executor cuts the tokens (``lengthCriterion`` in stopCriteriaKernels.cu), and still names the stop.
            if eos is not None and len(started.generated) + len(tokens) < started.limit and _ended_by_id(result):
                tokens.append(eos)
            else:
                finish = FinishReason.LENGTH
        self._new_tokens += len(tokens)
        self._row_steps += max(0, result.decoding_iter - started.iterations)
        started.iterations = max(started.iterations, result.decoding_iter)
        return self._report(started, tokens, finish)

    def _collect(self) -> None:
        for stats in self._executor.get_latest_iteration_stats():
            if stats.inflight_batching_stats is not None:
                self._context_tokens += stats.inflight_batching_stats.num_ctx_tokens
            if stats.kv_cache_stats is not None:
                self._kv_blocks = stats.kv_cache_stats.max_num_blocks
                self._kv_blocks_free = stats.kv_cache_stats.free_num_blocks

    def stats(self) -> EngineStats:
        """Counters so far. Phases and accepted depths are not reported by the executor."""
        self._collect()
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            prefill_tokens=self._context_tokens,
            new_tokens=self._new_tokens,
            row_steps=self._row_steps,
            peak_rows=self._peak_rows,
            kv_blocks=self._kv_blocks,
            kv_blocks_free=self._kv_blocks_free,
        )

    def close(self) -> None:
        """Stop the executor and its workers."""
        self._executor.shutdown()


def _finish_of(result: Any) -> FinishReason:
    """A request that we did not cancel and that ends without a reason was cancelled by the executor."""
    reasons = result.finish_reasons
    return _FINISH.get(reasons[0].name, FinishReason.CANCELLED) if reasons else FinishReason.CANCELLED


def _ended_by_id(result: Any) -> bool:
    return bool(result.finish_reasons) and result.finish_reasons[0].name == "END_ID"
