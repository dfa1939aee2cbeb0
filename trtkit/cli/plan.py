"""``trtkit plan``: what fits where, and how fast, without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkit.bundled import PRACTICE, practice_dir
from trtkit.cli.options import Json
from trtkit.cli.output import facts, finish, gigabytes, notice, table
from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.gpu import GpuProfile, detect, profile_named
from trtkit.known_models import KNOWN_MODELS, known_model
from trtkit.model_spec import ModelSpec, read_model_spec
from trtkit.plan import PlanRow, Workload, plan_rows


def command(
    model: Annotated[
        str, typer.Option("--model", help=f"{', '.join(KNOWN_MODELS)}, practice, or a checkpoint directory.")
    ] = "fast-math-r1-14b",
    gpu: Annotated[str, typer.Option("--gpu", help="l4, l4x4, h100, ..., cpu; auto: this machine.")] = "auto",
    length: Annotated[int, typer.Option("--length", min=1, help="Longest prompt + answer, tokens.")] = 16384,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in flight.")] = 12,
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="KV cache: model (16 bit), fp8 or int8.")] = "model",
    as_json: Json = False,
) -> None:
    """Say which precisions fit a GPU, how many rows, and what speed to expect. Pure arithmetic, no download."""
    spec = _spec(model)
    profile = detect() if gpu == "auto" else profile_named(gpu)
    if kv_dtype not in ("model", "fp8", "int8"):
        raise UsageError(f"unknown KV dtype {kv_dtype!r}", hint="one of: model, fp8, int8")
    if length > spec.max_positions:
        raise UsageError(
            f"length {length} exceeds the model's {spec.max_positions} positions",
            hint=f"pass --length {spec.max_positions} or less",
        )
    work = Workload(batch=batch, length=length, kv_dtype=kv_dtype)  # type: ignore[arg-type]  # just checked
    rows = plan_rows(spec, profile, work)
    _print(model, spec, profile, work, rows)
    best = max((r for r in rows if r.fits), key=lambda r: (r.tokens_per_second or 0, r.precision), default=None)
    safe = [r for r in rows if r.fits and r.precision != "int4" and r.drafter is None]
    if best is None:
        advice = "choose a larger GPU (--gpu) or a shorter --length"
    else:
        chosen = max(safe, key=lambda r: (r.tokens_per_second or 0, r.precision == "fp8"), default=best)
        advice = f"trtkit build --precision {chosen.precision} --model {model} --gpu {profile.name}"
    finish(advice, _document(model, spec, profile, work, rows) if as_json else None)


def _spec(model: str) -> ModelSpec:
    spec = known_model(model)
    if spec is not None:
        return spec
    if model == PRACTICE:
        return read_model_spec(practice_dir())
    if not Path(model).is_dir():
        raise UsageError(
            f"unknown model {model!r}{nearest(model, [*KNOWN_MODELS, PRACTICE])}",
            hint=f"one of: {', '.join(KNOWN_MODELS)}, {PRACTICE}, or the directory of a checkpoint",
        )
    return read_model_spec(Path(model))


def _print(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> None:
    kv = rows[0].memory.kv_bytes_per_token / 1024
    facts(
        f"{model} on {gpu.title}",
        {
            "model": f"{spec.family}, {spec.parameters / 1e9:.2f}B parameters, {spec.layers} layers",
            "memory": f"{gigabytes(rows[0].memory.usable_bytes)} usable per device, {gpu.count} device(s)",
            "KV cache": f"{kv:g} KiB per token and device",
            "asked": f"{work.batch} rows of at most {work.length:,} tokens",
        },
    )
    notice("")
    table(
        ("precision", "drafter", "weights", "drafter GB", "KV room", "max rows", "tok/s", "remark"),
        [
            (
                row.precision,
                row.drafter or "-",
                gigabytes(row.memory.weight_bytes),
                gigabytes(row.memory.draft_bytes) if row.drafter else "-",
                gigabytes(max(row.memory.kv_bytes, 0)),
                str(row.max_rows) if row.fits else "no",
                f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "-",
                row.reason,
            )
            for row in rows
        ],
        right=("weights", "drafter GB", "KV room", "max rows", "tok/s"),
    )
    notice("")
    notice("tok/s: all rows together, estimated from memory bandwidth; not measured on this machine.")


def _document(model: str, spec: ModelSpec, gpu: GpuProfile, work: Workload, rows: list[PlanRow]) -> dict[str, Any]:
    def plain(row: PlanRow) -> dict[str, Any]:
        memory = asdict(row.memory) | {"kv_bytes": row.memory.kv_bytes}
        speed = row.tokens_per_second
        return {
            "precision": row.precision, "drafter": row.drafter, "fits": row.fits, "reason": row.reason,
            "max_rows": row.max_rows, "tokens_per_second": None if speed is None else round(speed, 1),
            "tokens_per_step": round(row.tokens_per_step, 3), "memory": memory,
        }  # fmt: skip

    return {
        "model": model, "parameters": spec.parameters, "gpu": gpu.name, "devices": gpu.count, "batch": work.batch,
        "length": work.length, "kv_dtype": work.kv_dtype, "rows": [plain(row) for row in rows],
    }  # fmt: skip
