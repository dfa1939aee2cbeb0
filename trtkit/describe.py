"""``describe``: what a directory is, and whether it is whole. Reads headers only, unless asked to verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drafter.checkpoint import WEIGHTS_FILE, DrafterError, load_drafter, stored_sizes, weights_file
from trtkit.build.draft_head import PLAN_FILE
from trtkit.bundled import PRACTICE, practice_dir
from trtkit.checkpoint.compressed_export import EXPORTED_BY
from trtkit.checkpoint.hf import check_finite, open_source, snapshot_in
from trtkit.checkpoint.names import rank_file
from trtkit.checkpoint.shards import Entry, open_shards, read_header
from trtkit.checkpoint.trtllm_parse import read_trtllm_config
from trtkit.checkpoint.trtllm_reader import is_trtllm, open_trtllm
from trtkit.checkpoint.unified import open_unified
from trtkit.checkpoint.verify import verify_engine
from trtkit.difficulty import DIFFICULTY_FILE
from trtkit.errors import CheckpointError, InputError, UsageError
from trtkit.files import JsonObject, read_json
from trtkit.model_spec import read_model_spec, spec_as_dict
from trtkit.recipe import BUNDLE_FILE, COMPILED_DIR, ENGINE_FILE, output_layer_of, read_manifest
from trtkit.solve.run_head import JOURNAL_FILE, RUN_FILE, engine_told, read_head, read_summary
from trtkit.training.standing import look_at_training

__all__ = [
    "BUNDLE",
    "CHECKPOINT",
    "DIFFICULTY",
    "DRAFTER",
    "ENGINE",
    "FOREIGN",
    "QUANTIZED",
    "RUN",
    "TRAINING",
    "TRTLLM",
    "Description",
    "describe",
    "model_dir",
]

ENGINE = "engine"
CHECKPOINT = "checkpoint"
QUANTIZED = "quantized checkpoint (unified HF layout)"
FOREIGN = "quantized checkpoint (for other servers)"
TRTLLM = "TensorRT-LLM checkpoint"
BUNDLE = "bundle for trtkit compile"
RUN = "run of trtkit solve"
DRAFTER = "ReDrafter head"
DIFFICULTY = "difficulty regressor"
TRAINING = "unfinished training of a draft head"


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
    """Whether everything held; None when that was not asked for."""


def model_dir(name: str) -> Path:
    """``practice`` or a directory as a path."""
    return practice_dir() if name == PRACTICE else Path(name)


def describe(directory: Path, *, verify: bool = False) -> Description:
    """What ``directory`` is. Raises :class:`InputError` when it is nothing that trtkit knows, :class:`UsageError` when
    there is nothing that it can be verified by."""
    if not directory.is_dir():
        said = "not a directory" if directory.exists() else "no such directory"
        raise InputError(said, where=str(directory), hint="pass a checkpoint, engine or run directory, or 'practice'")
    kind, look = next(((k, look) for mark, k, look in _KINDS if (directory / mark).is_file()), ("", None))
    if look is None:
        inside = snapshot_in(directory)
        raise InputError(
            "neither a checkpoint nor an engine nor a run",
            where=str(directory),
            hint=f"a checkpoint in it: {inside}"
            if inside
            else f"expected one of: {', '.join(m for m, _, _ in _KINDS)}",
        )
    facts, data = look(directory)
    kind = DRAFTER if "drafter" in data else FOREIGN if "quant_method" in data else kind
    kind = QUANTIZED if kind == CHECKPOINT and "quantization" in data else kind  # its config.json alone says so
    if verify and kind in _UNVERIFIED:
        what, instead = _UNVERIFIED[kind]
        raise UsageError(f"--verify: {what} to verify", where=str(directory), hint=f"leave it out; {instead}")
    offenders: list[str] = []
    verified = None
    if kind not in _UNVERIFIED or kind == FOREIGN:
        data["weights"], offenders = (_head_weights if kind == DRAFTER else _weights)(directory)
        sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in data["weights"]["by_dtype"].items())
        facts["weights"] = f"{data['weights']['files']} file(s), {data['weights']['tensors']} tensors: {sizes}"
    if verify:
        offenders += [text for text in _verify(directory, kind) if text not in offenders]
        verified = not offenders
        facts["verified"] = _HELD[kind] if verified else "NO, see below"
    return Description(
        path=str(directory), kind=kind, facts=facts, data=data, offenders=tuple(offenders), verified=verified
    )


def _look_at_bundle(directory: Path) -> tuple[dict[str, str], JsonObject]:
    return _look_at_engine(directory, BUNDLE_FILE)


def _look_at_engine(directory: Path, name: str = ENGINE_FILE) -> tuple[dict[str, str], JsonObject]:
    manifest = read_manifest(directory, name)
    recipe, limits = manifest.recipe, manifest.recipe.limits
    facts = {
        "model": recipe.model,
        "precision": f"{recipe.precision}, KV cache {recipe.kv_dtype}, output layer {output_layer_of(recipe)}",
        "backend": f"{manifest.backend}, built for {recipe.gpu}, tensor parallel {recipe.tensor_parallel}",
        "drafter": f"tree {recipe.tree}" if recipe.tree else "none",
        "limits": f"{limits.batch} rows, {limits.prompt_tokens} prompt tokens, {limits.total_tokens} in all",
        "built": manifest.created + "".join(f", {name} {v}" for name, v in manifest.versions.items()),
    }
    if manifest.quality is not None:
        q = manifest.quality
        facts["quality"] = (
            f"KL {q.kl_mean:.2g} nats, top-1 agreement {q.top1_agreement:.1%}, perplexity {q.perplexity:.4g} "
            f"(bf16 {q.perplexity_bf16:.4g}), over {q.tokens:,} tokens"
        )
    data: JsonObject = {"engine": read_json(directory / name)}
    if (directory / "config.json").is_file():
        more, spec = _spec_facts(directory)
        facts, data = {**facts, **more}, {**data, **spec}
        positions = spec["spec"]["max_positions"]
        if positions < limits.total_tokens:
            facts["limits"] += f" (the model has {positions} positions)"
    return facts, data


def _look_at_quantized(directory: Path) -> tuple[dict[str, str], JsonObject]:
    facts, data = _spec_facts(directory)
    quantization = read_json(directory / "hf_quant_config.json").get("quantization", {})
    algorithm = str(quantization.get("quant_algo")) if isinstance(quantization, dict) else "unknown"
    facts["precision"] = f"quant_algo {algorithm}"
    return facts, {**data, "quantization": quantization}


def _look_at_trtllm(directory: Path) -> tuple[dict[str, str], JsonObject]:
    facts, data = _spec_facts(directory)
    config = read_trtllm_config(directory)
    options = config.options
    facts["precision"] = config.scheme.told
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    facts["ranks"] = f"{options.world_size}: tensor parallel {tensor}, pipeline parallel {pipeline}"
    facts["drafter"] = f"ReDrafter, tree {config.tree}{', greedy' if config.greedy else ''}" if config.head else "none"
    data["trtllm"] = {
        "quant_algo": config.scheme.quant_algo, "kv_dtype": config.scheme.kv_dtype, "greedy": config.greedy,
        "tensor_parallel": tensor, "pipeline_parallel": pipeline,
        "tree": str(config.tree) if config.tree else None,
    }  # fmt: skip
    return facts, data


def _look_at_run(directory: Path) -> tuple[dict[str, str], JsonObject]:
    run, summary = read_head(directory), read_summary(directory)
    journal = directory / JOURNAL_FILE
    lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
    facts = {"started": str(run.get("created", "unknown")), "journal": f"{lines} entries"}
    if isinstance(run.get("problems"), dict):
        facts["problems"] = str(run["problems"].get("path"))
    if isinstance(run.get("engine"), dict):
        facts["engine"] = str(engine_told(run))
    data: JsonObject = {"run": run}
    if summary:
        facts["result"] = f"{summary.get('answered')} of {summary.get('problems')} answered"
        if summary.get("accuracy") is not None:
            facts["result"] += f", accuracy {summary['accuracy']:.1%}"
        data["summary"] = summary
    else:
        goes_on = "the same `trtkit solve` command" if "problems" in run else "a session on this directory"
        facts["result"] = f"not finished; {goes_on} goes on from here"
    return facts, data


def _look_at_difficulty(directory: Path) -> tuple[dict[str, str], JsonObject]:
    found = read_json(directory / DIFFICULTY_FILE)
    facts = {"problems": str(found.get("problems")), "usable": "yes" if found.get("usable") else "no"}
    return facts, {"difficulty": found}


def _look_at_config(directory: Path) -> tuple[dict[str, str], JsonObject]:
    config = read_json(directory / "config.json")
    if "exit_dim" in config and "num_draft_layers" in config:
        names = ("hidden_size", "vocab_size", "exit_dim", "num_draft_layers", "rnn")
        kept = {name: config.get(name) for name in names}
        return {name: str(value) for name, value in kept.items()}, {"drafter": kept}
    facts, data = _spec_facts(directory)
    section = config.get("quantization_config")
    if section is None:
        return facts, data
    method = section.get("quant_method") if isinstance(section, dict) else section
    if method == "modelopt":
        facts["precision"] = f"quant_algo {section.get('quant_algo')}"
        return facts, {**data, "quantization": section}
    facts["quantized"] = f"{method}{', by ' + str(config[EXPORTED_BY]) if EXPORTED_BY in config else ''}"
    return facts, {**data, "quant_method": method}


def _spec_facts(directory: Path) -> tuple[dict[str, str], JsonObject]:
    spec = read_trtllm_config(directory).spec if is_trtllm(directory) else read_model_spec(directory)
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
    (ENGINE_FILE, ENGINE, _look_at_engine),
    (BUNDLE_FILE, BUNDLE, _look_at_bundle),
    (RUN_FILE, RUN, _look_at_run),
    (rank_file(0), TRTLLM, _look_at_trtllm),
    ("hf_quant_config.json", QUANTIZED, _look_at_quantized),
    (DIFFICULTY_FILE, DIFFICULTY, _look_at_difficulty),
    ("config.json", CHECKPOINT, _look_at_config),
    (PLAN_FILE, TRAINING, look_at_training),
)
_HELD = {
    ENGINE: "every file has the digest it was built with",
    BUNDLE: "every file has the digest it was prepared with",
    TRTLLM: "all ranks hold the tensors that config.json implies, and no others",
    QUANTIZED: "all tensors are there, with the shapes that config.json implies",
    CHECKPOINT: "all tensors are there, with the shapes that config.json implies, and every value is finite",
    DRAFTER: "all tensors are there, with the shapes that config.json implies, and every value is finite",
    DIFFICULTY: "every weight file is whole, and every value is finite",
}
"""What ``verified`` means."""
_UNVERIFIED = {
    RUN: ("a run has neither digests nor tensors", "`trtkit report RUN` reads it and says what in it is damaged"),
    TRAINING: ("there is no head yet", "the next: line goes on with the training"),
    FOREIGN: ("it has no digests, and its codes are not ours", "its server reads it whole"),
}


def _weights(directory: Path) -> tuple[JsonObject, list[str]]:
    """Counts over the headers of all weight files, and what is wrong with the files."""
    if (directory / COMPILED_DIR).is_dir():
        sizes = [path.stat().st_size for path in (directory / COMPILED_DIR).glob("rank*.engine")]
        return {"files": len(sizes), "tensors": 0, "bytes": sum(sizes), "by_dtype": {"compiled": sum(sizes)}}, []
    if (directory / BUNDLE_FILE).is_file():
        directory = directory / "checkpoint"
    if is_trtllm(directory):
        entries, offenders = _rank_entries(directory)
    else:
        shards, offenders = open_shards(directory)
        entries = list(shards.entries.values())
    return _counted(
        len({entry.path for entry in entries}), [(entry.dtype, entry.nbytes) for entry in entries]
    ), offenders


def _head_weights(directory: Path) -> tuple[JsonObject, list[str]]:
    """``_weights`` of a draft head, which may lie in a ``model.pt``."""
    try:
        path = weights_file(directory)
        if path.name == WEIGHTS_FILE:
            return _weights(directory)
        return _counted(1, stored_sizes(directory)), []
    except DrafterError as problem:
        raise CheckpointError(str(problem)) from None


def _counted(files: int, tensors: Sequence[tuple[torch.dtype, int]]) -> JsonObject:
    by_dtype: dict[str, int] = {}
    for dtype, nbytes in tensors:
        name = str(dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + nbytes
    total = sum(by_dtype.values())
    return {"files": files, "tensors": len(tensors), "bytes": total, "by_dtype": by_dtype}


def _rank_entries(directory: Path) -> tuple[list[Entry], list[str]]:
    """The tensors of every rank file, which share their names."""
    entries: list[Entry] = []
    offenders: list[str] = []
    for path in sorted(directory.glob("rank*.safetensors")):
        try:
            entries += read_header(path).values()
        except CheckpointError as problem:
            offenders.append(f"{path.name}: {problem.message}")
    return entries, offenders


def _verify(directory: Path, kind: str) -> tuple[str, ...]:
    """Read everything; what is wrong with it."""
    try:
        if kind in (ENGINE, BUNDLE):
            verify_engine(directory, ENGINE_FILE if kind == ENGINE else BUNDLE_FILE)
        elif kind == TRTLLM:
            open_trtllm(directory)
        elif kind == QUANTIZED:
            open_unified(directory)
        elif kind == CHECKPOINT:
            check_finite(open_source(directory))
        elif kind == DRAFTER:
            load_drafter(directory, dtype=torch.bfloat16, device=torch.device("cpu"))
        elif kind == DIFFICULTY:
            return tuple(_not_finite(directory))
    except CheckpointError as problem:
        return problem.offenders or (problem.message,)
    except DrafterError as problem:
        return (str(problem),)
    return ()


def _not_finite(directory: Path) -> Iterator[str]:
    """Tensors with NaN or Inf, where no config.json of ours says which tensors there must be."""
    shards, _ = open_shards(directory)
    for name in shards.entries:
        tensor = shards.tensor(name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield f"{name}: holds values that are NaN or Inf"
