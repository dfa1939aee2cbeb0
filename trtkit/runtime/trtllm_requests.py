"""The requests of a TensorRT-LLM engine: the ``Engine`` protocol in terms of its executor's requests and responses.

Requests stream: every response brings the tokens since the last one. A resting request (held or paused) is nothing but
its tokens here; to go on it becomes a new executor request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from trtkit.closing import Closing
from trtkit.errors import EngineError, RequestError
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput
from trtkit.runtime.trtllm_facts import CompiledFacts
from trtkit.runtime.trtllm_sampling import check_sampling, executor_sampling, notices

__all__ = ["TrtllmEngine"]

_PATIENCE = timedelta(milliseconds=100)
"""Longest wait of one step, so that Ctrl-C and clocks are heard."""
_STATS_EVERY = 256
"""Steps between two collections of the executor's statistics, of which it keeps the last thousand."""
_SEED_STRIDE = 0x9E3779B97F4A7C15
_FINISH = {
    "END_ID": FinishReason.STOP,
    "STOP_WORDS": FinishReason.STOP,
    "LENGTH": FinishReason.LENGTH,
    "TIMED_OUT": FinishReason.LENGTH,
}


@dataclass(slots=True)
class _Row:
    request: Request
    eos: int | None
    """The id that the executor leaves out of the output when it stops there."""
    prompt: list[int]
    """What the current executor request began with."""
    generated: list[int] = field(default_factory=list)
    """Tokens since ``prompt``, as reported."""
    executor_id: int | None = None
    """None while the row rests."""
    limit: int = 0
    """Most tokens that the current executor request may make."""
    iterations: int = 0
    extensions: int = 0


class TrtllmEngine(Closing):
    """Runs requests on one executor. Made by ``trtllm_engine.open_compiled``.

    ``bindings`` is the module ``tensorrt_llm.bindings.executor``, ``eos_ids`` what ends a turn of the model.
    """

    def __init__(self, bindings: Any, executor: Any, facts: CompiledFacts, eos_ids: Collection[int]) -> None:
        self._trt = bindings
        self._executor = executor
        self._facts = facts
        self._eos_ids = frozenset(eos_ids)
        self._rows: dict[str, _Row] = {}
        self._by_executor: dict[int, str] = {}
        self._cancelled: list[str] = []
        self._steps = self._prompt_tokens = self._new_tokens = self._row_steps = 0
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
    def notices(self) -> tuple[str, ...]:
        """What a user should know before a run."""
        return notices(self._facts.kind)

    @property
    def has_work(self) -> bool:
        """True while a submitted request has not been reported as finished; resting ones do not count."""
        return bool(self._by_executor) or bool(self._cancelled)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises :class:`RequestError`, or :class:`UsageError` for sampling that it cannot do."""
        check_sampling(request.sampling, self._facts.kind, logprobs=request.logprobs)
        wrong = []
        if request.id in self._rows:
            wrong.append("the id is in use by an unfinished request")
        if request.max_tokens < 1:
            wrong.append(f"max_tokens {request.max_tokens}: must be at least 1")
        self._check_prompt(request.id, request.prompt, wrong)
        eos = next((token for token in request.stop_ids if token in self._eos_ids), None)
        row = _Row(request=request, eos=eos, prompt=list(request.prompt))
        self._rows[request.id] = row
        self._enqueue(row, request.max_tokens)

    def _check_prompt(self, name: str, prompt: Sequence[int], wrong: list[str]) -> None:
        vocab, longest = self._facts.vocab, self.max_total_tokens
        if not prompt:
            wrong.append("the prompt is empty")
        outside = [token for token in prompt if not 0 <= token < vocab]
        if outside:
            wrong.append(f"token id {outside[0]} lies outside the vocabulary of {vocab}")
        if len(prompt) >= longest:
            wrong.append(f"the prompt has {len(prompt)} tokens, the engine takes {longest} with the answer")
        if wrong:
            raise RequestError("the request cannot run", where=f"request {name}", offenders=wrong)

    def _enqueue(self, row: _Row, max_tokens: int) -> None:
        trt, request = self._trt, row.request
        stop_words = [[token] for token in request.stop_ids if token != row.eos]
        # Another stream of random numbers for every part: the executor's starts anew with each of its requests.
        seed = request.seed + row.extensions * _SEED_STRIDE
        row.limit = min(max_tokens, self.max_total_tokens - len(row.prompt))
        row.executor_id = self._executor.enqueue_request(
            trt.Request(
                input_token_ids=row.prompt,
                max_tokens=row.limit,
                streaming=True,
                sampling_config=trt.SamplingConfig(**executor_sampling(request.sampling, seed, self._facts.kind)),
                output_config=trt.OutputConfig(exclude_input_from_output=True),
                end_id=row.eos,
                stop_words=stop_words or None,
            )
        )
        row.iterations = 0
        self._by_executor[row.executor_id] = request.id
        self._prompt_tokens += len(row.prompt)

    def step(self) -> Sequence[StepOutput]:
        """Wait for new tokens, a tenth of a second at most, and return all that are there."""
        outputs = [StepOutput(request_id=name, tokens=(), finish=FinishReason.CANCELLED) for name in self._cancelled]
        self._cancelled.clear()
        if not self._by_executor:
            return outputs
        self._peak_rows = max(self._peak_rows, min(len(self._by_executor), self._facts.rows))
        for response in self._executor.await_responses(timeout=timedelta(0) if outputs else _PATIENCE):
            output = self._receive(response)
            if output is not None:
                outputs.append(output)
        self._steps += 1
        if self._steps % _STATS_EVERY == 0:
            self._collect()
        return outputs

    def _receive(self, response: Any) -> StepOutput | None:
        name = self._by_executor.get(response.request_id)
        if name is None:  # the last words of a request that was cancelled, paused or has ended
            return None
        if response.has_error():
            self._forget(name)
            raise EngineError(f"TensorRT-LLM gave up on request {name}: {response.error_msg}")
        result, row = response.result, self._rows[name]
        tokens = list(result.output_token_ids[0]) if result.output_token_ids else []
        finish = _finish_of(result) if result.is_final else None
        stops = row.request.stop_ids
        at = next((index for index, token in enumerate(tokens) if token in stops), None)
        if at is not None:
            tokens = tokens[: at + 1]
            finish = FinishReason.STOP
            if not result.is_final:
                self._executor.cancel_request(response.request_id)
        elif finish is FinishReason.STOP:
            # The end id is left out of the output. A draft tree's step may also reach past the limit and stop there:
            # the executor cuts the tokens (``lengthCriterion`` in stopCriteriaKernels.cu), and still names the stop.
            if row.eos is not None and len(row.generated) + len(tokens) < row.limit and _ended_by_id(result):
                tokens.append(row.eos)
            else:
                finish = FinishReason.LENGTH
        row.generated += tokens
        self._new_tokens += len(tokens)
        self._row_steps += max(0, result.decoding_iter - row.iterations)
        row.iterations = max(row.iterations, result.decoding_iter)
        if finish is not None:
            self._end(name)
        if finish is None and not tokens:
            return None
        return StepOutput(request_id=name, tokens=tuple(tokens), finish=finish)

    def _end(self, name: str) -> None:
        row = self._rows[name]
        self._rest(row)
        if not row.request.hold:
            del self._rows[name]

    def _rest(self, row: _Row) -> None:
        if row.executor_id is not None:
            self._by_executor.pop(row.executor_id, None)
            row.executor_id = None

    def _forget(self, name: str) -> None:
        self._rest(self._rows[name])
        del self._rows[name]

    def cancel(self, request_id: str) -> None:
        """End a request now; the next ``step`` reports it as CANCELLED. A resting one is let go of in silence."""
        row = self._rows.get(request_id)
        if row is None:
            return
        if row.executor_id is not None:
            self._executor.cancel_request(row.executor_id)
            self._cancelled.append(request_id)
        self._forget(request_id)

    def pause(self, request_id: str) -> None:
        """Take a held request out of the batch. Tokens that the executor has made but not reported are lost."""
        row = self._rows.get(request_id)
        if row is None or row.executor_id is None or not row.request.hold:
            raise RequestError("only a held request that waits or runs can be paused", where=f"request {request_id}")
        self._executor.cancel_request(row.executor_id)
        self._rest(row)

    def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
        """Let a resting request go on, as a new executor request whose prompt is everything so far.

        Block reuse makes that cheap. Unlike in the torch runtime the draws that follow are fresh ones.
        """
        row = self._rows.get(request_id)
        wrong = []
        if row is None or row.executor_id is not None:
            raise RequestError("only a resting request can be extended", where=f"request {request_id}")
        if max_tokens < 1:
            wrong.append(f"max_tokens {max_tokens}: must be at least 1")
        if not 0 <= drop <= len(row.generated):
            wrong.append(f"drop {drop}: {len(row.generated)} tokens were generated")
            drop = 0
        prompt = [*row.prompt, *row.generated[: len(row.generated) - drop], *tokens]
        self._check_prompt(request_id, prompt, wrong)
        row.prompt, row.generated = prompt, []
        row.extensions += 1
        self._enqueue(row, max_tokens)

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
