"""``trtkit doctor``: is this machine fit for the job?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trtkit.bundled import PRACTICE
from trtkit.cli.engines import DEFAULT_PRECISION, default_engine
from trtkit.cli.options import Json
from trtkit.cli.output import finish, notice, table
from trtkit.errors import UsageError
from trtkit.files import nearest


def command(
    gpu_check: Annotated[
        bool,
        typer.Option("--gpu-check", help="Instead: run the TensorRT-LLM checklist on this GPU host (minutes)."),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="With --gpu-check: only this item. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether this machine is fit for the job.

    Versions, GPU, precisions, disk and the bundled checkpoint. Exit code 1 if solving cannot work here.
    """
    if only and not gpu_check:
        raise UsageError("--only: only with --gpu-check")
    (_gpu_check if gpu_check else _examine)(as_json, only or [])


def _examine(as_json: bool, _: list[str]) -> None:
    from trtkit.doctor import examine

    diagnosis = examine(Path.cwd())
    table(
        ("check", "", "found"),
        [
            (check.name, check.status, check.detail + (f" - {check.hint}" if check.hint else ""))
            for check in diagnosis.checks
        ],
    )
    notice("")
    table(
        ("precision", "here", "native units need"),
        [(support.precision, support.detail, support.needs) for support in diagnosis.precisions],
    )
    notice("")
    document = {
        "healthy": diagnosis.healthy,
        "checks": [asdict(check) for check in diagnosis.checks],
        "precisions": [asdict(support) for support in diagnosis.precisions],
    }
    broken = [check.name for check in diagnosis.checks if check.status == "fail"]
    advice = f"repair {', '.join(broken)}, then run `trtkit doctor` again" if broken else _first_step()
    finish(advice, document if as_json else None)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _first_step() -> str:
    """The default build, or a run of it where it was made already."""
    made = default_engine(PRACTICE, DEFAULT_PRECISION)
    if made.exists():
        return f"trtkit solve problems.jsonl --engine {made}"
    return f"trtkit build --precision {DEFAULT_PRECISION}"


def _gpu_check(as_json: bool, only: list[str]) -> None:
    from trtkit.doctor import examine
    from trtkit.gpu_check.items import ITEMS
    from trtkit.gpu_check.run import check_gpu_host

    names = [name for name, _ in ITEMS]
    wrong = [f"{name!r}{nearest(name, names)}" for name in only if name not in names]
    if wrong:
        raise UsageError("no such item", offenders=wrong, hint=f"one of: {', '.join(map(repr, names))}")
    findings = check_gpu_host(only=only)
    table(
        ("item", "", "found"),
        [(item.name, item.status, item.detail + (f" - {item.hint}" if item.hint else "")) for item in findings],
    )
    notice("")
    failed = [item.name for item in findings if item.status == "fail"]
    document = {
        "passed": not failed,
        "items": [asdict(item) for item in findings],
        "machine": [asdict(check) for check in examine(Path.cwd()).checks],
    }
    advice = (
        "see docs/tensorrt-llm.md for what each item means" if failed
        else "trtkit build --backend tensorrt-llm --precision fp8"
    )  # fmt: skip
    finish(advice, document if as_json else None)
    if failed:
        raise typer.Exit(1)
