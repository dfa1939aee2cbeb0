"""Unquantized Hugging Face checkpoints: where they are, whether they are whole, and their tensors on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from trtkit.bundled import PRACTICE, practice_dir
from trtkit.checkpoint.shards import Shards, open_shards, raise_damaged
from trtkit.decoder import Norms
from trtkit.errors import CheckpointError, HubError, InputError, UnsupportedError
from trtkit.files import JsonObject, read_json
from trtkit.known_models import known_hub_id
from trtkit.log import Progress
from trtkit.model_spec import ModelSpec, spec_from_config
from trtkit.quant.tensor import LinearWeights, dense

__all__ = [
    "EMBEDDING",
    "FINAL_NORM",
    "LM_HEAD",
    "HfCheckpoint",
    "check_finite",
    "expected_shapes",
    "finite_tensors",
    "layer_of",
    "layer_prefix",
    "narrow",
    "norms_of",
    "open_source",
    "read_config",
    "resolve_source",
    "snapshot_in",
]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
MODEL_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_TIED_VALUES = 1 << 24
"""Of each table at a time."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt")
_HUB_FILES = (*_TOKENIZER_FILES, "*.safetensors")

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def layer_prefix(layer: int) -> str:
    """``model.layers.N.``"""
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for the tables and the final norm."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def resolve_source(model: str, *, weights: bool = True) -> Path:
    """The directory of ``practice``, of a directory as given, or of a hub id (downloaded into the hub's cache).

    Without ``weights`` only what a tokenizer needs is downloaded.
    Raises :class:`HubError` or :class:`InputError` with what to pass instead.
    """
    if model == PRACTICE:
        return practice_dir()
    path = Path(model).expanduser()
    if path.is_dir():
        if (inside := snapshot_in(path)) is not None:
            raise InputError("is a folder of the hub's cache", where=model, hint=f"the checkpoint in it: {inside}")
        return path
    if path.is_file():
        raise InputError("is a file, not a checkpoint directory", where=model, hint=f"pass {path.parent}")
    if _HUB_ID.fullmatch(model) is None:
        raise InputError(
            "no such directory",
            where=model,
            hint=f"pass {known_hub_id(model) or 'a checkpoint directory, a hub id (owner/name), or practice'}",
        )
    return _download(model, _HUB_FILES if weights else _TOKENIZER_FILES)


def snapshot_in(directory: Path) -> Path | None:
    """The newest checkpoint in ``models--OWNER--NAME`` of the hub's cache, None for any other directory."""
    if (directory / "config.json").is_file():
        return None
    found = list(directory.glob("snapshots/*/config.json"))
    return max(found, key=lambda path: path.lstat().st_mtime_ns).parent if found else None


def _download(model: str, files: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def refused(reason: str, hint: str) -> HubError:
        return HubError(reason, where=model, hint=hint)

    instead = "pass a directory that holds the checkpoint (--model DIR), or --model practice"
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise refused(
            "this model is gated",
            f"accept its terms on the hub and log in with `hf auth login`, or {instead}",
        ) from None
    except errors.RepositoryNotFoundError:
        raise refused("the hub has no such model (or it is private)", f"check the spelling, or {instead}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise refused("the hub cannot be reached and the model is not in the local cache", instead) from None
    except (errors.HfHubHTTPError, OSError, ValueError) as problem:
        raise refused(f"the hub cannot be used: {problem}", instead) from None
    except Exception as problem:
        # The HTTP client's own errors: requests' before huggingface_hub 1.0, httpx's since.
        if type(problem).__module__.split(".")[0] not in ("requests", "httpx", "urllib3", "httpcore"):
            raise
        raise refused(f"the hub cannot be reached: {type(problem).__name__}", instead) from None


def read_config(directory: Path) -> JsonObject:
    """``config.json`` as it stands. Raises :class:`ConfigError`, or :class:`CheckpointError` for no directory."""
    if not directory.is_dir():
        said = "is a file, not a directory" if directory.exists() else "no such directory"
        raise CheckpointError(said, where=str(directory))
    path = directory / "config.json"
    if not path.exists():
        hint = f"`trtkit inspect {directory}` says what it is"
        raise CheckpointError("neither a checkpoint nor an engine (no config.json)", where=str(directory), hint=hint)
    return read_json(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class HfCheckpoint:
    """An unquantized checkpoint whose files, names, shapes and dtypes have been checked."""

    directory: Path
    spec: ModelSpec
    config: JsonObject
    """The original config.json."""
    shards: Shards

    def part(self, layer: int, part: str) -> LinearWeights:
        """One linear as stored, e.g. ``self_attn.q_proj``."""
        name = f"{layer_prefix(layer)}{part}"
        bias = self.shards.tensor(f"{name}.bias") if f"{name}.bias" in expected_layer(self.spec, layer) else None
        return LinearWeights(weight=dense(self.shards.tensor(f"{name}.weight")), bias=bias)

    def norms(self, layer: int) -> Norms:
        """The norm weights of a layer."""
        return norms_of(self.shards.tensor, self.spec, layer)


def norms_of(tensor: Callable[[str], Tensor], spec: ModelSpec, layer: int) -> Norms:
    """The norm weights of a layer, by full name from ``tensor``: (H,) each, q and k (D,) for Qwen3."""

    def get(name: str) -> Tensor:
        return tensor(f"{layer_prefix(layer)}{name}.weight")

    return Norms(
        input=get("input_layernorm"),
        post=get("post_attention_layernorm"),
        q=get("self_attn.q_norm") if spec.qk_norm else None,
        k=get("self_attn.k_norm") if spec.qk_norm else None,
    )


def expected_layer(spec: ModelSpec, layer: int) -> Shapes:
    """Names and shapes of one layer's tensors, in the order in which they are used."""
    prefix = layer_prefix(layer)
    shapes: Shapes = {f"{prefix}input_layernorm.weight": (spec.hidden,)}
    for part, shape in spec.linear_shapes.items():
        if part == "mlp.gate_proj":
            shapes[f"{prefix}post_attention_layernorm.weight"] = (spec.hidden,)
        shapes[f"{prefix}{part}.weight"] = shape
        if spec.qkv_bias and part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            shapes[f"{prefix}{part}.bias"] = (shape[0],)
        if spec.qk_norm and part == "self_attn.v_proj":
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (spec.head_dim,) for name in "qk"}
    return shapes


def expected_shapes(spec: ModelSpec) -> Shapes:
    """Names and shapes of every tensor that a checkpoint of this architecture must hold."""
    shapes: Shapes = {EMBEDDING: (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= expected_layer(spec, layer)
    shapes[FINAL_NORM] = (spec.hidden,)
    if not spec.tied:
        shapes[LM_HEAD] = (spec.vocab, spec.hidden)
    return shapes


def open_source(directory: Path) -> HfCheckpoint:
    """Open an unquantized checkpoint, reading headers only.

    Raises :class:`CheckpointError` that lists everything missing, truncated, misshapen or of a wrong dtype,
    :class:`ConfigError` and :class:`UnsupportedError` for its config.json.
    """
    config = read_config(directory)
    if config.get("quantization_config") is not None or (directory / "hf_quant_config.json").is_file():
        raise UnsupportedError(
            "this checkpoint is already quantized",
            where=str(directory),
            hint="build from the original weights (bf16 or fp16)",
        )
    spec = spec_from_config(config, where=str(directory / "config.json"))
    shards, problems = open_shards(directory)
    allowed = tuple(MODEL_DTYPES.values())
    for name, shape in expected_shapes(spec).items():
        entry = shards.entries.get(name)
        if entry is None:
            # A damaged file has been reported as such; its tensors need no line each.
            if not problems or not any(".safetensors: " in text for text in problems):
                problems.append(f"{name}: missing")
        elif entry.shape != shape:
            problems.append(f"{name}: shape {list(entry.shape)}, config.json implies {list(shape)}")
        elif entry.dtype not in allowed:
            problems.append(f"{name}: dtype {str(entry.dtype).removeprefix('torch.')}, expected a 16- or 32-bit float")
    raise_damaged(directory, problems)
    return HfCheckpoint(directory=directory, spec=spec, config=config, shards=shards)


def check_finite(source: HfCheckpoint) -> None:
    """Read all weights once; raises :class:`CheckpointError` as :func:`finite_tensors` does."""
    total = sum(source.shards.entries[name].nbytes for name in expected_shapes(source.spec))
    with Progress("check weights", total=-(-total // 1_000_000), unit="MB") as progress:
        done = 0
        for _, tensor in finite_tensors(source):
            done += tensor.nbytes
            progress.advance(-(-done // 1_000_000) - progress.done)


def finite_tensors(source: HfCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, in the order of :func:`expected_shapes`: the two tables in flat blocks, the others whole.

    Nothing follows the first value that is NaN or Inf, or would be in the model's dtype, which a file may be wider
    than: the rest is only read, and :class:`CheckpointError` names every tensor that has one. It also tells of an
    lm_head of its own where config.json says that there is none.
    """
    bad: dict[str, int] = {}
    dtype = MODEL_DTYPES[source.spec.dtype]
    for name, tensor in _tensors(source):
        found = _not_finite(tensor, dtype)
        if found:
            bad[name] = bad.get(name, 0) + found
        if not bad:
            yield name, tensor
    problems = []
    for name, count in bad.items():
        stored = source.shards.entries[name].dtype
        wider = "" if stored == dtype else f" in {source.spec.dtype}, the dtype of config.json; the file has {stored}"
        problems.append(f"{name}: {count} value(s) are NaN or Inf{wider.replace('torch.', '')}")
    raise_damaged(source.directory, problems, "the weights are not finite")
    _check_tied(source)


def _tensors(source: HfCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for name in expected_shapes(source.spec):
        if name in (EMBEDDING, LM_HEAD):
            yield from ((name, block) for block in source.shards.blocks(name))
        else:
            yield name, source.shards.tensor(name)


def _check_tied(source: HfCheckpoint) -> None:
    """Savers may store tied tables twice. Where the two differ, transformers 5 takes the second, while transformers 4,
    vLLM and we take the first: one of them runs another model."""
    entries, dtype = source.shards.entries, MODEL_DTYPES[source.spec.dtype]
    if not source.spec.tied or LM_HEAD not in entries:
        return
    same = entries[LM_HEAD].shape == entries[EMBEDDING].shape and all(
        torch.equal(one.to(dtype), other.to(dtype))
        for one, other in zip(
            *(source.shards.blocks(name, _TIED_VALUES * entries[name].dtype.itemsize) for name in (EMBEDDING, LM_HEAD)),
            strict=True,
        )
    )
    if not same:
        raise CheckpointError(
            "config.json ties lm_head to the embeddings, and the files have an lm_head with other values",
            where=str(source.directory),
            hint="readers differ in which of the two they take: set tie_word_embeddings to false in config.json, or "
            "take lm_head.weight out of the files",
        )


def _not_finite(tensor: Tensor, dtype: torch.dtype) -> int:
    """How many values are NaN or Inf in ``dtype``. Both survive min and max, and rounding keeps the order: three times
    faster than isfinite over everything."""
    if not tensor.numel() or torch.isfinite(torch.stack(torch.aminmax(tensor)).to(dtype).float()).all():
        return 0
    return int((~torch.isfinite(tensor.to(dtype))).sum())


def narrow(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in ``dtype``. Raises :class:`CheckpointError` when values are not finite, or do not fit."""
    if _not_finite(tensor, dtype):
        if _not_finite(tensor, tensor.dtype):
            raise CheckpointError("holds values that are NaN or Inf", where=name, hint="get the weights again")
        raise CheckpointError(
            f"holds values that {str(dtype).removeprefix('torch.')} cannot represent", where=name, hint="use bfloat16"
        )
    return tensor.to(dtype)
