"""Stream a checkpoint into the unified layout, one layer at a time: read, calibrate, quantize, write."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trtkit.checkpoint.hf import EMBEDDING, LM_HEAD, HfCheckpoint, expected_layer, layer_prefix
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.unified import QUANT_FILE, quant_config, unified_config, unified_layout
from trtkit.decoder import LINEAR_PARTS, LinearName
from trtkit.errors import UnsupportedError
from trtkit.files import digest_file, write_json
from trtkit.log import Progress
from trtkit.model_spec import ModelSpec
from trtkit.quant.calibrate import Calibrator, LayerScales
from trtkit.quant.group import quantize_group
from trtkit.quant.tensor import FP8_MAX, LinearWeights
from trtkit.scheme import QuantScheme

__all__ = ["COMPANIONS", "check_alignment", "convert"]

COMPANIONS = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
"""Files that belong to the model and go where its weights go."""


def check_alignment(spec: ModelSpec, scheme: QuantScheme) -> None:
    """Refuse shapes that the format cannot hold: :class:`UnsupportedError` listing every one."""
    size = scheme.group_size
    if size is None:
        return
    wrong = [
        f"{part} ({rows}, {width}): {text}"
        for part, (rows, width) in spec.linear_shapes.items()
        for bad, text in (
            (width % size, f"{width} inputs are no multiple of the group of {size}"),
            (rows % 2, f"{rows} rows cannot be packed in pairs"),
        )
        if bad
    ]
    if wrong:
        raise UnsupportedError(
            f"this model's shapes do not fit {scheme.name}",
            offenders=wrong,
            hint="choose --precision int8 or fp8",
        )


def convert(
    source: HfCheckpoint, out: Path, scheme: QuantScheme, calibrator: Calibrator, *, pre_scale: bool
) -> dict[str, str]:
    """Write the whole checkpoint into the existing directory ``out``; returns SHA-256 by file name.

    ``pre_scale``: the calibrator gives a pre-scale for every product. Peak memory is one layer (or one table block) and
    what the calibrator holds. ``OSError`` passes through: call inside ``files.staged_dir``.
    """
    layout = unified_layout(source.spec, scheme, pre_scale=pre_scale)
    writer = ShardWriter(out, layout)

    def copy(name: str) -> None:
        writer.write(name, (block.to(layout[name][0]) for block in source.shards.blocks(name)))

    try:
        copy(EMBEDDING)
        with Progress("convert", total=source.spec.layers, unit="layers") as progress:
            for layer in range(source.spec.layers):
                tensors = dict(_layer(source, layer, scheme, calibrator))
                # File order is the layout's, which readers of one layer find together.
                prefix = layer_prefix(layer)
                for name in [name for name in layout if name.startswith(prefix)]:
                    writer.write(name, tensors.pop(name).to(layout[name][0]))
                assert not tensors, sorted(tensors)
                progress.advance(note=scheme.name)
        copy("model.norm.weight")
        if not source.spec.tied:
            copy(LM_HEAD)
        digests = writer.close()
    finally:
        writer.abandon()
    return digests | _companions(source, out, scheme, pre_scale)


def _layer(
    source: HfCheckpoint, layer: int, scheme: QuantScheme, calibrator: Calibrator
) -> Iterator[tuple[str, Tensor]]:
    """The layer's tensors by their names in the unified layout."""
    prefix = layer_prefix(layer)
    norms = source.norms(layer)
    parts: dict[LinearName, list[LinearWeights]] = {
        name: [source.part(layer, part) for part in members] for name, members in LINEAR_PARTS.items()
    }
    scales = calibrator.layer(layer, norms, parts)
    for name in expected_layer(source.spec, layer):
        if "norm" in name:
            yield name, source.shards.tensor(name)
    for group, members in LINEAR_PARTS.items():
        quantized = quantize_group(parts.pop(group), scheme, scales.groups[group])
        for member, linear in zip(members, quantized, strict=True):
            yield from _linear_tensors(f"{prefix}{member}", linear)
    if scheme.kv_dtype != "model":
        for member, value in zip(("k_proj.k_scale", "v_proj.v_scale"), _kv_scales(scheme, scales), strict=True):
            yield f"{prefix}self_attn.{member}", torch.tensor(value)


def _linear_tensors(name: str, linear: LinearWeights) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", linear.weight.data
    for suffix, tensor in (
        ("weight_scale", linear.weight.scale),
        ("input_scale", linear.input_scale),
        ("pre_quant_scale", linear.pre_scale),
        ("bias", linear.bias),
    ):
        if tensor is not None:
            yield f"{name}.{suffix}", tensor


def _kv_scales(scheme: QuantScheme, scales: LayerScales) -> tuple[float, float]:
    """fp8: amax / 448 but at least 1, as ModelOpt does: e4m3 loses nothing at small magnitudes. int8: amax / 127."""
    if scales.kv_amax is None:
        return 1.0, 1.0
    if scheme.kv_dtype == "fp8":
        return max(scales.kv_amax[0] / FP8_MAX, 1.0), max(scales.kv_amax[1] / FP8_MAX, 1.0)
    return scales.kv_amax[0] / 127, scales.kv_amax[1] / 127


def _companions(source: HfCheckpoint, out: Path, scheme: QuantScheme, pre_scale: bool) -> dict[str, str]:
    """config.json, the quantization file, tokenizer and generation config; their digests."""
    quant = None
    if scheme.quant_algo is not None or scheme.kv_dtype != "model":
        quant = quant_config(scheme, pre_scale=pre_scale)
        write_json(out / QUANT_FILE, quant)
    write_json(out / "config.json", unified_config(source.config, source.spec, quant))
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(path, out / path.name)
    names = sorted(path.name for path in out.iterdir() if path.suffix != ".safetensors")
    return {name: digest_file(out / name) for name in names}
