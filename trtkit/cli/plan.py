"""``trtkit plan``: what fits where, and how fast, without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkit.bundled import PRACTICE, practice_dir
from trtkit.cli.engines import calibration_words
from trtkit.cli.options import Json, refuse_idle
from trtkit.cli.output import facts, finish, gigabytes, notice, quoted, table
from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.gpu import GpuProfile, detect, profile_named
from trtkit.known_models import KNOWN_MODELS, known_hub_id, known_model
from trtkit.model_spec import ModelSpec, read_model_spec
from trtkit.plan import PlanRow, Workload, default_draft, plan_rows
from trtkit.recipe import Limits, Recipe, write_recipe
from trtkit.scheme import SCHEMES, scheme_named


def command(
    context: typer.Context,
    model: Annotated[
        str, typer.Option("--model", help=f"{', '.join(KNOWN_MODELS)}, practice, or a checkpoint directory.")
    ] = "fast-math-r1-14b",
    gpu: Annotated[str, typer.Option("--gpu", help="l4, l4x4, h100, ..., cpu; auto: this machine.")] = "auto",
    length: Annotated[
        int | None,
        typer.Option("--length", min=1, help="Longest prompt + answer, tokens; default: 16384 or the model's most."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in flight.")] = 12,
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="KV cache: model (16 bit), fp8 or int8.")] = "model",
    precision: Annotated[
        str | None, typer.Option("--precision", "-p", help=f"Only this one of: {', '.join(SCHEMES)}.")
    ] = None,
    drafter: Annotated[
        bool | None, typer.Option("--drafter/--no-drafter", help="Only the lines with, or without, a draft head.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--write-recipe", help="Write the line of --precision (and --drafter) as a build recipe (TOML)."),
    ] = None,
    catalogue: Annotated[
        Path | None,
        typer.Option("--catalogue", help="Instead: write the recipes of all known models and their README here."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Instead: published speeds beside the planner's.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what fits on a GPU, and how fast it is.

    Which precisions, how many rows, what speed to expect. Pure arithmetic, no download.
    """
    if catalogue is not None and published:
        raise UsageError("--catalogue and --published exclude each other", hint="pass one of them")
    asked = ("--model", "--gpu", "--length", "--batch", "--kv-dtype", "--precision", "--drafter", "--write-recipe")
    refuse_idle(context, [
        (catalogue is not None, asked, "not with --catalogue, which is all known models"),
        (published, asked, "not with --published, which is what others measured"),
    ])  # fmt: skip
    if catalogue is not None:
        _write_catalogue(catalogue, as_json)
    elif published:
        _published(as_json)
    else:
        if recipe is not None and precision is None:
            raise UsageError("--write-recipe needs to know which line", hint="add --precision, e.g. --precision fp8")
        spec = _spec(model)
        profile = detect() if gpu == "auto" else profile_named(gpu)
        work = _workload(spec, batch, length, kv_dtype)
        wanted = None if precision is None else scheme_named(precision).name
        heads = (False, True) if drafter is None and recipe is None else (bool(drafter),)
        rows = [
            row
            for row in plan_rows(spec, profile, work)
            if wanted in (None, row.precision) and (row.drafter is not None) in heads
        ]
        _print(model, spec, profile, work, rows)
        advice = _advice(model, spec, profile, work, rows)
        if recipe is not None:
            made = _recipe(model, spec, profile, work, rows[0])
            write_recipe(recipe, made)
            notice(f"recipe: {recipe}")
            advice = _build_line(made)
        finish(advice, _document(model, spec, profile, work, rows) if as_json else None)


def _workload(spec: ModelSpec, batch: int, length: int | None, kv_dtype: str) -> Workload:
    if kv_dtype not in ("model", "fp8", "int8"):
        raise UsageError(f"unknown KV dtype {kv_dtype!r}", hint="one of: model, fp8, int8")
    if length is None:
        length = min(Limits().total_tokens, spec.max_positions)
    if length > spec.max_positions:
        raise UsageError(
            f"length {length} exceeds the model's {spec.max_positions} positions",
            hint=f"pass --length {spec.max_positions} or less",
        )
    return Workload(batch=batch, length=length, kv_dtype=kv_dtype)  # type: ignore[arg-type]  # just checked


def _advice(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> str:
    best = max((r for r in rows if r.fits), key=lambda r: (r.tokens_per_second or 0, r.precision), default=None)
    if best is None:
        return _fewer_devices(model, spec, gpu, work, rows) or "choose a larger GPU (--gpu) or a shorter --length"
    safe = [r for r in rows if r.fits and r.precision != "int4" and r.drafter is None]
    chosen = max(safe, key=lambda r: (r.tokens_per_second or 0, r.precision == "fp8"), default=best)
    return _build_line(_recipe(model, spec, gpu, work, chosen))


def _fewer_devices(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> str | None:
    """The plan for as many of the devices as a line that was asked for can be split over, where all are too many."""
    asked = {(row.precision, row.drafter) for row in rows}
    for count in range(gpu.count - 1, 0, -1):
        fewer = profile_named(f"{gpu.kind}x{count}")
        if any(row.fits and (row.precision, row.drafter) in asked for row in plan_rows(spec, fewer, work)):
            usual = _workload(spec, Workload().batch, None, "model")
            given = {"--length": (work.length, usual.length), "--batch": (work.batch, usual.batch),
                     "--kv-dtype": (work.kv_dtype, usual.kv_dtype)}  # fmt: skip
            more = [f" {name} {value}" for name, (value, default) in given.items() if value != default]
            return f"trtkit plan --model {quoted(model)} --gpu {fewer.name}{''.join(more)}"
    return None


def _recipe(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, row: PlanRow) -> Recipe:
    from trtkit.plan.recipes import recipe_of

    return recipe_of(known_hub_id(model) or model, gpu, work, row, default_draft(spec))


def _build_line(made: Recipe) -> str:
    """The build that a recipe stands for; ``build``'s defaults go without saying."""
    usual = Limits()
    flags: dict[str, tuple[object, object]] = {
        "--precision": (made.precision, None),
        "--model": (made.model, None),
        "--gpu": (made.gpu, None),
        "--backend": (made.backend, "torch"),
        "--kv-dtype": (made.kv_dtype, "model"),
        "--batch": (made.limits.batch, usual.batch),
        "--max-prompt-tokens": (made.limits.prompt_tokens, usual.prompt_tokens),
        "--max-total-tokens": (made.limits.total_tokens, usual.total_tokens),
    }
    if made.tree is not None:
        flags |= {"--drafter": ("DIR", None), "--tree": (made.tree, None)}
    words = " ".join(f"{name} {quoted(value)}" for name, (value, default) in flags.items() if value != default)
    return f"trtkit build {words}{calibration_words(made.model, precision=made.precision, kv_dtype=made.kv_dtype)}"


def _spec(model: str) -> ModelSpec:
    spec = known_model(model)
    if spec is not None:
        return spec
    if model == PRACTICE:
        return read_model_spec(practice_dir())
    if not (Path(model) / "config.json").is_file():
        raise UsageError(
            f"unknown model {model!r}{nearest(model, [*KNOWN_MODELS, PRACTICE])}",
            hint=f"one of: {', '.join(KNOWN_MODELS)}, {PRACTICE}, or a checkpoint directory (with its config.json)",
        )
    return read_model_spec(Path(model))


def _print(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> None:
    kv = rows[0].memory.kv_bytes_per_token / 1024
    head = max(row.memory.draft_bytes for row in rows)
    facts(
        f"{model} on {gpu.title}",
        {
            "model": f"{spec.family}, {_parameters(spec)} parameters, {spec.layers} layers",
            "memory": f"{_usable(rows)}, {gpu.count} device(s)",
            "KV cache": f"{kv:g} KiB per token and device",
            **({"draft head": f"{gigabytes(head)} per device"} if head else {}),
            "asked": f"{work.batch} rows of at most {work.length:,} tokens",
        },
    )
    notice("")
    table(
        ("precision", "drafter", "weights", f"rows at {work.length:,}", "tok/s", "limit", "remark"),
        [
            (
                row.precision,
                row.drafter or "-",
                gigabytes(row.memory.weight_bytes),
                str(row.max_rows) if row.fits else "no",
                _speed(row.tokens_per_second),
                _speed(row.ceiling_tokens_per_second),
                row.reason,
            )
            for row in rows
        ],
        right=("weights", f"rows at {work.length:,}", "tok/s", "limit"),
    )
    notice("")
    notice("tok/s: all rows together, estimated, not measured on this machine; limit: at the data-sheet bandwidth.")
    if gpu.memory == "hbm":
        notice(
            "On HBM GPUs tok/s is the lower end: it follows published 2xH100 runs, which reached a sixth of the limit."
        )


def _usable(rows: list[PlanRow]) -> str:
    """A GPU's is one number; of a computer's memory keys and values get a part of what the weights leave."""
    sizes = [row.memory.usable_bytes for row in rows]
    least, most = gigabytes(min(sizes)), gigabytes(max(sizes))
    if least == most:
        return f"{most} usable per device"
    return f"{least} to {most} usable, the weights and a part of what they leave"


def _parameters(spec: ModelSpec) -> str:
    count = spec.parameters
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _write_catalogue(directory: Path, as_json: bool) -> None:
    """``--catalogue``: the recipes of ``engines/recipes``."""
    from trtkit.plan.recipes import write_catalogue

    lines = write_catalogue(directory)
    written = [line.file_name for line in lines if line.recipe is not None]
    refused = {line.file_name: line.row.reason for line in lines if line.recipe is None}
    facts(
        "recipes",
        {"directory": str(directory), "written": str(len(written)), "do not fit": f"{len(refused)}, see README"},
    )
    document = {"directory": str(directory), "written": written, "refused": refused}
    finish(f"read {directory / 'README.md'}", document if as_json else None)


def _published(as_json: bool) -> None:
    """``--published``: what others measured, beside the planner."""
    from trtkit.plan.published import compare

    found = compare()
    table(
        ("source", "GPU", "engine", "published", "planner", "error", "/ bf16", "planner", "error"),
        [
            (
                item.published.source,
                item.published.gpu,
                item.published.precision + (" + drafter" if item.published.drafter else ""),
                f"{item.published.tokens_per_second:,.0f}",
                f"{item.planner:,.0f}",
                f"{item.error:+.1%}",
                f"{item.published_ratio:.2f}",
                f"{item.planner_ratio:.2f}",
                f"{item.ratio_error:+.1%}",
            )
            for item in found
        ],
        right=("published", "planner", "error", "/ bf16"),
    )
    notice("")
    notice("tok/s of 12 requests, and ratios to bf16 of the same source. Sources: trtkit/plan/published.py.")
    document = {
        "figures": [
            {
                "source": item.published.source, "gpu": item.published.gpu, "precision": item.published.precision,
                "drafter": item.published.drafter, "published": item.published.tokens_per_second,
                "planner": round(item.planner, 1), "error": round(item.error, 4),
                "published_ratio": round(item.published_ratio, 3), "planner_ratio": round(item.planner_ratio, 3),
                "ratio_error": round(item.ratio_error, 4),
            }
            for item in found
        ]
    }  # fmt: skip
    finish("trtkit plan --gpu l4x4", document if as_json else None)


def _document(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> dict[str, Any]:
    def plain(row: PlanRow) -> dict[str, Any]:
        memory = asdict(row.memory) | {"kv_bytes": row.memory.kv_bytes}
        speed, limit = row.tokens_per_second, row.ceiling_tokens_per_second
        return {
            "precision": row.precision, "output_layer": row.output_layer, "drafter": row.drafter, "fits": row.fits,
            "reason": row.reason, "max_rows": row.max_rows,
            "tokens_per_second": None if speed is None else round(speed, 1),
            "ceiling_tokens_per_second": None if limit is None else round(limit, 1),
            "tokens_per_step": round(row.tokens_per_step, 3), "memory": memory,
        }  # fmt: skip

    return {
        "model": model, "parameters": spec.parameters, "gpu": gpu.name, "devices": gpu.count, "batch": work.batch,
        "length": work.length, "kv_dtype": work.kv_dtype, "rows": [plain(row) for row in rows],
    }  # fmt: skip
