"""What a compiled TensorRT-LLM engine says of itself, and whether it can run on this machine."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import EngineError, MissingDependency
from trtkit.files import JsonObject, read_json
from trtkit.gpu import capability_text, cuda_device
from trtkit.recipe import COMPILED_DIR, EngineManifest
from trtkit.runtime.trtllm_sampling import EngineKind

__all__ = ["CompiledFacts", "check_host", "eos_ids", "read_facts"]

_AGAIN = "compile it again here: `trtkit compile BUNDLE` (engines are bound to version and GPU, bundles are not)"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFacts:
    """The parts of ``compiled/config.json`` that the runtime acts on."""

    vocab: int
    rows: int
    total_tokens: int
    """Longest prompt + output; the draft tokens that the builder added are taken off again."""
    tensor_parallel: int
    paged_context: bool
    kind: EngineKind


def read_facts(directory: Path, manifest: EngineManifest) -> CompiledFacts:
    """Read ``compiled/config.json``. Raises :class:`EngineError` when it is incomplete or contradicts the recipe."""
    path = directory / COMPILED_DIR / "config.json"
    config = read_json(path, EngineError)
    model, build = (_section(config, name, path) for name in ("pretrained_config", "build_config"))
    plugins = _section(build, "plugin_config", path)
    redrafter = str(model.get("architecture", "")).startswith("ReDrafter")
    needed = [(model, "vocab_size", int), (build, "max_batch_size", int), (build, "max_seq_len", int),
              (build, "max_draft_len", int), (plugins, "use_paged_context_fmha", bool)]  # fmt: skip
    if redrafter:
        needed.append((model, "redrafter_greedy_search", bool))
    wrong = [
        f"{name}: {section.get(name)!r} is no {kind.__name__}"
        for section, name, kind in needed
        if not isinstance(section.get(name), kind)
    ]
    tensor_parallel = _section(model, "mapping", path).get("tp_size")
    if tensor_parallel != manifest.recipe.tensor_parallel:
        wrong.append(f"tp_size {tensor_parallel}: the recipe says {manifest.recipe.tensor_parallel}")
    if redrafter != (manifest.recipe.tree is not None):
        wrong.append(f"architecture {model.get('architecture')}: the recipe's draft tree is {manifest.recipe.tree}")
    if wrong:
        raise EngineError("not the engine that engine.json speaks of", where=str(path), offenders=wrong,
                          hint="build it again")  # fmt: skip
    return CompiledFacts(
        vocab=model["vocab_size"],
        rows=build["max_batch_size"],
        total_tokens=min(build["max_seq_len"] - build["max_draft_len"], manifest.recipe.limits.total_tokens),
        tensor_parallel=manifest.recipe.tensor_parallel,
        paged_context=plugins["use_paged_context_fmha"],
        kind=EngineKind(redrafter=redrafter, greedy=redrafter and model["redrafter_greedy_search"]),
    )


def _section(config: JsonObject, name: str, path: Path) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise EngineError(f"has no section {name!r}", where=str(path), hint="build the engine again")
    return section


def eos_ids(directory: Path) -> frozenset[int]:
    """Ids that end a turn, by generation_config.json and the model's config.json; empty when neither says."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            listed = read_json(directory / name, EngineError).get("eos_token_id")
            ids += listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    return frozenset(ids)


def check_host(directory: Path, manifest: EngineManifest) -> None:
    """Raise unless this machine has the package version and the kind of GPU that the engine was compiled with."""
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency(
            "this engine runs on TensorRT-LLM, which is not installed",
            where=str(directory),
            hint=f"pip install 'tensorrt-llm=={manifest.versions.get('tensorrt-llm', '1.0.0')}' on a GPU host, or "
            "build with --backend torch",
        ) from None
    found = cuda_device()
    wrong = []
    built = manifest.versions.get("tensorrt-llm")
    if built != version:
        wrong.append(f"compiled by TensorRT-LLM {built}, installed is {version}")
    capability = manifest.versions.get("compute capability")
    here = None if found is None else capability_text(found[1])
    if here != capability:
        wrong.append(f"compiled for compute capability {capability}, this machine has {here or 'no GPU'}")
    if wrong:
        raise EngineError("this engine cannot run here", where=str(directory), offenders=wrong, hint=_AGAIN)
