"""Compile a TensorRT-LLM checkpoint with the ``tensorrt_llm`` package: rank files in, one engine per rank out.

Engines are bound to the exact TensorRT and TensorRT-LLM versions and to the compute capability of the GPU they were
built on, so this runs on the GPU host. ``trtllm_config.command_line`` is the ``trtllm-build`` line that does the same.

The settings are assigned one by one because ``PluginConfig`` takes no keyword arguments before it became a pydantic
model, and an unknown name must fail instead of being ignored.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trtkit.build.trtllm_config import WINDOW, WINDOW_TEXT, BuildPlan, PluginPlan
from trtkit.checkpoint.trtllm_config import ARCHITECTURES, REDRAFTER_ARCHITECTURES
from trtkit.errors import CapacityError, EngineError, MissingDependency, OutputError, TrtkitError, UnsupportedError
from trtkit.gpu import capability_text, cuda_device, profile_named
from trtkit.log import Progress, logger

__all__ = [
    "ENGINE_SHARE",
    "Compilation",
    "check_device",
    "check_space",
    "compile_engine",
    "missing_builder_names",
    "require_tensorrt_llm",
]

ENGINE_SHARE = 1.1
"""Size of the compiled engines relative to the rank files: the same weights, plans and a timing cache beside them."""
_ARCHITECTURES = (*ARCHITECTURES.values(), *sorted({*REDRAFTER_ARCHITECTURES.values()}))


def require_tensorrt_llm() -> str:
    """The installed version. Raises :class:`MissingDependency` or, outside the window, :class:`UnsupportedError`."""
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency(
            "TensorRT-LLM is not installed",
            hint=f"on the GPU host: pip install 'tensorrt-llm{WINDOW_TEXT}', or run in NVIDIA's container; without it: "
            "--prepare-only makes a bundle that `trtkit compile` finishes there, and --backend torch needs none of it",
        ) from None
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < WINDOW[0]:
        raise UnsupportedError(
            f"TensorRT-LLM {version} is too old: ReDrafter and Qwen3 need 1.0",
            hint=f"pip install 'tensorrt-llm{WINDOW_TEXT}'",
        )
    if release >= WINDOW[1]:
        raise UnsupportedError(
            f"TensorRT-LLM {version} has no TensorRT backend: it was removed after 1.2",
            hint=f"install tensorrt-llm{WINDOW_TEXT}, or serve the quantized checkpoint with this version's PyTorch "
            "backend: `trtkit export DIR --format unified-hf` (ReDrafter does not exist there)",
        )
    return version


def check_device(gpu: str) -> str:
    """The compute capability of this machine's GPUs, which must be the recipe's; else :class:`UnsupportedError`."""
    found = cuda_device()
    if found is None:
        raise UnsupportedError(
            "compiling a TensorRT engine needs an NVIDIA GPU, and this machine shows none",
            hint="run `trtkit compile` on the GPU host, or use --backend torch here",
        )
    name, capability = found
    wanted = profile_named(gpu)
    if capability != wanted.capability:
        raise UnsupportedError(
            f"this GPU ({name}) has compute capability {capability_text(capability)}, the recipe is for {wanted.title} "
            f"({capability_text(wanted.capability)})",
            hint="engines run only on the kind of GPU they were built on: compile there, or prepare again with --gpu",
        )
    return capability_text(capability)


def check_space(checkpoint: Path, out: Path) -> None:
    """Raise :class:`OutputError` before an hour is spent when the engines cannot fit on the disk of ``out``."""
    needed = int(ENGINE_SHARE * sum(path.stat().st_size for path in checkpoint.glob("rank*.safetensors")))
    place = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the engines need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(out),
            hint="free space, or choose another place with --out",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """One build. Travels to worker processes."""

    checkpoint: Path
    """config.json and rank files."""
    out: Path
    plan: BuildPlan
    timing_cache: Path
    """Kernel timings of an earlier build for this GPU and version; used where it exists, and replaced."""


def compile_engine(job: Compilation, *, workers: int | None = None) -> None:
    """Build the engine of every rank into ``job.out``.

    ``workers`` ranks at a time, each on its own GPU and with its own copy of a rank file in memory; None means one per
    GPU, and never more: two builds on one GPU would spoil each other's timings. Raises :class:`EngineError` with the
    builder's own words when it fails, :class:`CapacityError` when it runs out of memory, ``OSError`` when the disk
    fills up: call inside ``files.staged_dir``.
    """
    import torch

    ranks = job.plan.tensor_parallel
    gpus = torch.cuda.device_count()
    count = min(ranks, workers or max(1, gpus), gpus or ranks)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what quantizing left behind
    job.out.mkdir(parents=True, exist_ok=True)
    logger.info("compiling %d engine(s), %d at a time; this takes minutes", ranks, count)
    with Progress("compile", total=ranks, unit="ranks") as progress:
        for _ in _finished(job, ranks, count):
            progress.advance()
    missing = [name for name in ("config.json", *(f"rank{rank}.engine" for rank in range(ranks)))
               if not (job.out / name).is_file()]  # fmt: skip
    if missing:
        raise EngineError("TensorRT-LLM ended without an error, but not every file is there", offenders=missing)


def _finished(job: Compilation, ranks: int, count: int) -> Iterator[None]:
    if count == 1:
        for rank in range(ranks):
            _build_rank(job, rank, 0)
            yield
        return
    # CUDA does not survive a fork.
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_build_rank, job, rank, rank % count) for rank in range(ranks)]):
                done.result()
                yield
        except BrokenProcessPool:
            raise CapacityError(
                "a build process was killed, most likely for want of host memory",
                hint="use --workers 1: every worker holds the weights of one rank",
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _build_rank(job: Compilation, rank: int, device: int) -> None:
    try:
        _build(job, rank, device)
    except (TrtkitError, OSError):
        raise
    except MemoryError:
        raise _out_of_memory(rank) from None
    except Exception as problem:  # the builder raises RuntimeError, AssertionError, KeyError, its own ...
        text = str(problem) or type(problem).__name__
        if "out of memory" in text.lower():
            raise _out_of_memory(rank) from problem
        raise EngineError(
            f"TensorRT-LLM could not build rank {rank}: {text}",
            where=str(job.checkpoint),
            hint="its log above says more; run again with --debug for the traceback",
        ) from problem


def _out_of_memory(rank: int) -> CapacityError:
    return CapacityError(
        f"out of memory while building rank {rank}",
        hint="use --workers 1, a smaller --batch or --max-total-tokens, or a GPU set-up with more memory",
    )


def _build(job: Compilation, rank: int, device: int) -> None:
    import torch
    from tensorrt_llm.builder import build
    from tensorrt_llm.models import MODEL_MAP, PretrainedConfig

    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    config = PretrainedConfig.from_json_file(str(job.checkpoint / "config.json"))
    config.set_rank(rank)
    model = MODEL_MAP[config.architecture].from_checkpoint(str(job.checkpoint), config=config)
    engine = build(model, _build_config(job))
    if engine is None:
        raise EngineError(f"TensorRT-LLM built nothing for rank {rank}", where=str(job.checkpoint))
    engine.save(str(job.out))


def _build_config(job: Compilation) -> Any:
    from tensorrt_llm.builder import BuildConfig
    from tensorrt_llm.models.modeling_utils import SpeculativeDecodingMode
    from tensorrt_llm.plugin import PluginConfig

    plan = job.plan
    plugins = PluginConfig()
    for field in dataclasses.fields(plan.plugins):
        # The dtype "auto" of the GEMM plugin is resolved by the builder; None switches a plugin off.
        if not hasattr(plugins, field.name):
            raise UnsupportedError(
                f"this TensorRT-LLM has no plugin setting {field.name!r}", hint=f"install tensorrt-llm{WINDOW_TEXT}"
            )
        setattr(plugins, field.name, getattr(plan.plugins, field.name))
    plugins.validate()
    mode = SpeculativeDecodingMode.EXPLICIT_DRAFT_TOKENS if plan.redrafter else SpeculativeDecodingMode.NONE
    return BuildConfig(
        max_batch_size=plan.max_batch_size,
        max_input_len=plan.max_input_len,
        max_seq_len=plan.max_seq_len,
        max_beam_width=plan.max_beam_width,
        max_num_tokens=plan.max_num_tokens,
        max_draft_len=plan.max_draft_len,
        speculative_decoding_mode=mode,
        input_timing_cache=str(job.timing_cache) if job.timing_cache.is_file() else None,
        output_timing_cache=str(job.timing_cache),
        plugin_config=plugins,
    )


def missing_builder_names() -> list[str]:
    """Settings that we assign and this TensorRT-LLM does not have. Imports it, which takes seconds."""
    from tensorrt_llm.builder import BuildConfig
    from tensorrt_llm.models import MODEL_MAP
    from tensorrt_llm.models.modeling_utils import SpeculativeDecodingMode
    from tensorrt_llm.plugin import PluginConfig

    config, plugins = BuildConfig(), PluginConfig()
    asked = ("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width", "max_num_tokens", "max_draft_len",
             "speculative_decoding_mode", "input_timing_cache", "output_timing_cache", "plugin_config")  # fmt: skip
    missing = [f"BuildConfig.{name}" for name in asked if not hasattr(config, name)]
    missing += [f"PluginConfig.{field.name}" for field in dataclasses.fields(PluginPlan)
                if not hasattr(plugins, field.name)]  # fmt: skip
    missing += [f"MODEL_MAP[{name!r}]" for name in _ARCHITECTURES if name not in MODEL_MAP]
    return missing + ([] if hasattr(SpeculativeDecodingMode, "EXPLICIT_DRAFT_TOKENS") else ["EXPLICIT_DRAFT_TOKENS"])
