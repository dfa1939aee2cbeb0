"""Open a compiled TensorRT-LLM engine: its executor (``tensorrt_llm.bindings.executor``) as an ``Engine``.

The executor batches in flight by itself. Sampling follows TensorRT-LLM's rule, not ours: at temperature 0 the tokens
are the torch backend's, up to ties; otherwise the seeds of the two mean different samples.

Several GPUs: run alone, the process spawns one worker per GPU (orchestrator mode). Under MPI the first rank is the
leader, and every other rank runs this module::

    mpirun -n 1 trtkit solve problems.jsonl --engine DIR : -n 3 python -m trtkit.runtime.trtllm_engine DIR
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import EngineError, TrtkitError, UsageError
from trtkit.recipe import COMPILED_DIR, read_manifest
from trtkit.runtime.trtllm_facts import CompiledFacts, check_host, eos_ids, read_facts
from trtkit.runtime.trtllm_requests import TrtllmEngine

__all__ = ["ExecutorOptions", "main", "missing_executor_names", "open_compiled", "serve_rank"]


_METHODS = (
    "enqueue_request", "await_responses", "cancel_request", "get_latest_iteration_stats", "can_enqueue_requests",
    "shutdown",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorOptions:
    """What may differ from run to run."""

    rows: int | None = None
    """Largest in-flight batch; None takes what the engine was built for."""
    kv_memory_fraction: float = 0.9
    """Of the memory that is free once the weights are loaded."""
    block_reuse: bool | None = None
    """Share the KV blocks of equal prompt beginnings. None: where paged context FMHA allows it and no drafter is in the
    engine (the two together are unproven)."""


def open_compiled(directory: Path, options: ExecutorOptions) -> TrtllmEngine:
    """Open a compiled engine directory on this machine's GPUs.

    Raises :class:`EngineError` when the engine was compiled by another version or for another GPU, or when TensorRT-LLM
    cannot load it; :class:`MissingDependency` without the package.
    """
    manifest = read_manifest(directory)
    facts = read_facts(directory, manifest)
    check_host(directory, manifest)
    if options.rows is not None and options.rows > facts.rows:
        raise UsageError(f"a batch of {options.rows}: the engine was built for {facts.rows}")
    bindings, executor = _executor(directory, facts, options)
    if not executor.can_enqueue_requests():
        raise EngineError(
            "this is not the first MPI rank, and only that one may send requests",
            hint=f"mpirun -n 1 trtkit solve ... : -n {facts.tensor_parallel - 1} python -m "
            f"trtkit.runtime.trtllm_engine {directory}",
        )
    facts = dataclasses.replace(facts, rows=options.rows or facts.rows)
    return TrtllmEngine(bindings, executor, facts, eos_ids(directory))


def serve_rank(directory: Path, rows: int | None = None) -> None:
    """Be one of the ranks behind the leader until it shuts down. ``rows`` must be the leader's ``--batch``."""
    manifest = read_manifest(directory)
    facts = read_facts(directory, manifest)
    check_host(directory, manifest)
    _, executor = _executor(directory, facts, ExecutorOptions(rows=rows))
    executor.shutdown()


def _executor(directory: Path, facts: CompiledFacts, options: ExecutorOptions) -> tuple[Any, Any]:
    """The bindings and an executor on them."""
    from tensorrt_llm.bindings import executor as trt

    reuse = options.block_reuse
    if reuse is None:
        reuse = facts.paged_context and not facts.kind.redrafter
    mode = trt.DecodingMode.ExplicitDraftTokens() if facts.kind.redrafter else None
    config = trt.ExecutorConfig(
        max_beam_width=1,
        kv_cache_config=trt.KvCacheConfig(
            enable_block_reuse=reuse and facts.paged_context, free_gpu_memory_fraction=options.kv_memory_fraction
        ),
        enable_chunked_context=facts.paged_context and not facts.kind.redrafter,
        max_batch_size=options.rows or facts.rows,
        parallel_config=_parallel(facts.tensor_parallel),
        decoding_config=trt.DecodingConfig(decoding_mode=mode) if mode else None,
    )
    try:
        return trt, trt.Executor(directory / COMPILED_DIR, trt.ModelType.DECODER_ONLY, config)
    except Exception as problem:  # the bindings raise RuntimeError with a C++ message
        raise EngineError(
            f"TensorRT-LLM could not load the engine: {problem}",
            where=str(directory),
            hint="its log above says more; out of memory: open it with a smaller --batch, or build for more GPUs",
        ) from problem


def _parallel(tensor_parallel: int) -> Any:
    """How the ranks find each other; None on one GPU."""
    if tensor_parallel == 1:
        return None
    import tensorrt_llm
    from tensorrt_llm.bindings import executor as trt

    if _mpi_ranks() > 1:
        if _mpi_ranks() != tensor_parallel:
            raise EngineError(f"{_mpi_ranks()} MPI ranks for an engine of {tensor_parallel}")
        return trt.ParallelConfig(communication_mode=trt.CommunicationMode.LEADER)
    worker = Path(str(tensorrt_llm.__file__)).parent / "bin" / "executorWorker"
    if not worker.is_file():
        raise EngineError(
            "this TensorRT-LLM has no worker program for several GPUs",
            where=str(worker),
            hint="run under MPI: see docs/tensorrt-llm.md",
        )
    return trt.ParallelConfig(
        communication_mode=trt.CommunicationMode.ORCHESTRATOR,
        device_ids=list(range(tensor_parallel)),
        orchestrator_config=trt.OrchestratorConfig(is_orchestrator=True, worker_executable_path=str(worker)),
    )


def missing_executor_names() -> list[str]:
    """Names and keyword arguments that we use and this TensorRT-LLM does not take. Imports it."""
    from tensorrt_llm.bindings import executor as trt

    uses: dict[str, Callable[[], object]] = {
        "SamplingConfig": lambda: trt.SamplingConfig(seed=1, temperature=0.5, top_k=0, top_p=1.0, min_p=0.1),
        "KvCacheConfig": lambda: trt.KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.5),
        "ParallelConfig": lambda: trt.ParallelConfig(
            communication_mode=trt.CommunicationMode.ORCHESTRATOR,
            device_ids=[0],
            orchestrator_config=trt.OrchestratorConfig(is_orchestrator=True, worker_executable_path="worker"),
        ),
        "DecodingConfig": lambda: trt.DecodingConfig(decoding_mode=trt.DecodingMode.ExplicitDraftTokens()),
        "ExecutorConfig": lambda: trt.ExecutorConfig(
            max_beam_width=1, kv_cache_config=trt.KvCacheConfig(), enable_chunked_context=True, max_batch_size=1,
            parallel_config=None, decoding_config=None,
        ),
        "Request": lambda: trt.Request(
            input_token_ids=[1], max_tokens=1, streaming=True, sampling_config=trt.SamplingConfig(),
            output_config=trt.OutputConfig(exclude_input_from_output=True), end_id=None, stop_words=[[1]],
        ),
        "FinishReason": lambda: (trt.FinishReason.END_ID, trt.FinishReason.STOP_WORDS, trt.FinishReason.LENGTH),
    }  # fmt: skip
    missing = [f"Executor.{name}" for name in _METHODS if not hasattr(trt.Executor, name)]
    for name, use in uses.items():
        try:
            use()
        except Exception as problem:  # TypeError, AttributeError, or the bindings' own
            missing.append(f"{name}: {str(problem).splitlines()[0]}")
    return missing


def main(arguments: Sequence[str]) -> int:
    """``python -m trtkit.runtime.trtllm_engine DIR [BATCH]``; its exit code. Errors are words, as everywhere."""
    if len(arguments) not in (1, 2) or not all(word.isdigit() for word in arguments[1:]):
        sys.stderr.write("usage: python -m trtkit.runtime.trtllm_engine DIR [BATCH]\n")
        return 2
    try:
        serve_rank(Path(arguments[0]), *map(int, arguments[1:]))
    except TrtkitError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    return 0


def _mpi_ranks() -> int:
    """Ranks of this MPI run by Open MPI's, MPICH's or Slurm's (PMIx) word; 1 outside MPI."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
