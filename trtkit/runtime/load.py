"""``open_engine``: from an engine directory to a running ``Engine``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from drafter.checkpoint import DrafterError, load_drafter
from drafter.config import TreeShape
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import CapacityError, EngineError, UnsupportedError, UsageError
from trtkit.model_spec import ModelSpec
from trtkit.recipe import DRAFTER_DIR, EngineManifest, read_manifest
from trtkit.runtime.api import Engine
from trtkit.runtime.blocks import blocks_for
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import Drafting, TorchEngine, TorchLimits
from trtkit.runtime.tree_choice import DEFAULT_TREES, TreeChooser

__all__ = ["OpenOptions", "compute_dtype", "device_named", "open_engine", "set_threads"]

_BLOCK_SIZE = 16
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """What may differ from run to run without a rebuild."""

    device: str = "auto"
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str | None = None
    """Compute dtype; None takes the checkpoint's. float16 checkpoints compute in float32 on a CPU."""
    threads: int | None = None
    rows: int | None = None
    """Largest in-flight batch; None takes the engine's own limit."""
    kv_memory_fraction: float | None = None
    """Share of the free memory for keys and values; None means 0.9 on CUDA, 0.25 on a CPU."""
    speculative: bool = True
    """Use the engine's draft head if it has one. The tokens are the same either way."""
    tree: TreeShape | None = None
    """The draft tree; None lets the engine take the fastest one, or none, at each batch size."""


def open_engine(directory: Path, options: OpenOptions | None = None) -> Engine:
    """Open an engine directory. Raises :class:`EngineError`, :class:`CapacityError` or :class:`UnsupportedError`."""
    options = options or OpenOptions()
    manifest = read_manifest(directory)
    if manifest.backend != "torch":
        raise UnsupportedError(
            f"this engine is for the {manifest.backend} backend, which this version does not run",
            where=str(directory),
            hint="build one with --backend torch",
        )
    device = device_named(options.device)
    set_threads(options.threads)
    checkpoint = open_unified(directory)
    if checkpoint.scheme.name != manifest.recipe.precision:
        raise EngineError(
            f"engine.json says {manifest.recipe.precision}, the weights are {checkpoint.scheme.name}",
            where=str(directory),
            hint="the directory was edited; build it again",
        )
    dtype = _DTYPES[_known(options.dtype)] if options.dtype else compute_dtype(checkpoint.spec, device)
    total = min(manifest.recipe.limits.total_tokens, checkpoint.spec.max_positions)
    trees: tuple[TreeShape | None, ...] = (None,)
    if options.speculative and manifest.recipe.tree is not None:
        trees = DEFAULT_TREES if options.tree is None else (options.tree,)
    reach = total + TreeChooser(trees).max_nodes
    model = DecoderModel(checkpoint, device=device, dtype=dtype, max_tokens=reach)
    drafting = None if trees == (None,) else _drafting(directory / DRAFTER_DIR, model, trees)
    limits = _limits(manifest, checkpoint.spec, options, model, total_tokens=total, reach=reach)
    return TorchEngine(model, limits, drafting)


def _drafting(directory: Path, model: DecoderModel, trees: tuple[TreeShape | None, ...]) -> Drafting:
    try:
        head = load_drafter(directory, dtype=model.dtype, device=model.device)
    except DrafterError as problem:
        raise EngineError(str(problem), hint="build the engine again with --drafter, or without a tree") from None
    spec = model.spec
    if (head.config.hidden_size, head.config.vocab_size) != (spec.hidden, spec.vocab):
        raise EngineError(
            f"the draft head is for hidden size {head.config.hidden_size} and vocabulary {head.config.vocab_size}, "
            f"the model has {spec.hidden} and {spec.vocab}",
            where=str(directory),
            hint="train a head for this model",
        )
    return Drafting(head=head, trees=trees)


def set_threads(threads: int | None) -> None:
    """CPU threads of this process; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises :class:`UsageError` for what is not there."""
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
    return device


def compute_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The checkpoint's dtype, but float32 for float16 on a CPU, which has no float16 kernels worth using."""
    return torch.float32 if spec.dtype == "float16" and device.type == "cpu" else _DTYPES[spec.dtype]


def _known(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of: {', '.join(_DTYPES)}")
    return dtype


def _limits(
    manifest: EngineManifest,
    spec: ModelSpec,
    options: OpenOptions,
    model: DecoderModel,
    *,
    total_tokens: int,
    reach: int,
) -> TorchLimits:
    """``reach``: slots that a row may touch, its length and the nodes of a draft tree."""
    rows = options.rows or manifest.recipe.limits.batch
    kv_dtype = manifest.recipe.kv_dtype
    block_bytes = kv_block_bytes(spec, kv_dtype, model.dtype, _BLOCK_SIZE)
    fraction = options.kv_memory_fraction or (0.9 if model.device.type == "cuda" else 0.25)
    affordable = int(_free_bytes(model.device) * fraction) // block_bytes
    # One block more for the copy of a shared partial prompt block.
    least = blocks_for(reach, _BLOCK_SIZE) + 1
    if affordable < least:
        raise CapacityError(
            f"the keys and values of one request of {total_tokens} tokens take {least * block_bytes / 1e9:.2f} GB, "
            f"{affordable * block_bytes / 1e9:.2f} GB may be used",
            hint="build with a smaller --max-total-tokens, or free memory",
        )
    return TorchLimits(
        rows=rows, total_tokens=total_tokens, kv_blocks=min(affordable, rows * least), block_size=_BLOCK_SIZE,
        kv_dtype=kv_dtype,
    )  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
