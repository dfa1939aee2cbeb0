"""``Recipe`` and ``EngineManifest``: what to build, and what was built. Versioned, and strict about unknown keys.

A recipe is TOML (``engines/recipes/*.toml``), a manifest is the ``engine.json`` of an engine directory.
"""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from drafter.config import TreeShape
from trtkit.errors import ConfigError, EngineError, TrtkitError, UsageError
from trtkit.files import JsonObject, nearest, read_json, read_toml, write_json, write_toml
from trtkit.scheme import SCHEMES, KvDtype, OutputLayer

__all__ = [
    "BUNDLE_FILE",
    "COMPILED_DIR",
    "DRAFTER_DIR",
    "ENGINE_FILE",
    "FORMAT_VERSION",
    "TOKEN_ORDER_FILE",
    "TRAINING_FILE",
    "Backend",
    "EngineManifest",
    "Limits",
    "Quality",
    "Recipe",
    "default_output_layer",
    "output_layer_of",
    "read_manifest",
    "read_recipe",
    "settled",
    "write_manifest",
    "write_recipe",
]

FORMAT_VERSION = 1
ENGINE_FILE = "engine.json"
BUNDLE_FILE = "bundle.json"
"""The manifest of a bundle: prepared for TensorRT-LLM, not compiled yet."""
DRAFTER_DIR = "drafter"
"""Where an engine directory keeps its draft head."""
COMPILED_DIR = "compiled"
"""Where a tensorrt-llm engine directory keeps what TensorRT-LLM wrote."""
TRAINING_FILE = "training.json"
"""Beside a draft head: what it was trained for and on."""
TOKEN_ORDER_FILE = "token_order.safetensors"
"""Beside a draft head: all token ids, the most frequent one of its training text first."""
Backend: TypeAlias = Literal["torch", "tensorrt-llm"]
_INT8_OUTPUT = ("int8", "int8-sq", "int4")
_DAMAGED = "build it again with `trtkit build`, or copy the file again from where it was built"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest batch and lengths that the engine is built for."""

    batch: int = 64
    prompt_tokens: int = 2048
    total_tokens: int = 16384
    """Prompt and output together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The only input of a build."""

    model: str
    """Hub id, directory, or ``practice``."""
    precision: str
    gpu: str = "cpu"
    kv_dtype: KvDtype = "model"
    backend: Backend = "torch"
    tensor_parallel: int = 1
    limits: Limits = field(default_factory=Limits)
    tree: TreeShape | None = None
    """The draft tree; None without a drafter."""
    greedy: bool = False
    """tensorrt-llm with a drafter: an engine for temperature 0 only. Otherwise it samples, with a temperature alone."""
    int4_method: Literal["awq", "rtn"] = "awq"
    output_layer: Literal["auto", "model", "int8"] = "auto"
    """How lm_head runs: in the model's dtype, or from int8 codes that the torch runtime makes when it opens the engine.
    ``auto`` is for a build to settle; engine.json has one of the others."""
    smooth_alpha: float = 0.5
    """SmoothQuant: how much of the activation range moves into the weights (0..1), int8-sq only."""
    calibrator: Literal["trtkit", "modelopt"] = "trtkit"
    calibration_rows: int = 128
    calibration_tokens: int = 512
    """Longest row used for calibration."""

    def __post_init__(self) -> None:
        wrong = []
        if self.precision not in SCHEMES:
            wrong.append(
                f"precision {self.precision!r}{nearest(self.precision, SCHEMES)} (one of {', '.join(SCHEMES)})"
            )
        if self.tensor_parallel < 1:
            wrong.append(f"tensor_parallel {self.tensor_parallel}: must be at least 1")
        if not 0 <= self.smooth_alpha <= 1:
            wrong.append(f"smooth_alpha {self.smooth_alpha}: must lie in 0..1")
        for name in ("batch", "prompt_tokens", "total_tokens"):
            if getattr(self.limits, name) < 1:
                wrong.append(f"limits.{name}: must be at least 1")
        if self.limits.prompt_tokens > self.limits.total_tokens:
            wrong.append("limits.prompt_tokens exceeds limits.total_tokens")
        if self.calibration_rows < 1 or self.calibration_tokens < 1:
            wrong.append("calibration_rows and calibration_tokens: must be at least 1")
        if wrong:
            raise ConfigError("not a valid recipe", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The quantized model against the bf16 one on held-out text."""

    tokens: int
    kl_mean: float
    """Mean over tokens of KL(bf16 || quantized), nats."""
    top1_agreement: float
    perplexity: float
    perplexity_bf16: float
    worst_tensors: tuple[tuple[str, float], ...]
    """The largest relative weight errors ||W - Q|| / ||W||, worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest:
    """``engine.json``: what this directory holds and where it came from."""

    recipe: Recipe
    backend: Backend
    versions: Mapping[str, str]
    checkpoint_digest: Mapping[str, str]
    """SHA-256 of every weight and tokenizer file, by file name."""
    quality: Quality | None
    created: str
    """UTC, ISO 8601."""
    flags: Mapping[str, str] | None = None
    """tensorrt-llm: what the engine was compiled with, by the names of ``trtllm-build``."""


def default_output_layer(precision: str, backend: Backend) -> OutputLayer:
    """What ``auto`` stands for: int8 with integer weights on the torch backend, where lm_head in 16 bits would be the
    largest part of what an int4 step reads; the model's dtype otherwise, and always in compiled engines."""
    return "int8" if backend == "torch" and precision in _INT8_OUTPUT else "model"


def output_layer_of(recipe: Recipe) -> OutputLayer:
    """The output layer that an engine of ``recipe`` runs."""
    if recipe.output_layer == "auto":
        return default_output_layer(recipe.precision, recipe.backend)
    return recipe.output_layer


def settled(recipe: Recipe) -> Recipe:
    """``recipe`` with the output layer that it stands for in place of ``auto``.

    Raises :class:`UsageError` for int8 with the tensorrt-llm backend.
    """
    if recipe.backend == "tensorrt-llm" and recipe.output_layer == "int8":
        raise UsageError(
            "--output-layer int8: a compiled engine keeps lm_head in 16 bits",
            hint="leave it out, or build with --backend torch",
        )
    return dataclasses.replace(recipe, output_layer=output_layer_of(recipe))


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Raises :class:`ConfigError` naming every unknown key."""
    return _versioned(read_toml(path), Recipe, where=str(path), error=ConfigError)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a TOML recipe that :func:`read_recipe` reads back equal."""
    write_toml(path, {"version": FORMAT_VERSION, **_to_data(recipe)})


def read_manifest(directory: Path, name: str = ENGINE_FILE) -> EngineManifest:
    """Read ``engine.json`` of an engine directory. Raises :class:`EngineError`."""
    path = directory / name
    if not path.is_file():
        lack = "no engine.json" if directory.is_dir() else "a file" if directory.exists() else "no such directory"
        hint = "build one with `trtkit build`, or ask `trtkit inspect` what this directory is"
        there = [(directory / other).is_file() for other in ("config.json", "tokenizer.json", "hf_quant_config.json")]
        if there == [True, True, False]:
            hint = f"a checkpoint is built first: trtkit build --model {shlex.quote(str(directory))}"
        raise EngineError(f"not an engine directory ({lack})", where=str(directory), hint=hint)
    try:
        data = read_json(path, EngineError)
        if isinstance(data.get("recipe"), dict):
            # Engines built before there was a choice were judged with lm_head in the model's dtype, and keep it.
            data["recipe"].setdefault("output_layer", "model")
        return _versioned(data, EngineManifest, where=str(path), error=EngineError)
    except EngineError as problem:
        raise EngineError(
            problem.message, where=problem.where, offenders=problem.offenders, hint=problem.hint or _DAMAGED
        ) from None


def write_manifest(directory: Path, manifest: EngineManifest, name: str = ENGINE_FILE) -> None:
    """Write ``engine.json``, or a manifest under another name."""
    write_json(directory / name, {"version": FORMAT_VERSION, **_to_data(manifest)})


def _versioned(data: JsonObject, kind: type[T], *, where: str, error: type[TrtkitError]) -> T:
    version = data.pop("version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise error(f"no usable format version (found {version!r})", where=where)
    if version > FORMAT_VERSION:
        raise error(
            f"format version {version} is newer than this trtkit understands ({FORMAT_VERSION})",
            where=where,
            hint="upgrade trtkit, or build again with this version",
        )
    offenders: list[str] = []
    value = _from_data(data, kind, "", offenders)
    if offenders:
        raise error("cannot be read", where=where, offenders=offenders)
    assert isinstance(value, kind)
    return value


def _to_data(value: Any) -> Any:
    """Dataclasses to plain data; None is left out because TOML has no null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _to_data(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {key: _to_data(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_to_data(item) for item in value]
    return value


def _from_data(data: Any, kind: Any, path: str, offenders: list[str]) -> Any:
    """Plain data to the annotated type; complaints are collected with their dotted path."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        chosen = next(arg for arg in args if arg is not type(None))
        return None if data is None else _from_data(data, chosen, path, offenders)
    if origin is Literal:
        if data not in args:
            offenders.append(f"{path}: {data!r} is not one of {', '.join(map(repr, args))}")
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass_from(data, kind, path, offenders)
    if origin is tuple:
        if not isinstance(data, list):
            offenders.append(f"{path}: expected a list")
            return ()
        inner = [args[0]] * len(data) if args[-1] is Ellipsis else args
        if len(data) != len(inner):
            offenders.append(f"{path}: expected {len(inner)} values, found {len(data)}")
            return ()
        return tuple(_from_data(item, arg, path, offenders) for item, arg in zip(data, inner, strict=True))
    if origin is not None:  # Mapping[str, ...]
        if not isinstance(data, dict):
            offenders.append(f"{path}: expected a table")
            return {}
        return {key: _from_data(item, args[1], f"{path}.{key}", offenders) for key, item in data.items()}
    accepted = (int, float) if kind is float else kind
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        offenders.append(f"{path}: expected {kind.__name__}, found {data!r}")
        return data
    return kind(data)


def _dataclass_from(data: Any, kind: Any, path: str, offenders: list[str]) -> Any:
    if not isinstance(data, dict):
        offenders.append(f"{path or 'file'}: expected a table, found {type(data).__name__}")
        return None
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    offenders += [f"{prefix}{key}: unknown key{nearest(key, hints)}" for key in data if key not in hints]
    before = len(offenders)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name in data:
            values[item.name] = _from_data(data[item.name], hints[item.name], prefix + item.name, offenders)
        elif type(None) in typing.get_args(hints[item.name]):
            values[item.name] = None
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            offenders.append(f"{prefix}{item.name}: missing")
    if len(offenders) > before:
        return None
    try:
        return kind(**values)
    except TrtkitError as problem:
        offenders += [f"{prefix}{text}" for text in (problem.offenders or (problem.message,))]
    except ValueError as problem:  # the draft tree's, which is no class of ours
        offenders.append(f"{path or 'file'}: {problem}")
    return None
