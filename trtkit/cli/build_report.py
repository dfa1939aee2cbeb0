"""How ``build`` and ``compile`` say what they have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from trtkit.cli.output import facts, finish
from trtkit.recipe import EngineManifest, output_layer_of

__all__ = ["report_built"]


def report_built(
    kind: Literal["engine", "bundle"], manifest: EngineManifest, directory: Path, next_step: str, as_json: bool
) -> None:
    """Print what was built and how good it is, and end the verb."""
    recipe, quality = manifest.recipe, manifest.quality
    shown = {
        "directory": str(directory), "precision": recipe.precision, "output layer": output_layer_of(recipe),
        "backend": manifest.backend,
    }  # fmt: skip
    document: dict[str, Any] = {
        f"{kind}_dir": str(directory), "precision": recipe.precision, "output_layer": output_layer_of(recipe),
        "backend": manifest.backend, "quality": None,
    }  # fmt: skip
    if manifest.backend == "tensorrt-llm":
        shown["for"] = f"{recipe.gpu}, {recipe.tensor_parallel} rank(s)"
        if recipe.tree is not None:
            rule = "temperature 0 only" if recipe.greedy else "sampling with the temperature"
            shown["ReDrafter"] = f"tree {recipe.tree}, {rule}"
        if "tensorrt-llm" in manifest.versions:
            shown["compiled by"] = f"TensorRT-LLM {manifest.versions['tensorrt-llm']}"
    elif recipe.tree is not None:
        shown["draft head"] = f"with the engine, tree {recipe.tree}"
    if quality is not None:
        shown["mean KL to bf16"] = f"{quality.kl_mean:.3g} nats over {quality.tokens:,} tokens"
        shown["top-1 agreement"] = f"{quality.top1_agreement:.2%}"
        shown["perplexity"] = f"{quality.perplexity:.4g} (bf16: {quality.perplexity_bf16:.4g})"
        if quality.worst_tensors:
            name, error = quality.worst_tensors[0]
            shown["worst tensor"] = f"{name}, relative error {error:.2%}"
        document["quality"] = {
            "tokens": quality.tokens, "kl_mean": quality.kl_mean, "top1_agreement": quality.top1_agreement,
            "perplexity": quality.perplexity, "perplexity_bf16": quality.perplexity_bf16,
            "worst_tensors": [list(pair) for pair in quality.worst_tensors],
        }  # fmt: skip
    facts(kind, shown)
    finish(next_step, document if as_json else None)
