"""``describe``: what a directory is, and whether it is whole. Reads headers only, unless asked to verify."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.bundled import PRACTICE, practice_dir
from trtkit.errors import CheckpointError, InputError, TrtkitError
from trtkit.files import JsonObject, digest_file, read_json
from trtkit.model_spec import read_model_spec, spec_as_dict
from trtkit.recipe import ENGINE_FILE, read_manifest

__all__ = ["Description", "describe", "model_dir"]

_HEADER_LIMIT = 100 << 20
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A directory in words and in data."""

    path: str
    kind: str
    facts: dict[str, str]
    """For people, in reading order."""
    data: dict[str, Any]
    """For machines."""
    offenders: tuple[str, ...] = ()
    """What is wrong with it."""
    verified: bool | None = None
    """Whether digests and contents held; None when that was not asked for or nothing recorded them."""


def model_dir(name: str) -> Path:
    """``practice`` or a directory as a path."""
    return practice_dir() if name == PRACTICE else Path(name)


def describe(directory: Path, *, verify: bool = False) -> Description:
    """What ``directory`` is. Raises :class:`InputError` when it is nothing that trtkit knows."""
    if not directory.exists():
        raise InputError("no such directory", where=str(directory))
    if not directory.is_dir():
        raise InputError("not a directory", where=str(directory), hint="pass the directory that holds the file")
    for marker, kind, look in _KINDS:
        if (directory / marker).is_file():
            facts, data = look(directory)
            break
    else:
        raise InputError(
            "neither a checkpoint nor an engine nor a run",
            where=str(directory),
            hint=f"expected one of: {', '.join(dict.fromkeys(marker for marker, _, _ in _KINDS))}",
        )
    if kind == "checkpoint" and "hidden_size" in data.get("drafter", {}):
        kind = "ReDrafter head"
    tensors, offenders = _tensors(directory)
    if tensors["files"]:
        formats = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in tensors["bytes_by_dtype"].items())
        facts["weights"] = f"{tensors['files']} file(s), {tensors['tensors']} tensors: {formats}"
    verified = None
    if verify:
        held, more = _verify(directory, data.get("digests", {}))
        offenders += more
        verified = held and not offenders
        facts["verified"] = "everything held" if verified else "NO" if offenders else "no digests recorded"
    return Description(
        path=str(directory), kind=kind, facts=facts, data={**data, "weights": tensors},
        offenders=tuple(offenders), verified=verified,
    )  # fmt: skip


def _look_at_engine(directory: Path) -> tuple[dict[str, str], JsonObject]:
    manifest = read_manifest(directory)
    recipe, limits = manifest.recipe, manifest.recipe.limits
    facts = {
        "model": recipe.model,
        "precision": f"{recipe.precision}, KV cache {recipe.kv_dtype}",
        "backend": f"{manifest.backend}, built for {recipe.gpu}, tensor parallel {recipe.tensor_parallel}",
        "drafter": f"tree {recipe.tree}" if recipe.tree else "none",
        "limits": f"{limits.batch} rows, {limits.prompt_tokens} prompt tokens, {limits.total_tokens} tokens in all",
        "built": manifest.created + "".join(f", {name} {v}" for name, v in manifest.versions.items()),
    }
    if manifest.quality is not None:
        q = manifest.quality
        facts["quality"] = (
            f"KL {q.kl_mean:.2g} nats, top-1 agreement {q.top1_agreement:.1%}, perplexity {q.perplexity:.4g} "
            f"(bf16 {q.perplexity_bf16:.4g}), over {q.tokens:,} tokens"
        )
    data: JsonObject = {"engine": read_json(directory / ENGINE_FILE), "digests": dict(manifest.checkpoint_digest)}
    if (directory / "config.json").is_file():
        more, spec = _spec_facts(directory)
        facts, data = {**facts, **more}, {**data, **spec}
    return facts, data


def _look_at_quantized(directory: Path) -> tuple[dict[str, str], JsonObject]:
    facts, data = _spec_facts(directory)
    quantization = read_json(directory / "hf_quant_config.json").get("quantization", {})
    algorithm = str(quantization.get("quant_algo")) if isinstance(quantization, dict) else "unknown"
    facts["precision"] = f"quant_algo {algorithm}, not calibrated into an engine yet"
    return facts, {**data, "quantization": quantization}


def _look_at_run(directory: Path) -> tuple[dict[str, str], JsonObject]:
    run = read_json(directory / "run.json")
    journal = directory / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
    facts = {"started": str(run.get("created", "unknown")), "journal": f"{lines} entries"}
    for name in ("problems", "engine"):
        if isinstance(run.get(name), dict):
            facts[name] = str(run[name].get("path"))
    data: JsonObject = {"run": run}
    if (directory / "summary.json").is_file():
        summary = read_json(directory / "summary.json")
        facts["result"] = f"{summary.get('answered')} of {summary.get('problems')} answered"
        if summary.get("accuracy") is not None:
            facts["result"] += f", accuracy {summary['accuracy']:.1%}"
        data["summary"] = summary
    else:
        facts["result"] = "not finished; the same `trtkit solve` command goes on from here"
    return facts, data


def _look_at_config(directory: Path) -> tuple[dict[str, str], JsonObject]:
    config = read_json(directory / "config.json")
    if "exit_dim" in config and "num_draft_layers" in config:
        names = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn")
        kept = {name: config.get(name) for name in names}
        return {name: str(value) for name, value in kept.items()}, {"drafter": kept}
    return _spec_facts(directory)


def _spec_facts(directory: Path) -> tuple[dict[str, str], JsonObject]:
    spec = read_model_spec(directory)
    amount = f"{spec.parameters / 1e9:.2f}B" if spec.parameters >= 1e9 else f"{spec.parameters / 1e6:.1f}M"
    facts = {
        "architecture": f"{spec.family}, {amount} parameters, {spec.dtype}",
        "shape": f"{spec.layers} layers, hidden {spec.hidden}, {spec.heads} heads / {spec.kv_heads} KV heads of "
        f"{spec.head_dim}, ffn {spec.intermediate}, vocabulary {spec.vocab}{', tied' if spec.tied else ''}",
        "positions": f"{spec.max_positions} ({spec.rope.kind} rope, theta {spec.rope.theta:g})",
        "KV cache": f"{spec.kv_bytes_per_token(2.0) / 1024:g} KiB per token in 16 bit",
    }
    return facts, {"spec": spec_as_dict(spec)}


_KINDS: tuple[tuple[str, str, Callable[[Path], tuple[dict[str, str], JsonObject]]], ...] = (
    (ENGINE_FILE, "engine", _look_at_engine),
    ("run.json", "run of trtkit solve", _look_at_run),
    ("hf_quant_config.json", "quantized checkpoint (unified HF layout)", _look_at_quantized),
    ("config.json", "checkpoint", _look_at_config),
)


def _tensors(directory: Path) -> tuple[JsonObject, list[str]]:
    """Counts over all safetensors headers, and what is wrong with the files."""
    by_dtype: dict[str, int] = {}
    count, offenders = 0, []
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        try:
            entries = _header(path)
        except TrtkitError as problem:
            offenders.append(str(problem))
            continue
        for entry in entries.values():
            count += 1
            size = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 0)
            by_dtype[entry["dtype"]] = by_dtype.get(entry["dtype"], 0) + size
    total = sum(path.stat().st_size for path in files)
    return {"files": len(files), "tensors": count, "bytes": total, "bytes_by_dtype": by_dtype}, offenders


def _header(path: Path) -> JsonObject:
    """The header of a safetensors file, held against the file's length."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError("truncated or not a safetensors file", where=str(path))
        raw = stream.read(length)
    try:
        header: JsonObject = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError("damaged safetensors header", where=str(path)) from None
    if 8 + length + end != size:
        missing = 8 + length + end - size
        said = f"truncated: {missing:,} bytes are missing" if missing > 0 else f"{-missing:,} bytes too many"
        raise CheckpointError(said, where=str(path))
    return header


def _verify(directory: Path, digests: dict[str, str]) -> tuple[bool, list[str]]:
    """Hold every recorded digest against the file. The first value is False when there is nothing to hold against."""
    offenders = []
    for name, expected in digests.items():
        path = directory / name
        if not path.is_file():
            offenders.append(f"{path}: missing")
        elif digest_file(path) != expected:
            offenders.append(f"{path}: the content is not what was built (SHA-256 differs)")
    return bool(digests), offenders
