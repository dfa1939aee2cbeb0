"""How our sampling parameters are said to TensorRT-LLM, and what an engine cannot do. Pure.

A ReDrafter engine samples inside its graph: it knows the temperature and the seed, and nothing else. A greedy one knows
not even the temperature. What cannot be done is refused, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.errors import UsageError
from trtkit.recipe import EngineManifest, Recipe
from trtkit.runtime.api import SamplingParams

__all__ = ["COLD", "EngineKind", "check_sampling", "executor_sampling", "kind_of", "notices", "notices_for"]

COLD = 0.01
"""Temperature that stands for 0 in a ReDrafter engine, which computes with its inverse."""
_SEED_BITS = 64
_MAX_TOP_K = 1024
"""The sampling kernel cuts a larger k down to this, with a warning alone (``layers/topKSamplingLayer.cu``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKind:
    """What decides how an engine samples."""

    redrafter: bool
    greedy: bool
    """Only with ReDrafter: the engine takes the likeliest token, whatever the request says."""


def kind_of(recipe: Recipe) -> EngineKind:
    """The kind of a tensorrt-llm engine by its recipe."""
    return EngineKind(redrafter=recipe.tree is not None, greedy=recipe.tree is not None and recipe.greedy)


def check_sampling(sampling: SamplingParams, kind: EngineKind, *, logprobs: bool = False) -> None:
    """Raise :class:`UsageError` listing everything in ``sampling`` that the engine cannot do."""
    if logprobs:
        raise UsageError(
            "tensorrt-llm engines report no log-probabilities here",
            hint="weigh votes by something else than confidence, or solve with the torch backend",
        )
    if sampling.switch is not None:
        raise UsageError(
            "tensorrt-llm engines cannot penalize thought switches: that changes logits between forward and sampling",
            hint="leave the penalty off, or solve with the torch backend",
        )
    if not kind.redrafter:
        if sampling.top_k > _MAX_TOP_K:
            raise UsageError(
                f"top-k {sampling.top_k}: tensorrt-llm engines know no more than {_MAX_TOP_K}",
                hint=f"use --top-k {_MAX_TOP_K}, or 0 for no cut",
            )
        return
    wrong = [
        f"{name} {value:g}: the engine samples inside its graph and cannot cut the distribution"
        for name, value, off in (
            ("top-p", sampling.top_p, 1.0), ("top-k", sampling.top_k, 0), ("min-p", sampling.min_p, 0.0),
        )
        if value != off
    ]  # fmt: skip
    if kind.greedy and sampling.temperature > 0:
        wrong.append(f"temperature {sampling.temperature:g}: the engine was built for temperature 0 (--greedy)")
    if wrong:
        temperature = "0" if kind.greedy else f"{sampling.temperature:g}"
        raise UsageError(
            "this ReDrafter engine cannot sample like that",
            offenders=wrong,
            hint=f"use --temperature {temperature} --top-p 1 --top-k 0 --min-p 0, an engine without a drafter, or the "
            "torch backend, whose drafter works with all of them",
        )


def executor_sampling(sampling: SamplingParams, seed: int, kind: EngineKind) -> dict[str, int | float]:
    """Keyword arguments of the executor's ``SamplingConfig``.

    Without ReDrafter top_k and top_p are always said: when both are left out the executor decodes greedily.
    """
    arguments: dict[str, int | float] = {"seed": seed % (1 << _SEED_BITS)}
    if kind.redrafter:
        return arguments if kind.greedy else {**arguments, "temperature": max(sampling.temperature, COLD)}
    if sampling.temperature == 0:
        return {**arguments, "top_k": 1}
    arguments |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return arguments | ({"min_p": sampling.min_p} if sampling.min_p > 0 else {})


def notices(kind: EngineKind) -> tuple[str, ...]:
    """What a user of the engine should know before a run."""
    if not kind.redrafter:
        return ()
    if kind.greedy:
        return (
            "this engine was built for temperature 0: samples of one prompt are nearly identical, so only different "
            "prompts (--prompt, repeated) make votes worth counting",
        )
    return (f"this ReDrafter engine samples with the temperature only; temperature 0 runs as {COLD}",)


def notices_for(manifest: EngineManifest, sampling: SamplingParams, *, logprobs: bool = False) -> tuple[str, ...]:
    """What to say before a run with this engine; nothing for torch. :class:`UsageError` when it cannot sample so."""
    if manifest.backend != "tensorrt-llm":
        return ()
    kind = kind_of(manifest.recipe)
    check_sampling(sampling, kind, logprobs=logprobs)
    return notices(kind)
