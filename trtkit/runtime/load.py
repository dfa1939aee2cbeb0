"""``open_engine``: from an engine directory to a running ``Engine``."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch

from drafter.config import TreeShape
from drafter.model import Drafter
from trtkit.checkpoint.rank_share import RankShare, check_shares
from trtkit.checkpoint.trtllm_parse import read_trtllm_config
from trtkit.checkpoint.trtllm_reader import is_trtllm, merged_drafter, open_checkpoint
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.errors import CapacityError, EngineError, UsageError
from trtkit.files import digest_file
from trtkit.model_spec import ModelSpec
from trtkit.plan.memory import CPU_KV_SHARE, runtime_dtype
from trtkit.recipe import DRAFTER_DIR, ENGINE_FILE, EngineManifest, Recipe, output_layer_of, read_manifest
from trtkit.runtime.api import Engine
from trtkit.runtime.blocks import blocks_for
from trtkit.runtime.draft_head import REBUILD, HeadOptions, measured_acceptance, open_head, with_kernels
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.lookup import LOOKUP_TREES
from trtkit.runtime.memory import free_bytes
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.ranks.engine import RankedEngine
from trtkit.runtime.ranks.group import Ranks
from trtkit.runtime.thread_choice import ThreadChooser
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import TREES_OF_BOTH, Drafting, TorchLimits
from trtkit.runtime.tree_choice import DEFAULT_TREES, TreeChooser
from trtkit.runtime.tree_memory import memory_file
from trtkit.scheme import OutputLayer

__all__ = [
    "OpenOptions",
    "compute_dtype",
    "device_named",
    "kv_bytes",
    "open_engine",
    "open_rank",
    "rank_count",
    "set_threads",
]

_BLOCK_SIZE = 16
_BESIDE_BYTES = 3 << 29
"""Kept free on CUDA unless a share of the memory is asked for: for a prefill pass, expanded weights, graphs and tuning.
Their sizes added up, not measured."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """What may differ from run to run without a rebuild."""

    device: str = "auto"
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``: then the current device of the process."""
    dtype: str | None = None
    """Compute dtype; None takes the checkpoint's. float16 checkpoints compute in float32 on a CPU."""
    threads: int | None = None
    """CPU threads; None: up to one per core, as many as are the fastest while the engine runs."""
    rows: int | None = None
    """Largest in-flight batch; None takes the engine's own limit."""
    kv_memory_fraction: float | None = None
    """Share of the free memory for keys and values; None means 0.9 on CUDA, but all less 1.5 GiB at most, and 0.25 on a
    CPU."""
    speculative: bool = True
    """Use the engine's draft head if it has one. The tokens are the same either way."""
    tree: TreeShape | None = None
    """The draft tree; None lets the engine take the fastest one, or none, at each batch size."""
    head: HeadOptions = field(default_factory=HeadOptions)
    """How to run the draft head."""
    cuda_graphs: bool = True
    """On CUDA: decode steps as graphs over padded shapes. Without, they are launched kernel by kernel."""
    overlap: bool = True
    """With CUDA graphs: launch a decode step before the one in flight is read. The tokens are the same either way."""
    drafter: Path | None = None
    """A draft head in place of the engine's own, or for an engine without one."""
    lookup: bool = False
    """Look drafts up in what the samples of a prompt have written: without a head, or beside one; see ``lookup.py``."""
    output_layer: OutputLayer | None = None
    """How to run lm_head; None takes what the engine was built, and its quality measured, with."""
    prefix_cache: bool = False
    """Keep keys and values of what was computed while there is room, for prompts that begin alike; their samples are
    the same up to rounding. The torch runtime's; TensorRT-LLM does so anyway."""
    tensor_parallel: int | None = None
    """Processes that share each layer, on CUDA one per GPU; None: as many as the engine was built for where there are
    so many GPUs, else one. See ``ranks``."""

    def __post_init__(self) -> None:
        if self.output_layer not in (None, *get_args(OutputLayer)):
            raise UsageError(f"unknown output layer {self.output_layer!r}", hint="model or int8")
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise UsageError(f"tensor parallel {self.tensor_parallel}: must be at least 1")


def open_engine(directory: Path, options: OpenOptions | None = None) -> Engine:
    """Open an engine directory, or a bare TensorRT-LLM checkpoint on the torch runtime.

    Raises :class:`EngineError`, :class:`CapacityError` or :class:`UsageError`.
    """
    options = options or OpenOptions()
    manifest = _manifest(directory)
    if manifest.backend == "tensorrt-llm":
        return _open_trtllm(directory, manifest, options)
    device = device_named(options.device)
    ranks = rank_count(manifest.recipe, options.tensor_parallel, device)
    if ranks == 1:
        return _open_torch(directory, manifest, options, device)
    _checkpoint(directory, manifest, ranks)  # refused before any process is started
    if device.type == "cpu" and options.threads is None:
        options = dataclasses.replace(options, threads=max(1, torch.get_num_threads() // ranks))
    return RankedEngine(ranks, device.type, functools.partial(open_rank, directory, options))


def open_rank(directory: Path, options: OpenOptions, ranks: Ranks) -> TorchEngine:
    """Open this process's part of an engine that runs on several. Raises what :func:`open_engine` does."""
    device = device_named(options.device)
    if device.type == "cuda":
        device = device_named(f"cuda:{ranks.rank}")
    return _open_torch(directory, _manifest(directory), options, device, ranks)


def rank_count(recipe: Recipe, asked: int | None, device: torch.device) -> int:
    """How many processes run an engine of the torch runtime; ``asked`` as ``OpenOptions.tensor_parallel``.

    Raises :class:`UsageError` when more GPUs are asked for than there are.
    """
    if asked is not None and asked > 1 and not torch.distributed.is_available():
        raise UsageError("--tp takes a torch with torch.distributed", hint="leave it out, or install torch from PyPI")
    on_cuda = device.type == "cuda"
    here = torch.cuda.device_count() if on_cuda and device.index is None else 1
    if asked is None:
        return recipe.tensor_parallel if recipe.tensor_parallel <= here else 1
    if on_cuda and asked > here:
        there = f"this machine has {here}" if device.index is None else f"{device} is one"
        raise UsageError(f"--tp {asked} takes as many GPUs, {there}", hint="--device cuda is all that are there")
    return asked


def _checkpoint(directory: Path, manifest: EngineManifest, ranks: int) -> UnifiedCheckpoint:
    """The weights. Raises :class:`EngineError`, or :class:`UnsupportedError` when they cannot be shared out."""
    checkpoint = open_checkpoint(directory)
    if checkpoint.scheme.name != manifest.recipe.precision:
        raise EngineError(
            f"engine.json says {manifest.recipe.precision}, the weights are {checkpoint.scheme.name}",
            where=str(directory),
            hint="the directory was edited; build it again",
        )
    if ranks > 1:
        check_shares(checkpoint.spec, checkpoint.scheme, ranks)
    return checkpoint


def _open_torch(
    directory: Path, manifest: EngineManifest, options: OpenOptions, device: torch.device, ranks: Ranks | None = None
) -> TorchEngine:  # fmt: skip
    set_threads(options.threads)
    size = 1 if ranks is None else ranks.size
    checkpoint = _checkpoint(directory, manifest, size)
    dtype = _DTYPES[_known(options.dtype)] if options.dtype else compute_dtype(checkpoint.spec, device)
    total = min(manifest.recipe.limits.total_tokens, checkpoint.spec.max_positions)
    trees: tuple[TreeShape | None, ...] = (None,)
    with_head = manifest.recipe.tree is not None or options.drafter is not None
    if options.speculative and (with_head or options.lookup):
        usual = (TREES_OF_BOTH if options.lookup else DEFAULT_TREES) if with_head else LOOKUP_TREES
        trees = usual if options.tree is None else (options.tree,)
    elif options.speculative and options.tree is not None:
        raise UsageError(
            f"a draft tree {options.tree}, but no draft head to draw it",
            where=str(directory),
            hint="build it with --drafter, take --lookup, which needs none, or leave --tree out",
        )
    reach = total + TreeChooser(trees).max_nodes
    output_layer = options.output_layer or output_layer_of(manifest.recipe)
    source = checkpoint if ranks is None else RankShare(whole=checkpoint, rank=ranks.rank, ranks=size)
    try:
        model = DecoderModel(
            source, device=device, dtype=dtype, max_tokens=reach, output_layer=output_layer, ranks=ranks
        )
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"the weights do not fit into the free memory of {device}", where=str(directory), hint=_room(device, size)
        ) from None
    drafting = None
    if trees != (None,):
        head = _head(directory, model, options) if with_head else None
        identity = directory / (ENGINE_FILE if (directory / ENGINE_FILE).is_file() else "config.json")
        first = ranks is None or ranks.rank == 0
        memory = memory_file(
            digest_file(identity), device,
            f"{options.head} {dtype} {options.drafter} {output_layer} {size}{' lookup' * options.lookup}",
        )  # fmt: skip
        expected = measured_acceptance(options.drafter or directory / DRAFTER_DIR) if with_head else {}
        drafting = Drafting(
            head=head, lookup=options.lookup, trees=trees, memory=memory if first else None, expected=expected
        )
    limits = _limits(manifest, options, model, total_tokens=total, reach=reach)
    threads = torch.get_num_threads()
    adapts = device.type == "cpu" and options.threads is None and threads > 1
    return TorchEngine(model, limits, drafting, ThreadChooser(threads) if adapts else None)


def _head(directory: Path, model: DecoderModel, options: OpenOptions) -> Drafter:
    """The head asked for, the engine directory's, or the one in the rank files of a TensorRT-LLM checkpoint."""
    device, dtype, wanted = model.device, model.dtype, options.head
    merged = None
    if options.drafter is None and is_trtllm(directory) and not (directory / DRAFTER_DIR).is_dir():
        merged = merged_drafter(directory, dtype=dtype, device=device)
    if merged is None:
        place = options.drafter or directory / DRAFTER_DIR
        hint = (
            REBUILD if options.drafter is None else "--drafter takes a directory of `trtkit train-drafter`, or practice"
        )
        return open_head(
            place, model.spec, wanted, device=device, dtype=dtype, embedding=model.embedding, ranks=model.ranks,
            hint=hint,
        )  # fmt: skip
    if wanted.vocabulary is not None:
        raise UsageError("a head in rank files does not say which tokens are frequent", where=str(directory))
    return with_kernels(
        merged, wanted.precision, device=device, dtype=dtype, ranks=model.ranks, embedding=model.embedding
    )


def _manifest(directory: Path) -> EngineManifest:
    """engine.json; a bare TensorRT-LLM checkpoint says enough itself, apart from the limits, which are the defaults."""
    if (directory / ENGINE_FILE).is_file() or not is_trtllm(directory):
        return read_manifest(directory)
    config = read_trtllm_config(directory)
    recipe = Recipe(
        model=str(directory), precision=config.scheme.name, kv_dtype=config.scheme.kv_dtype, tree=config.tree,
        tensor_parallel=config.options.tensor_parallel, output_layer="model",
    )  # fmt: skip
    return EngineManifest(
        recipe=recipe, backend="torch", versions={}, checkpoint_digest={}, quality=None, created="unknown"
    )


def _open_trtllm(directory: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Refuse what a compiled engine has baked in, then open it."""
    from trtkit.runtime.trtllm_engine import ExecutorOptions, open_compiled

    tree, wrong = manifest.recipe.tree, []
    if options.device not in ("auto", "cuda"):
        wrong.append(f"device {options.device}: it runs on the first {manifest.recipe.tensor_parallel} GPU(s)")
    if options.dtype is not None:
        wrong.append(f"dtype {options.dtype}: it computes in what it was built with")
    if tree is not None and not options.speculative:
        wrong.append("no draft tree: its drafter cannot be switched off")
    if options.tree is not None and options.tree != tree:
        wrong.append(f"draft tree {options.tree}: it was built with {tree or 'none'}")
    if options.head != HeadOptions() or options.drafter is not None:
        wrong.append("draft head options: its drafter is compiled in")
    if options.lookup:
        wrong.append("lookup: it drafts with what is compiled in, or not at all")
    if options.output_layer == "int8":
        wrong.append("output layer int8: it is compiled in 16 bits")
    if options.tensor_parallel not in (None, manifest.recipe.tensor_parallel):
        wrong.append(f"tensor parallel {options.tensor_parallel}: it was built for {manifest.recipe.tensor_parallel}")
    if wrong:
        raise UsageError("a tensorrt-llm engine cannot be opened like that", where=str(directory), offenders=wrong)
    return open_compiled(
        directory, ExecutorOptions(rows=options.rows, kv_memory_fraction=options.kv_memory_fraction or 0.9)
    )


def _room(device: torch.device, ranks: int) -> str:
    """Where more memory may come from."""
    here = torch.cuda.device_count() if device.type == "cuda" else 0
    if here > ranks:
        return f"share the model out over the GPUs of this machine: --tp {here}"
    return "free memory, or see `trtkit plan` for what fits where"


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises :class:`UsageError` for what is not there.

    ``cuda:N`` becomes the current device of the process: Triton launches there, wherever the tensors lie.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}", hint="auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", hint="use --device cpu, or see `trtkit doctor`")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", hint="auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UsageError(f"no device {name!r}: this machine has {count}", hint="counted from cuda:0")
        torch.cuda.set_device(device)
    return device


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """What a model of ``spec`` computes in on ``device`` unless it is told: see ``plan.memory.runtime_dtype``."""
    return _DTYPES[runtime_dtype(spec, on_cpu=device.type == "cpu")]


def _known(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of: {', '.join(_DTYPES)}")
    return dtype


def kv_bytes(device: torch.device, fraction: float | None = None) -> int:
    """What keys and values may take of the memory that is free; ``fraction`` as ``OpenOptions.kv_memory_fraction``."""
    free = free_bytes(device)
    usable = int(free * (fraction or (0.9 if device.type == "cuda" else CPU_KV_SHARE)))
    if device.type == "cuda" and fraction is None:
        usable = max(0, min(usable, free - _BESIDE_BYTES))
    return usable


def _limits(
    manifest: EngineManifest,
    options: OpenOptions,
    model: DecoderModel,
    *,
    total_tokens: int,
    reach: int,
) -> TorchLimits:
    """``reach``: slots that a row may touch, its length and the nodes of a draft tree."""
    rows = options.rows or manifest.recipe.limits.batch
    kv_dtype = manifest.recipe.kv_dtype
    block_bytes = kv_block_bytes(model.spec, kv_dtype, model.dtype, _BLOCK_SIZE)
    usable = kv_bytes(model.device, options.kv_memory_fraction)
    ranks = model.ranks
    if ranks is not None and model.device.type == "cpu":
        usable //= ranks.size  # they share its memory
    affordable = usable // block_bytes if ranks is None else ranks.least(usable // block_bytes)
    # One block more for the copy of a shared partial prompt block.
    least = blocks_for(reach, _BLOCK_SIZE) + 1
    if affordable < least:
        raise CapacityError(
            f"the keys and values of one request of {total_tokens} tokens take {least * block_bytes / 1e9:.2f} GB, "
            f"{affordable * block_bytes / 1e9:.2f} GB may be used",
            hint=f"build with a smaller --max-total-tokens, or {_room(model.device, ranks.size if ranks else 1)}",
        )
    return TorchLimits(
        rows=rows, total_tokens=total_tokens, kv_blocks=min(affordable, rows * least), block_size=_BLOCK_SIZE,
        kv_dtype=kv_dtype, fixed_shapes=None if options.cuda_graphs else False,
        overlap=None if options.overlap else False, prefix_cache=options.prefix_cache,
    )  # fmt: skip
