"""``trtkit compile``: a prepared bundle to a TensorRT-LLM engine, on the GPU host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.build_report import report_built
from trtkit.cli.engines import BUILT, check_replaced
from trtkit.cli.options import Json
from trtkit.cli.output import quoted


def command(
    bundle: Annotated[Path, typer.Argument(help="Directory from `trtkit build --prepare-only`.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write the result; default: engines/built/BUNDLE, less '-bundle'."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Ranks compiled at a time; default: one per GPU.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a bundle with TensorRT-LLM.

    For this machine's GPU. The bundle stays as it is.
    """
    from trtkit.build.bundle import compile_bundle

    target = out or BUILT / bundle.resolve().name.removesuffix("-bundle")
    check_replaced(target, force=force)
    manifest = compile_bundle(bundle, target, workers=workers, force=force)
    report_built("engine", manifest, target, f"trtkit solve problems.jsonl --engine {quoted(target)}", as_json)
