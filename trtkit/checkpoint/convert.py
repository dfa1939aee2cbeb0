"""Stream a checkpoint into the unified layout, one layer at a time: read, calibrate, quantize, write.

The three stages overlap: one thread reads (and looks for NaN and Inf while it does), the caller's calibrates and
quantizes, one hashes and writes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from trtkit.checkpoint.hf import (
    LM_HEAD,
    MODEL_DTYPES,
    HfCheckpoint,
    expected_shapes,
    finite_tensors,
    layer_of,
    layer_prefix,
    narrow,
    norms_of,
)
from trtkit.checkpoint.pipeline import consumed, produced
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.unified import QUANT_FILE, quant_config, unified_config, unified_layout
from trtkit.decoder import LINEAR_PARTS, LinearName
from trtkit.errors import UnsupportedError
from trtkit.files import digest_file, write_json
from trtkit.log import Progress, logger
from trtkit.model_spec import ModelSpec
from trtkit.quant.calibrate import Calibrator, LayerScales
from trtkit.quant.group import quantize_group
from trtkit.quant.tensor import FP8_MAX, TINY, LinearWeights, dense
from trtkit.scheme import QuantScheme

__all__ = ["COMPANIONS", "check_alignment", "convert"]

COMPANIONS = (
    "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
"""Files that belong to the model and go where its weights go."""

_AHEAD_BYTES = 1 << 29
"""Read ahead of the quantizer: about one layer of a 14B model."""
_BEHIND_BYTES = 1 << 28
"""Quantized and not yet written."""
_NAMED = 5
"""Tensors that a warning names."""

Named: TypeAlias = tuple[str, Tensor]


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

    ``pre_scale``: the calibrator gives a pre-scale for every product. The source is read ahead and the result written
    behind; memory is that of the layer (or table block) in work, of what lies in the two lines, and of the calibrator.

    Raises :class:`CheckpointError` that names every tensor with NaN or Inf. ``OSError`` passes through: call inside
    ``files.staged_dir``.
    """
    _tell_rounding(source)
    _tell_unread(source)
    layout = unified_layout(source.spec, scheme, pre_scale=pre_scale)
    writer = ShardWriter(out, layout)

    def write(tensors: Iterator[Named]) -> None:
        for name, pieces in itertools.groupby(tensors, key=lambda named: named[0]):
            writer.write(name, (piece for _, piece in pieces))
        digests.update(writer.close())

    digests: dict[str, str] = {}
    try:
        with (
            produced(finite_tensors(source), size=_nbytes, limit=_AHEAD_BYTES) as tensors,
            consumed(write, size=_nbytes, limit=_BEHIND_BYTES) as put,
            Progress("convert", total=source.spec.layers, unit="layers") as progress,
        ):
            for layer, members in itertools.groupby(tensors, key=lambda named: layer_of(named[0])):
                if layer is not None:
                    members = _quantized(source.spec, layer, dict(members), scheme, calibrator)
                    prefix = layer_prefix(layer)
                    # File order is the layout's, which readers of one layer find together.
                    members = _in_order([name for name in layout if name.startswith(prefix)], members)
                for name, tensor in members:
                    wanted = layout[name][0]  # what has it already was looked through when it was read
                    put((name, tensor if tensor.dtype == wanted else narrow(tensor, wanted, name)))
                if layer is not None:
                    progress.advance(note=scheme.name)
    finally:
        writer.abandon()
    return digests | _companions(source, out, scheme, pre_scale)


def _tell_rounding(source: HfCheckpoint) -> None:
    """Files may be wider than the model's dtype, which is what the model computes in wherever it is loaded."""
    kept = torch.finfo(MODEL_DTYPES[source.spec.dtype])
    stored = [source.shards.entries[name].dtype for name in expected_shapes(source.spec)]
    finer = [dtype for dtype in stored if torch.finfo(dtype).eps < kept.eps]
    if finer:
        names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in finer}))
        logger.warning(
            "%d of %d tensors are stored in %s and rounded to %s, the dtype of config.json",
            len(finer), len(stored), names, source.spec.dtype,
        )  # fmt: skip


def _tell_unread(source: HfCheckpoint) -> None:
    """Tensors that the architecture has no place for, as transformers tells of them: a bias that config.json does not
    speak of, or a layer too many, makes another model than the one that was trained."""
    known = {*expected_shapes(source.spec), LM_HEAD}
    unread = sorted(
        name for name in source.shards.entries if name not in known and not name.endswith(".rotary_emb.inv_freq")
    )
    if unread:
        shown = ", ".join(unread[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
        logger.warning(
            "%d tensor(s) of the checkpoint have no place in the model of its config.json and are not read: %s",
            len(unread), shown,
        )  # fmt: skip


def _nbytes(named: Named) -> int:
    return named[1].nbytes


def _in_order(names: Sequence[str], tensors: Iterator[Named]) -> Iterator[Named]:
    """The tensors in the order of ``names``, each as soon as those before it have come."""
    ready: dict[str, Tensor] = {}
    left = deque(names)
    for name, tensor in tensors:
        ready[name] = tensor
        while left and left[0] in ready:
            yield left[0], ready.pop(left.popleft())
    assert not left, left
    assert not ready, sorted(ready)


def _quantized(
    spec: ModelSpec, layer: int, tensors: dict[str, Tensor], scheme: QuantScheme, calibrator: Calibrator
) -> Iterator[Named]:
    """The layer's tensors by their names in the unified layout; ``tensors``, the source's, is used up."""
    prefix = layer_prefix(layer)
    norms = norms_of(tensors.__getitem__, spec, layer)
    parts: dict[LinearName, list[LinearWeights]] = {
        name: [
            LinearWeights(
                weight=dense(tensors.pop(f"{prefix}{part}.weight")), bias=tensors.pop(f"{prefix}{part}.bias", None)
            )
            for part in members
        ]
        for name, members in LINEAR_PARTS.items()
    }
    scales = calibrator.layer(layer, norms, parts)
    yield from tensors.items()
    for group, members in LINEAR_PARTS.items():
        with _one_thread_less():
            quantized = quantize_group(
                parts.pop(group), scheme, scales.groups[group], dtype=MODEL_DTYPES[spec.dtype]
            )  # fmt: skip
        for member, linear in zip(members, quantized, strict=True):
            yield from _linear_tensors(f"{prefix}{member}", linear)
    if scheme.kv_dtype != "model":
        for member, value in zip(("k_proj.k_scale", "v_proj.v_scale"), _kv_scales(scheme, scales), strict=True):
            yield f"{prefix}self_attn.{member}", torch.tensor(value)


@contextlib.contextmanager
def _one_thread_less() -> Iterator[None]:
    """Leave a core to reading and writing: many short operations on all cores would wait for the slowest each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    """fp8: amax / 448 but at least 1, as ModelOpt does: e4m3 loses nothing at small magnitudes. int8: amax / 127, and 1
    where all values are 0, as a v_proj of zeros makes them: nothing may be divided by 0."""
    if scales.kv_amax is None:
        return 1.0, 1.0
    if scheme.kv_dtype == "fp8":
        return max(scales.kv_amax[0] / FP8_MAX, 1.0), max(scales.kv_amax[1] / FP8_MAX, 1.0)
    key, value = (amax / 127 if amax / 127 >= TINY else 1.0 for amax in scales.kv_amax)
    return key, value


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
