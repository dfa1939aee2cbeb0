"""Export for TensorRT-LLM's PyTorch backend (the only one after 1.2): the "unified HF" layout as its loader reads it.

The native layout is nearly that. What differs, after the loader's source (``tensorrt_llm/_torch/modules/linear.py``):

- engine.json, the draft head and what else belongs to trtkit stay behind: that backend has no ReDrafter.
- int4: it reads ``pre_quant_scale`` of o_proj and down_proj, where it must be there, and ignores those of q, k, v, gate
  and up. ModelOpt folds these into the norm in front, and so does this export; a missing one is written as ones.
- int8 (W8A16): codes and scales are taken as they are, but the product leaves the bias out: refused where there is one.
- int8-sq and an int8 KV cache do not exist there.
- A quantization file without a ``quant_algo`` is refused (``_update_from_hf_quant_config`` in ``llmapi/llm_utils.py``):
  bf16 weights with an fp8 KV cache are exported as plain bf16, and the server is told the cache's dtype.
- The fp8 cache runs at scale 1: ``attention_backend/trtllm.py`` has ones, and ``modules/attention.py`` hands it the
  checkpoint's scales for an fp4 cache alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trtkit.checkpoint.export_files import check_elsewhere, write_export
from trtkit.checkpoint.folding import BEHIND_NORM, check_folding, folded_norm
from trtkit.checkpoint.hf import MODEL_DTYPES, narrow, read_config
from trtkit.checkpoint.shards import Layout
from trtkit.checkpoint.unified import (
    QUANT_FILE,
    UnifiedCheckpoint,
    open_unified,
    quant_config,
    unified_config,
    unified_layout,
)
from trtkit.errors import UnsupportedError
from trtkit.files import write_json
from trtkit.model_spec import ModelSpec
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = ["SPECULATIVE_MODES", "check_unified_hf", "unified_notes", "write_unified_hf"]

SPECULATIVE_MODES = ("MTP", "Eagle3", "NGram", "DraftTarget", "PARD", "DFlash", "suffix automaton", "user-provided")
"""What TensorRT-LLM's PyTorch backend can draft with."""


def check_unified_hf(spec: ModelSpec, scheme: QuantScheme) -> None:
    """Refuse what the PyTorch backend cannot run: :class:`UnsupportedError` listing every reason."""
    wrong = []
    if scheme.name == "int8-sq":
        wrong.append("int8-sq (W8A8_SQ_PER_CHANNEL): that backend has no such linear")
    if scheme.name == "int8" and spec.qkv_bias:
        wrong.append("int8 (W8A16) with a qkv bias: that backend's weight-only product leaves the bias out")
    if scheme.kv_dtype == "int8":
        wrong.append("an int8 KV cache: that backend knows fp8 and the model's dtype")
    if wrong:
        raise UnsupportedError(
            "TensorRT-LLM's PyTorch backend cannot run this checkpoint",
            offenders=wrong,
            hint="build with --precision fp8 or int4, or export --format trtllm for TensorRT-LLM 1.0 to 1.2",
        )


def unified_notes(scheme: QuantScheme) -> tuple[str, ...]:
    """What the PyTorch backend does otherwise than the torch runtime, or must be told when it serves."""
    if scheme.kv_dtype != "fp8":
        return ()
    scales = "its fp8 cache runs at scale 1, whatever scales the checkpoint has"
    if scheme.quant_algo is not None:
        return (scales,)
    return (f"serve with kv_cache_config: {{dtype: fp8}}, which no bf16 checkpoint can say; {scales}",)


def write_unified_hf(engine_dir: Path, out: Path, *, replace: bool = False) -> dict[str, str]:
    """Write the native checkpoint in ``engine_dir`` for the PyTorch backend; returns SHA-256 by file name.

    ``out`` appears whole or not at all. Raises :class:`UnsupportedError`, :class:`CheckpointError` and
    :class:`OutputError`, all but a filled disk before anything is written.
    """
    source = open_unified(engine_dir)
    check_unified_hf(source.spec, source.scheme)
    check_elsewhere(engine_dir, out)
    if source.scheme.quant_algo is None:
        source = dataclasses.replace(source, scheme=SCHEMES["bf16"])
    check_folding(source)
    layout = _layout(source)
    tensors = ((name, _pieces(source, name)) for name in layout)
    return write_export(engine_dir, out, layout, tensors, lambda stage: _configure(source, stage), replace=replace)


def _layout(source: UnifiedCheckpoint) -> Layout:
    """The native tensors, but pre_quant_scale where the loader wants it."""
    spec, scheme = source.spec, source.scheme
    layout = dict(unified_layout(spec, scheme, pre_scale=scheme.name in ("int8-sq", "int4")))
    return {name: entry for name, entry in layout.items() if _folded_into(name) is None}


def _folded_into(name: str) -> str | None:
    """The norm that takes up this pre_quant_scale; None for every other tensor."""
    linear, _, suffix = name.rpartition(".")
    if suffix != "pre_quant_scale":
        return None
    prefix, part = linear.split(".", 3)[:3], linear.split(".", 3)[3]
    return ".".join([*prefix, BEHIND_NORM[part]]) if part in BEHIND_NORM else None


def _pieces(source: UnifiedCheckpoint, name: str) -> Iterator[Tensor]:
    shards, dtype = source.shards, MODEL_DTYPES[source.spec.dtype]
    folded = folded_norm(source, name)
    if folded is not None:
        yield folded
    elif name.endswith(".pre_quant_scale") and name not in shards:
        weight = shards.entries[name.removesuffix("pre_quant_scale") + "weight"]
        yield torch.ones(weight.shape[1], dtype=dtype)
    else:
        floating = shards.entries[name].dtype in MODEL_DTYPES.values()
        wanted = torch.float32 if name.endswith(("weight_scale", "input_scale", "k_scale", "v_scale")) else dtype
        yield from (narrow(block, wanted, name) if floating else block for block in shards.blocks(name))


def _configure(source: UnifiedCheckpoint, stage: Path) -> None:
    """config.json and the quantization file."""
    quant = None
    if source.scheme.quant_algo is not None:
        quant = quant_config(source.scheme, pre_scale=True)
        write_json(stage / QUANT_FILE, quant)
    config = read_config(source.directory)
    config.pop("quantization_config", None)
    write_json(stage / "config.json", unified_config(config, source.spec, quant))
