"""``trtkit build``: checkpoint to engine directory."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from trtkit.bundled import PRACTICE
from trtkit.cli.engines import BUILT
from trtkit.cli.options import Json, Model, Out, tree_named
from trtkit.cli.output import facts, finish
from trtkit.errors import UnsupportedError, UsageError
from trtkit.files import nearest
from trtkit.gpu import profile_named
from trtkit.plan import check_precision
from trtkit.recipe import Limits, Recipe
from trtkit.scheme import SCHEMES, KvDtype, scheme_named

_BACKENDS = ("torch", "tensorrt-llm")


def command(
    precision: Annotated[str, typer.Option("--precision", "-p", help=f"One of: {', '.join(SCHEMES)}.")] = "fp8",
    model: Model = PRACTICE,
    out: Out = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="GPU that will run it (l4, l4x4, h100, ...); checked and recorded.")
    ] = "cpu",
    backend: Annotated[str, typer.Option("--backend", help="torch.")] = "torch",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="KV cache: model (16 bit), fp8 or int8.")] = "model",
    int4_method: Annotated[
        str, typer.Option("--int4-method", help="awq (activation-aware) or rtn (no data needed).")
    ] = "awq",
    smooth_alpha: Annotated[
        float, typer.Option("--smooth-alpha", min=0, max=1, help="int8-sq: SmoothQuant's alpha, 0..1.")
    ] = 0.5,
    drafter: Annotated[
        Path | None, typer.Option("--drafter", help="Draft head (from train-drafter) to go with the engine.")
    ] = None,
    tree: Annotated[str, typer.Option("--tree", help="Draft tree, beams x length.")] = "1x3",
    calibrator: Annotated[str, typer.Option("--calibrator", help="trtkit or modelopt.")] = "trtkit",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="JSONL of problems with solutions; default: practice problems."),
    ] = None,
    calibration_rows: Annotated[int, typer.Option("--calibration-rows", min=1, help="Rows of it to use.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Most rows in flight.")] = 64,
    prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1, help="Longest prompt.")] = 2048,
    total_tokens: Annotated[int, typer.Option("--max-total-tokens", min=1, help="Longest prompt + answer.")] = 16384,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Fail, and keep nothing, when the mean KL to bf16 exceeds this."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Build an engine from a checkpoint: quantize, check the quality, write everything that solving needs."""
    _check_names(precision, backend, kv_dtype, int4_method, calibrator)
    scheme = scheme_named(precision)
    check_precision(scheme, profile_named(gpu))
    recipe = Recipe(
        model=model,
        precision=precision,
        gpu=profile_named(gpu).name,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]  # _check_names has seen the four of them
        int4_method=int4_method,  # type: ignore[arg-type]
        calibrator=calibrator,  # type: ignore[arg-type]
        limits=Limits(batch=batch, prompt_tokens=min(prompt_tokens, total_tokens), total_tokens=total_tokens),
        smooth_alpha=smooth_alpha,
        tree=tree_named(tree) if drafter is not None else None,
        calibration_rows=calibration_rows,
    )
    target = out or BUILT / f"{_stem(model)}-{precision}"

    from trtkit.build.native import build_native

    manifest = build_native(recipe, target, calibration=calibration, drafter=drafter, max_kl=max_kl, force=force)
    quality = manifest.quality
    shown = {"directory": str(target), "precision": precision, "backend": manifest.backend}
    document: dict[str, Any] = {
        "engine_dir": str(target), "precision": precision, "backend": manifest.backend, "quality": None,
    }  # fmt: skip
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
    facts("engine", shown)
    finish(f"trtkit solve problems.jsonl --engine {target}", document if as_json else None)


def _stem(model: str) -> str:
    """``RabotniKuma/Fast-Math-R1-14B`` -> ``fast-math-r1-14b``."""
    name = Path(model).name or Path(model).resolve().name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def _check_names(precision: str, backend: str, kv_dtype: str, int4_method: str, calibrator: str) -> None:
    choices: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("--precision", precision, SCHEMES),
        ("--backend", backend, _BACKENDS),
        ("--kv-dtype", kv_dtype, get_args(KvDtype)),
        ("--int4-method", int4_method, ("awq", "rtn")),
        ("--calibrator", calibrator, ("trtkit", "modelopt")),
    )
    wrong = [
        f"{option} {given!r}{nearest(given, valid)} (one of: {', '.join(valid)})"
        for option, given, valid in choices
        if given not in valid
    ]
    if wrong:
        raise UsageError("options that make no sense", offenders=wrong, hint="see: trtkit build --help")
    if backend == "tensorrt-llm":
        raise UnsupportedError(
            "the tensorrt-llm backend is not in this version",
            hint="use --backend torch, which needs no TensorRT and runs on CPU and CUDA",
        )
