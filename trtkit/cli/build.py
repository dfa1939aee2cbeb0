"""``trtkit build``: checkpoint to engine directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, get_args

import typer

from trtkit.bundled import PRACTICE, drafter_named
from trtkit.cli.build_report import report_built
from trtkit.cli.engines import BUILT, DEFAULT_PRECISION, check_replaced, default_engine, stem
from trtkit.cli.options import Json, Model, refuse_idle, tree_named
from trtkit.cli.output import finish, notice, quoted
from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.gpu import detect, profile_named
from trtkit.plan import check_precision
from trtkit.recipe import Limits, Recipe, settled
from trtkit.scheme import SCHEMES, KvDtype, OutputLayer, scheme_named

_BACKENDS = ("torch", "tensorrt-llm")


def command(
    context: typer.Context,
    precision: Annotated[
        str, typer.Option("--precision", "-p", help=f"One of: {', '.join(SCHEMES)}.")
    ] = DEFAULT_PRECISION,
    model: Model = PRACTICE,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the result; default: engines/built/MODEL-PRECISION.")
    ] = None,
    gpu: Annotated[
        str,
        typer.Option("--gpu", help="GPU that will run it (l4, l4x4, ...; auto: this machine's); checked and recorded."),
    ] = "cpu",
    backend: Annotated[
        str,
        typer.Option("--backend", help="torch, or tensorrt-llm (compiled for --gpu; default there: this machine's)."),
    ] = "torch",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="KV cache: model (16 bit), fp8 or int8.")] = "model",
    int4_method: Annotated[
        str, typer.Option("--int4-method", help="awq (activation-aware) or rtn (no data needed).")
    ] = "awq",
    output_layer: Annotated[
        str,
        typer.Option("--output-layer", help="lm_head: model (16 bit), int8, or auto: int8 for int8, int8-sq, int4."),
    ] = "auto",
    smooth_alpha: Annotated[
        float, typer.Option("--smooth-alpha", min=0, max=1, help="int8-sq: SmoothQuant's alpha, 0..1.")
    ] = 0.5,
    drafter: Annotated[
        Path | None,
        typer.Option("--drafter", help="Draft head (from train-drafter, or 'practice') to go with the engine."),
    ] = None,
    tree: Annotated[
        str | None, typer.Option("--tree", help="With --drafter: draft tree, beams x length; default: 1x3.")
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="tensorrt-llm with --drafter: build for temperature 0 only.")
    ] = False,
    calibrator: Annotated[str, typer.Option("--calibrator", help="trtkit or modelopt.")] = "trtkit",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="JSONL or CSV of problems with solutions; default: practice problems."),
    ] = None,
    calibration_rows: Annotated[int, typer.Option("--calibration-rows", min=1, help="Rows of it to use.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Most rows in flight.")] = 64,
    prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1, help="Longest prompt.")] = 2048,
    total_tokens: Annotated[int, typer.Option("--max-total-tokens", min=1, help="Longest prompt + answer.")] = 16384,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Fail, and keep nothing, when the mean KL to bf16 exceeds this."),
    ] = None,
    prepare_only: Annotated[
        bool,
        typer.Option("--prepare-only", help="tensorrt-llm: write a bundle that `trtkit compile` finishes elsewhere."),
    ] = False,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="tensorrt-llm: print the trtllm-build line and stop."),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="tensorrt-llm: ranks compiled at once; default: one per GPU."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Build an engine from a checkpoint.

    Quantize, check the quality, write everything that solving needs.
    """
    compiled, drafter = backend == "tensorrt-llm", drafter_named(drafter)
    _check_names(precision, backend, kv_dtype, int4_method, output_layer, calibrator)
    plainly = precision == "int4" and int4_method == "rtn"
    calibrated = (scheme_named(precision).calibrated and not plainly) or kv_dtype == "int8"
    original = precision == "bf16" and kv_dtype == "model" and output_layer != "int8"
    refuse_idle(context, [
        (precision != "int4", ("--int4-method",), "only with --precision int4"),
        (precision != "int8-sq", ("--smooth-alpha",), "only with --precision int8-sq"),
        (not calibrated, ("--calibrator",), f"nothing of {'plain ' * plainly}{precision} is calibrated"),
        (original, ("--calibration", "--calibration-rows", "--max-kl"),
         "bf16 is the original, with nothing to calibrate or to judge"),
        (compiled and (prepare_only or print_command), ("--workers",), "nothing is compiled here"),
    ])  # fmt: skip
    elsewhere = {"--greedy": greedy, "--prepare-only": prepare_only, "--print-command": print_command}
    if not compiled:
        _refuse({**elsewhere, "--workers": workers is not None})
    elif greedy and drafter is None:
        raise UsageError("--greedy: only with --drafter", hint="a plain engine takes any temperature per request")
    if tree is not None and drafter is None:
        raise UsageError("--tree: only with --drafter", hint="name the draft head, e.g. --drafter practice")
    profile = detect() if gpu == "auto" else profile_named(gpu)
    if compiled and profile.is_cpu and not (prepare_only or print_command):
        profile = detect()
    check_precision(scheme_named(precision), profile)
    recipe = Recipe(
        model=model,
        precision=precision,
        gpu=profile.name,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]  # _check_names has seen the four of them
        backend=backend,  # type: ignore[arg-type]
        tensor_parallel=profile.count,
        int4_method=int4_method,  # type: ignore[arg-type]
        output_layer=output_layer,  # type: ignore[arg-type]
        calibrator=calibrator,  # type: ignore[arg-type]
        limits=Limits(batch=batch, prompt_tokens=min(prompt_tokens, total_tokens), total_tokens=total_tokens),
        smooth_alpha=smooth_alpha,
        tree=tree_named(tree or "1x3") if drafter is not None else None,
        greedy=greedy,
        calibration_rows=calibration_rows,
    )
    recipe = settled(recipe)
    if not compiled:
        target = out or default_engine(model, precision)
        check_replaced(target, force=force)
        from trtkit.build.native import build_native

        manifest = build_native(recipe, target, calibration=calibration, drafter=drafter, max_kl=max_kl, force=force)
        return report_built(
            "engine", manifest, target, f"trtkit solve problems.jsonl --engine {quoted(target)}", as_json
        )

    from trtkit.build.bundle import Sources, build_trtllm, equivalent_command, prepare_bundle

    sources = Sources(calibration=calibration, drafter=drafter, max_kl=max_kl)
    target = out or BUILT / f"{stem(model)}-{precision}-{recipe.gpu}{'-bundle' if prepare_only else ''}"
    if print_command:
        line = equivalent_command(recipe, sources, target)
        notice(line)
        return finish("drop --print-command to build it", {"command": line} if as_json else None)
    check_replaced(target, force=force)
    if prepare_only:
        manifest = prepare_bundle(recipe, target, sources, force=force)
        return report_built("bundle", manifest, target, f"copy {target} to the GPU host, then: trtkit compile "
                            f"{quoted(target.name)}", as_json)  # fmt: skip
    manifest = build_trtllm(recipe, target, sources, workers=workers, force=force)
    return report_built("engine", manifest, target, f"trtkit solve problems.jsonl --engine {quoted(target)}", as_json)


def _check_names(
    precision: str, backend: str, kv_dtype: str, int4_method: str, output_layer: str, calibrator: str
) -> None:
    choices: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("--precision", precision, SCHEMES),
        ("--backend", backend, _BACKENDS),
        ("--kv-dtype", kv_dtype, get_args(KvDtype)),
        ("--int4-method", int4_method, ("awq", "rtn")),
        ("--output-layer", output_layer, ("auto", *get_args(OutputLayer))),
        ("--calibrator", calibrator, ("trtkit", "modelopt")),
    )
    wrong = [
        f"{option} {given!r}{nearest(given, valid)} (one of: {', '.join(valid)})"
        for option, given, valid in choices
        if given not in valid
    ]
    if wrong:
        raise UsageError("options that make no sense", offenders=wrong, hint="see: trtkit build --help")


def _refuse(given: Mapping[str, bool]) -> None:
    wrong = [name for name, used in given.items() if used]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: only with --backend tensorrt-llm", hint="see: trtkit build --help")
