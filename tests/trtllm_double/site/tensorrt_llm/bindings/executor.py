"""The executor: requests in, streamed responses out. The torch runtime computes the tokens from the rank files.

As in the real one: the end id is left out of the output, stop words stay in; a response carries the tokens since the
last one; a cancelled request answers once more, with nothing, as its final result; ``decoding_iter`` counts a request's
steps.
"""

import shutil
import tempfile
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

from tensorrt_llm._strict import Strict

ModelType = Enum("ModelType", ["DECODER_ONLY", "ENCODER_ONLY", "ENCODER_DECODER"])
CommunicationMode = Enum("CommunicationMode", ["LEADER", "ORCHESTRATOR"])
FinishReason = Enum(
    "FinishReason", ["NOT_FINISHED", "END_ID", "STOP_WORDS", "LENGTH", "TIMED_OUT", "CANCELLED"], start=0
)
_number = (float, int, None)


class SamplingConfig(Strict):
    beam_width: int = 1
    top_k: (int, None) = None
    top_p: _number = None
    seed: (int, None) = None
    temperature: _number = None
    min_p: _number = None

    def __init__(self, **given):
        super().__init__(**given)
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise OverflowError("seed: 64 bits")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RuntimeError("Assertion failed: top_p")
        if self.temperature is not None and not self.temperature > 0:
            raise RuntimeError("Assertion failed: temperature")
        if self.top_k is not None and self.top_k < 0:
            raise RuntimeError("Assertion failed: top_k")
        if self.top_k is not None and self.top_k > 1024:
            raise RuntimeError("top_k would be clipped to 1024, the sampling kernel's largest")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise RuntimeError("Assertion failed: min_p")

    @property
    def greedy(self):
        return self.top_k == 1 or (not self.top_k and self.top_p is None)


class OutputConfig(Strict):
    return_log_probs: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = False


class Request(Strict):
    input_token_ids: list
    max_tokens: int
    streaming: bool = False
    sampling_config: SamplingConfig = SamplingConfig()
    output_config: OutputConfig = OutputConfig()
    end_id: (int, None) = None
    pad_id: (int, None) = None
    stop_words: (list, None) = None
    client_id: (int, None) = None
    return_all_generated_tokens: bool = False

    def __init__(self, **given):
        super().__init__(**given)
        if not self.input_token_ids or not all(type(token) is int for token in self.input_token_ids):
            raise TypeError("input_token_ids: a list of ints")
        if self.max_tokens < 1:
            raise RuntimeError("Assertion failed: max_tokens")
        for word in self.stop_words or []:
            if not word or not all(type(token) is int for token in word):
                raise TypeError("stop_words: a list of lists of ints")


class KvCacheConfig(Strict):
    enable_block_reuse: bool = True
    max_tokens: (int, None) = None
    free_gpu_memory_fraction: _number = None
    host_cache_size: (int, None) = None


class OrchestratorConfig(Strict):
    is_orchestrator: bool = True
    worker_executable_path: str = ""
    spawn_processes: bool = True


class ParallelConfig(Strict):
    communication_mode: CommunicationMode = CommunicationMode.LEADER
    device_ids: (list, None) = None
    participant_ids: (list, None) = None
    orchestrator_config: (OrchestratorConfig, None) = None


class DecodingMode:
    def __init__(self, name):
        self.name = name

    @staticmethod
    def ExplicitDraftTokens():
        return DecodingMode("ExplicitDraftTokens")


class DecodingConfig(Strict):
    decoding_mode: (DecodingMode, None) = None


class ExecutorConfig(Strict):
    max_beam_width: int = 1
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    enable_chunked_context: bool = False
    iter_stats_max_iterations: int = 1000
    max_batch_size: (int, None) = None
    max_num_tokens: (int, None) = None
    parallel_config: (ParallelConfig, None) = None
    decoding_config: (DecodingConfig, None) = None


class _Result(SimpleNamespace):
    pass


class _Response:
    def __init__(self, request_id, result=None, error_msg=None):
        self.request_id, self._result, self._error = request_id, result, error_msg

    def has_error(self):
        return self._error is not None

    @property
    def error_msg(self):
        if self._error is None:
            raise RuntimeError("no error")
        return self._error

    @property
    def result(self):
        if self._error is not None:
            raise RuntimeError(self._error)
        return self._result


OPENED = []
"""Every executor of this process, for tests to look at."""


class Executor:
    def __init__(self, model_path, model_type, executor_config):
        if not isinstance(model_path, Path) or model_type is not ModelType.DECODER_ONLY:
            raise TypeError("Executor(model_path: Path, model_type: ModelType, executor_config: ExecutorConfig)")
        from tensorrt_llm.bindings._torch import open_engine_dir

        self.config = executor_config
        OPENED.append(self)
        self._scratch = Path(tempfile.mkdtemp())
        self.engine_config, self._engine = open_engine_dir(model_path, self._scratch, executor_config.max_batch_size)
        self._check_parallel(executor_config.parallel_config)
        self._requests, self._iterations, self._said = {}, {}, []
        self._next, self._stats, self.enqueued = 1, [], []

    def _check_parallel(self, parallel):
        ranks = self.engine_config["pretrained_config"]["mapping"]["tp_size"]
        if (ranks > 1) != (parallel is not None):
            raise RuntimeError(f"{ranks} ranks need a parallel config, one rank needs none")
        if parallel is not None and parallel.communication_mode is CommunicationMode.ORCHESTRATOR:
            program = parallel.orchestrator_config.worker_executable_path
            if not Path(program).is_file() or len(parallel.device_ids) != ranks:
                raise RuntimeError("the orchestrator needs a worker program and one device per rank")

    def can_enqueue_requests(self):
        return True

    def enqueue_request(self, request):
        from trtkit.runtime import api

        build = self.engine_config["build_config"]
        longest = build["max_seq_len"] - build["max_draft_len"]
        if len(request.input_token_ids) + request.max_tokens > longest:
            raise RuntimeError("prompt length + max_tokens exceeds max_seq_len")
        if len(request.input_token_ids) > build["max_num_tokens"] and not self.config.enable_chunked_context:
            raise RuntimeError("prompt length exceeds maximum input length")
        vocab = self.engine_config["pretrained_config"]["vocab_size"]
        if request.end_id is not None and not -1 <= request.end_id < vocab:
            raise RuntimeError("the end id lies outside the vocabulary")
        drafted = bool(build["max_draft_len"])
        sampling = request.sampling_config
        if drafted and (sampling.top_k or sampling.top_p or sampling.min_p):
            raise RuntimeError("the ReDrafter engine would ignore top_k, top_p and min_p")
        greedy = self.engine_config["pretrained_config"].get("redrafter_greedy_search") if drafted else sampling.greedy
        stops = [word[0] for word in request.stop_words or []]
        number, self._next = self._next, self._next + 1
        cold = greedy or (sampling.temperature or 1.0) <= 0.01
        self._engine.submit(
            api.Request(
                id=str(number), prompt=tuple(request.input_token_ids), max_tokens=request.max_tokens,
                sampling=api.SamplingParams(temperature=0.0 if cold else sampling.temperature or 1.0,
                                            top_p=1.0 if sampling.top_p is None else sampling.top_p),
                stop_ids=(*stops, *(() if request.end_id is None else (request.end_id,))), seed=sampling.seed or 0,
            )
        )  # fmt: skip
        self._requests[number] = request
        self._iterations[number] = 0
        self.enqueued.append(request)
        return number

    def await_responses(self, timeout=None):
        if timeout is not None and not isinstance(timeout, timedelta):
            raise TypeError("timeout: a timedelta")
        said, self._said = self._said, []
        if said:
            return said
        before = self._engine.stats()
        outputs = self._engine.step()
        after = self._engine.stats()
        flight = SimpleNamespace(num_ctx_tokens=after.prefill_tokens - before.prefill_tokens)
        cache = SimpleNamespace(max_num_blocks=after.kv_blocks, free_num_blocks=after.kv_blocks_free)
        self._stats.append(SimpleNamespace(inflight_batching_stats=flight, kv_cache_stats=cache))
        return [self._response(output) for output in outputs if int(output.request_id) in self._requests]

    def _response(self, output):
        number = int(output.request_id)
        request, tokens = self._requests[number], list(output.tokens)
        self._iterations[number] += 1
        reason = FinishReason.NOT_FINISHED
        if output.finish is not None:
            del self._requests[number]
            reason = {"length": FinishReason.LENGTH, "cancelled": FinishReason.CANCELLED}.get(output.finish.value)
            if reason is None:
                ended = tokens[-1] == request.end_id
                reason = FinishReason.END_ID if ended else FinishReason.STOP_WORDS
                tokens = tokens[:-1] if ended else tokens
        result = _Result(
            is_final=output.finish is not None, is_sequence_final=output.finish is not None, sequence_index=0,
            output_token_ids=[tokens], finish_reasons=[reason], decoding_iter=self._iterations[number],
        )  # fmt: skip
        return _Response(number, result)

    def cancel_request(self, id):
        if id in self._requests:
            self._engine.cancel(str(id))

    def fail(self, id, message):
        """For tests: let a request fail inside the executor."""
        self._engine.cancel(str(id))
        del self._requests[id]
        self._said.append(_Response(id, error_msg=message))

    def get_latest_iteration_stats(self):
        stats, self._stats = self._stats, []
        return stats

    def shutdown(self):
        self._engine.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
