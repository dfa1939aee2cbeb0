"""The native quantized checkpoint: the public "unified HF" layout of ModelOpt.

    config.json             the model's own, with ``quantization_config``
    hf_quant_config.json    {"producer": ..., "quantization": {"quant_algo", "kv_cache_quant_algo", ...}}
    model*.safetensors      Hugging Face names; beside ``X.weight``:

| scheme  | X.weight           | X.weight_scale   | X.input_scale | X.pre_quant_scale          |
|---------|--------------------|------------------|---------------|----------------------------|
| bf16    | model dtype (N, K) | -                | -             | -                          |
| int8    | int8 (N, K)        | float32 (N,)     | -             | -                          |
| int8-sq | int8 (N, K)        | float32 (N,)     | float32 ()    | model dtype (K,)           |
| fp8     | float8_e4m3 (N, K) | float32 ()       | float32 ()    | -                          |
| int4    | uint8 (N / 2, K)   | float32 (N, K/128) | -           | model dtype (K,), awq only |

q, k, v share their input and pre-quant scales (and the fp8 weight scale), and so do gate and up: each set is one
product.
With an 8-bit KV cache, ``k_proj.k_scale`` and ``v_proj.v_scale`` are float32 ().
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trtkit
from trtkit.checkpoint.hf import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    MODEL_DTYPES,
    expected_layer,
    layer_prefix,
    norms_of,
    open_source,
    read_config,
)
from trtkit.checkpoint.shards import Layout, Shards, open_shards, raise_damaged
from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.errors import CheckpointError, ConfigError, UnsupportedError
from trtkit.files import JsonObject, read_json
from trtkit.model_spec import ModelSpec, spec_from_config, spec_to_config
from trtkit.quant.tensor import FP8_MAX, LinearWeights, QuantTensor, concat_rows, dequantize, quantize_fp8
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = [
    "QUANT_FILE",
    "UnifiedCheckpoint",
    "open_unified",
    "quant_config",
    "unified_config",
    "unified_layout",
]

QUANT_FILE = "hf_quant_config.json"
_WEIGHT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
_KV_ALGOS = {"fp8": "FP8", "int8": "INT8"}
_EXCLUDED = ["lm_head", "model.embed_tokens"]


def unified_layout(spec: ModelSpec, scheme: QuantScheme, *, pre_scale: bool) -> Layout:
    """Every tensor of the checkpoint with dtype and shape, in file order. ``pre_scale``: with pre_quant_scale."""
    model = MODEL_DTYPES[spec.dtype]
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {EMBEDDING: (model, (spec.vocab, spec.hidden))}
    for layer in range(spec.layers):
        linears = {f"{layer_prefix(layer)}{part}.weight": shape for part, shape in spec.linear_shapes.items()}
        for name, shape in expected_layer(spec, layer).items():
            if name in linears:
                layout |= _linear_layout(name.removesuffix(".weight"), linears[name], scheme, model, pre_scale)
            else:
                layout[name] = (model, shape)
        if scheme.kv_dtype != "model":
            names = ("k_proj.k_scale", "v_proj.v_scale")
            layout |= {f"{layer_prefix(layer)}self_attn.{name}": (torch.float32, ()) for name in names}
    layout[FINAL_NORM] = (model, (spec.hidden,))
    if not spec.tied:
        layout[LM_HEAD] = (model, (spec.vocab, spec.hidden))
    return layout


def _linear_layout(
    name: str, shape: tuple[int, int], scheme: QuantScheme, model: torch.dtype, pre_scale: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    rows, width = shape
    if scheme.weight_format == "bf16":
        return {f"{name}.weight": (model, shape)}
    scale_shapes: dict[str, tuple[int, ...]] = {
        "int8": (rows,), "fp8": (), "int4": (rows, math.ceil(width / (scheme.group_size or width))),
    }  # fmt: skip
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{name}.weight": (
            _WEIGHT_DTYPES[scheme.weight_format],
            (rows // 2, width) if scheme.weight_format == "int4" else shape,
        ),
        f"{name}.weight_scale": (torch.float32, scale_shapes[scheme.weight_format]),
    }
    if scheme.activations != "none":
        layout[f"{name}.input_scale"] = (torch.float32, ())
    if pre_scale:
        layout[f"{name}.pre_quant_scale"] = (model, (width,))
    return layout


def quant_config(scheme: QuantScheme, *, pre_scale: bool) -> JsonObject:
    """The contents of ``hf_quant_config.json``."""
    quantization: JsonObject = {
        "quant_algo": scheme.quant_algo,
        "kv_cache_quant_algo": _KV_ALGOS.get(scheme.kv_dtype),
    }
    if scheme.group_size is not None:
        quantization |= {
            "group_size": scheme.group_size,
            "has_zero_point": False,
            "pre_quant_scale": pre_scale,
        }
    quantization["exclude_modules"] = _EXCLUDED
    return {"producer": {"name": "trtkit", "version": trtkit.__version__}, "quantization": quantization}


def unified_config(original: Mapping[str, Any], spec: ModelSpec, quant: JsonObject | None) -> JsonObject:
    """``config.json``: what the source said, in our spelling where we know it, and the quantization mirrored.

    The mirror also has ModelOpt's keys of the flat form (``convert_hf_quant_config_format`` in its
    ``torch/export/convert_hf_config.py``): readers of config.json look for ``ignore`` and ``kv_cache_scheme``.
    """
    config = {**original, **spec_to_config(spec)}
    if quant is not None:
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "producer": quant["producer"],
            **quant["quantization"],
            "ignore": quant["quantization"]["exclude_modules"],
        }
        if quant["quantization"]["kv_cache_quant_algo"] == "FP8":
            config["quantization_config"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedCheckpoint:
    """A checkpoint in the unified layout, quantized or not; tensors are read when they are asked for."""

    directory: Path
    spec: ModelSpec
    scheme: QuantScheme
    shards: Shards

    def part(self, layer: int, part: str) -> LinearWeights:
        """One linear as stored, e.g. ``self_attn.q_proj``."""
        name = f"{layer_prefix(layer)}{part}"
        shape = self.spec.linear_shapes[part]
        return LinearWeights(
            weight=QuantTensor(
                data=self.shards.tensor(f"{name}.weight"),
                scale=self._optional(f"{name}.weight_scale"),
                format=self.scheme.weight_format,
                shape=shape,
            ),
            bias=self._optional(f"{name}.bias"),
            input_scale=self._optional(f"{name}.input_scale"),
            pre_scale=self._optional(f"{name}.pre_quant_scale"),
        )

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        """One of the layer's four products, q, k, v (gate, up) stacked by rows."""
        return concat_rows(self.parts(layer, name))

    def parts(self, layer: int, name: LinearName) -> list[LinearWeights]:
        """The linears of one product, apart, under the scales that they share."""
        parts = [self.part(layer, part) for part in LINEAR_PARTS[name]]
        if self.scheme.name == "fp8":
            parts = _share_scales(parts)
        self._check_shared(layer, name, parts)
        return parts

    def _check_shared(self, layer: int, name: LinearName, parts: list[LinearWeights]) -> None:
        """One product has one input: other writers' files may not agree on its scales."""
        for field, stored in (("pre_scale", "pre_quant_scale"), ("input_scale", "input_scale")):
            first, *rest = (getattr(part, field) for part in parts)
            same = all(other is None if first is None else other is not None and first.equal(other) for other in rest)
            if not same:
                raise CheckpointError(
                    f"{', '.join(LINEAR_PARTS[name])} of layer {layer} have different {stored}s",
                    where=str(self.directory),
                    hint="these read one input and must share it; build the checkpoint with `trtkit build`",
                )

    def norms(self, layer: int) -> Norms:
        """The norm weights of a layer."""
        return norms_of(self.shards.tensor, self.spec, layer)

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """Scales of an 8-bit cache: a key is stored as k / scale. None where the checkpoint gives none."""
        prefix = f"{layer_prefix(layer)}self_attn."
        key, value = self._optional(f"{prefix}k_proj.k_scale"), self._optional(f"{prefix}v_proj.v_scale")
        return None if key is None or value is None else (float(key), float(value))

    def embedding(self) -> Tensor:
        """(V, H)."""
        return self.shards.tensor(EMBEDDING)

    def final_norm(self) -> Tensor:
        """(H,)."""
        return self.shards.tensor(FINAL_NORM)

    def lm_head(self) -> Tensor:
        """(V, H); the embedding when the model ties them."""
        return self.shards.tensor(EMBEDDING if self.spec.tied else LM_HEAD)

    def _optional(self, name: str) -> Tensor | None:
        return self.shards.tensor(name) if name in self.shards else None


def _share_scales(parts: list[LinearWeights]) -> list[LinearWeights]:
    """Parts of one fp8 product under one scale. Ours share it already; ModelOpt's own exports may not."""
    scales = torch.stack([part.weight.scale for part in parts if part.weight.scale is not None])
    inputs = torch.stack([part.input_scale for part in parts if part.input_scale is not None])
    if bool((scales == scales[0]).all()) and bool((inputs == inputs[0]).all()):
        return parts
    amax = scales.max() * FP8_MAX
    return [
        dataclasses.replace(part, weight=quantize_fp8(dequantize(part.weight), amax=amax), input_scale=inputs.max())
        for part in parts
    ]


def open_unified(directory: Path) -> UnifiedCheckpoint:
    """Open a checkpoint, reading headers only; a plain Hugging Face directory opens as scheme bf16.

    Raises :class:`CheckpointError` listing everything that is missing or damaged, :class:`ConfigError`,
    :class:`UnsupportedError` for formats that we do not know.
    """
    config = read_config(directory)
    quant = _quantization(directory, config)
    if quant is None:
        source = open_source(directory)
        return UnifiedCheckpoint(directory=directory, spec=source.spec, scheme=SCHEMES["bf16"], shards=source.shards)
    scheme = _scheme(directory, quant)
    spec = spec_from_config(config, where=str(directory / "config.json"))
    shards, problems = open_shards(directory)
    for name, (dtype, shape) in unified_layout(spec, scheme, pre_scale=scheme.name == "int8-sq").items():
        entry = shards.entries.get(name)
        if entry is None:
            problems.append(f"{name}: missing")
        elif entry.shape != shape:
            problems.append(f"{name}: shape {list(entry.shape)}, expected {list(shape)}")
        # bf16, fp16 and fp32 may stand for each other; codes and bytes may not.
        elif entry.dtype != dtype and not (entry.dtype in (floats := MODEL_DTYPES.values()) and dtype in floats):
            problems.append(f"{name}: dtype {entry.dtype}, expected {dtype}".replace("torch.", ""))
    raise_damaged(directory, problems)
    return UnifiedCheckpoint(directory=directory, spec=spec, scheme=scheme, shards=shards)


def _quantization(directory: Path, config: JsonObject) -> JsonObject | None:
    """The quantization section, from either place; None for an unquantized checkpoint."""
    path = directory / QUANT_FILE
    if path.is_file():
        section = read_json(path).get("quantization")
        if not isinstance(section, dict):
            raise ConfigError("has no 'quantization' section", where=str(path))
        return section
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else section
    if method != "modelopt":
        raise UnsupportedError(
            f"checkpoints quantized with {method!r} are not read",
            where=str(directory / "config.json"),
            hint="build from the original weights (bf16 or fp16)",
        )
    return dict(section)


def _scheme(directory: Path, quant: JsonObject) -> QuantScheme:
    algo, kv_algo = quant.get("quant_algo"), quant.get("kv_cache_quant_algo")
    schemes = {scheme.quant_algo: scheme for scheme in SCHEMES.values()}
    kv_dtypes: dict[str | None, Any] = {None: "model", **{value: key for key, value in _KV_ALGOS.items()}}
    wrong = []
    if not isinstance(algo, str | None) or algo not in schemes:
        wrong.append(f"quant_algo {algo!r}: known are {', '.join(str(name) for name in schemes)}")
    if not isinstance(kv_algo, str | None) or kv_algo not in kv_dtypes:
        wrong.append(f"kv_cache_quant_algo {kv_algo!r}: known are FP8, INT8, null")
    if algo == "W4A16_AWQ" and (quant.get("group_size") != 128 or quant.get("has_zero_point")):
        wrong.append("int4: only symmetric groups of 128 are known")
    if wrong:
        raise UnsupportedError("this quantization is not supported", where=str(directory), offenders=wrong)
    return dataclasses.replace(schemes[algo], kv_dtype=kv_dtypes[kv_algo])
