"""Export in the format of compressed-tensors, which vLLM and transformers read: int8, int8-sq and int4.

    config.json             the model's own, with ``quantization_config`` (``quant_method: compressed-tensors``)
    model*.safetensors      Hugging Face names; beside what stays as it is (norms, embeddings, biases, ``lm_head``):

| scheme  | format         | codes                          | X.weight_scale            | activations       |
|---------|----------------|--------------------------------|---------------------------|-------------------|
| int8    | pack-quantized | X.weight_packed int32 (N, K/4) | model dtype (N, 1)        | model dtype       |
| int8-sq | int-quantized  | X.weight int8 (N, K)           | float32 (N, 1)            | int8, per token   |
| int4    | pack-quantized | X.weight_packed int32 (N, K/8) | model dtype (N, K/128)    | model dtype       |

Packed codes are unsigned (code + 128 or + 8), the first in the lowest bits; ``X.weight_shape`` is int64 [N, K].

The format has no scale on a linear's input, so that each one goes where it changes nothing: those of q, k, v, gate and
up into the norm in front, that of down_proj into the rows of up_proj, whose scales take it up. That of o_proj has no
such place (heads share keys and values): its matrix is rounded once more with the scale in it, to 8 bits. Activations
of int8-sq are rounded per token there, not with the calibrated scale. Sources: compressed_tensors 0.17 and 0.18
(``compressors/pack_quantized``), vLLM 0.32 and 0.33 (``quantization/compressed_tensors/schemes``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trtkit
from trtkit.checkpoint.export_files import check_elsewhere, write_export
from trtkit.checkpoint.folding import BEHIND_NORM, check_folding, folded_norm
from trtkit.checkpoint.hf import MODEL_DTYPES, layer_of, layer_prefix, narrow, read_config
from trtkit.checkpoint.shards import Layout
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified, unified_config, unified_layout
from trtkit.errors import UnsupportedError
from trtkit.files import JsonObject, write_json
from trtkit.quant.packing import unpack_int4
from trtkit.quant.tensor import LinearWeights, QuantTensor, dequantize, quantize_int8
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = ["EXPORTED_BY", "check_compressed", "compressed_notes", "write_compressed"]

EXPORTED_BY = "exported_by"
"""In config.json: tells an export from a checkpoint that somebody else quantized."""
_UP, _DOWN, _OUT = "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"


def check_compressed(scheme: QuantScheme) -> None:
    """Refuse what needs no export or has no form there. Raises :class:`UnsupportedError`."""
    if scheme.weight_format in ("bf16", "fp8"):
        raise UnsupportedError(
            f"{scheme.name} weights need no such export", hint="vLLM reads the engine directory as it is"
        )


def compressed_notes(source: UnifiedCheckpoint) -> tuple[str, ...]:
    """What is not as in the engine."""
    notes = []
    if _scaled(source):
        notes.append("o_proj is rounded once more, to 8 bits: the scale of its input has no place in this format")
    if source.scheme.name == "int8-sq":
        notes.append("activations are rounded per token there, not with the calibrated scale")
    if source.scheme.kv_dtype == "fp8":
        notes.append("the scales of the fp8 KV cache stay behind: serve with --kv-cache-dtype fp8, at scale 1")
    if source.scheme.kv_dtype == "int8":
        notes.append("an int8 KV cache does not exist there: keys and values stay in the model's dtype")
    return tuple(notes)


def write_compressed(engine_dir: Path, out: Path, *, replace: bool = False) -> dict[str, str]:
    """Write the native checkpoint in ``engine_dir`` as compressed-tensors; returns SHA-256 by file name.

    ``out`` appears whole or not at all. Raises :class:`UnsupportedError`, :class:`CheckpointError` and
    :class:`OutputError`, all but a filled disk before anything is written.
    """
    source = open_unified(engine_dir)
    check_compressed(source.scheme)
    check_elsewhere(engine_dir, out)
    check_folding(source)
    layout = _layout(source)

    def configure(stage: Path) -> None:
        config = read_config(source.directory)
        config.pop("quantization_config", None)
        config = unified_config(config, source.spec, None)
        config |= {"quantization_config": _quantization(source), EXPORTED_BY: f"trtkit {trtkit.__version__}"}
        write_json(stage / "config.json", config)

    return write_export(engine_dir, out, layout, _tensors(source, layout), configure, replace=replace)


def _scaled(source: UnifiedCheckpoint) -> bool:
    """Whether linears scale their inputs."""
    return f"{layer_prefix(0)}{_OUT}.pre_quant_scale" in source.shards


def _bits(source: UnifiedCheckpoint, part: str) -> int:
    return 8 if part == _OUT and _scaled(source) else source.scheme.weight_bits


def _layout(source: UnifiedCheckpoint) -> Layout:
    """The plain checkpoint's tensors, each weight of a linear replaced by its codes and scales."""
    spec, scheme = source.spec, source.scheme
    model, layout = MODEL_DTYPES[spec.dtype], {}
    for name, (dtype, shape) in unified_layout(spec, SCHEMES["bf16"], pre_scale=False).items():
        part = _part(source, name)
        if part is None:
            layout[name] = (dtype, shape)
            continue
        stem, (rows, width), bits = name.removesuffix(".weight"), shape, _bits(source, part)
        groups = width // scheme.group_size if scheme.group_size and bits == 4 else 1
        if scheme.name == "int8-sq":
            layout[name] = (torch.int8, shape)
            layout[f"{stem}.weight_scale"] = (torch.float32, (rows, 1))
        else:
            layout[f"{stem}.weight_packed"] = (torch.int32, (rows, width * bits // 32))
            layout[f"{stem}.weight_scale"] = (model, (rows, groups))
            layout[f"{stem}.weight_shape"] = (torch.int64, (2,))
    return layout


def _part(source: UnifiedCheckpoint, name: str) -> str | None:
    """The linear whose weight ``name`` is, e.g. ``mlp.up_proj``; None for every other tensor."""
    layer = layer_of(name)
    if layer is None or not name.endswith(".weight"):
        return None
    part = name.removeprefix(layer_prefix(layer)).removesuffix(".weight")
    return part if part in source.spec.linear_shapes else None


def _tensors(source: UnifiedCheckpoint, layout: Layout) -> Iterator[tuple[str, Tensor | Iterator[Tensor]]]:
    """In the order of ``layout``; one linear in memory at a time."""
    stem, made = "", {}
    for name in layout:
        owner, _, suffix = name.rpartition(".")
        part = None if suffix == "bias" else _part(source, f"{owner}.weight")
        if part is None:
            yield name, _plain(source, name)
            continue
        if owner != stem:
            stem, made = owner, _compressed(source, owner, part)
        yield name, made[suffix]


def _plain(source: UnifiedCheckpoint, name: str) -> Tensor | Iterator[Tensor]:
    """A norm with the scale that it takes up, or the tensor as it is."""
    folded = folded_norm(source, name)
    dtype = MODEL_DTYPES[source.spec.dtype]
    return folded if folded is not None else (narrow(block, dtype, name) for block in source.shards.blocks(name))


def _compressed(source: UnifiedCheckpoint, stem: str, part: str) -> dict[str, Tensor]:
    """A linear's tensors by suffix."""
    weight = _without_input_scale(source, stem, part)
    assert weight.scale is not None
    scale = weight.scale.reshape(weight.shape[0], -1)
    codes = unpack_int4(weight.data) if weight.format == "int4" else weight.data
    if source.scheme.name == "int8-sq":
        return {"weight": codes, "weight_scale": scale}
    bits = 4 if weight.format == "int4" else 8
    return {
        "weight_packed": _packed(codes, bits),
        "weight_scale": narrow(scale, MODEL_DTYPES[source.spec.dtype], f"{stem}.weight_scale"),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _without_input_scale(source: UnifiedCheckpoint, stem: str, part: str) -> QuantTensor:
    """The weight of a linear whose input comes scaled, or of one that does the scaling itself."""
    layer = layer_of(f"{stem}.weight")
    assert layer is not None
    linear: LinearWeights = source.part(layer, part)
    if linear.pre_scale is None:
        return linear.weight
    if part == _OUT:
        return quantize_int8(dequantize(linear.weight) * linear.pre_scale.float(), steps=127)
    assert part in BEHIND_NORM or part == _DOWN
    if part != _UP:
        return linear.weight
    rows = source.part(layer, _DOWN).pre_scale
    assert rows is not None
    assert linear.weight.scale is not None
    scale = linear.weight.scale * (rows.float() if linear.weight.scale.ndim == 1 else rows.float()[:, None])
    return dataclasses.replace(linear.weight, scale=scale)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (N, K) -> int32 (N, K * bits / 32): unsigned, the first code in the lowest bits."""
    each = 32 // bits
    unsigned = (codes.to(torch.int32) + (1 << (bits - 1))).reshape(codes.shape[0], -1, each)
    words = torch.zeros(unsigned.shape[:2], dtype=torch.int32)
    for place in range(each):
        words |= unsigned[:, :, place] << (bits * place)
    return words


def _quantization(source: UnifiedCheckpoint) -> JsonObject:
    """``quantization_config``."""
    scheme = source.scheme

    def group(targets: list[str], bits: int) -> dict[str, Any]:
        weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        grouped = scheme.group_size is not None and bits == 4
        weights |= {"strategy": "group", "group_size": scheme.group_size} if grouped else {"strategy": "channel"}
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "targets": targets, "weights": weights, "output_activations": None,
            "input_activations": token if scheme.activations == "int8" else None,
        }  # fmt: skip

    groups = {"group_0": group(["Linear"], scheme.weight_bits)}
    if _bits(source, _OUT) != scheme.weight_bits:
        groups["group_1"] = group(["re:.*o_proj$"], _bits(source, _OUT))
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme.activations == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
