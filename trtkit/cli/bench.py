"""``trtkit bench``: the roofline card and measured speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.engines import chosen_engine
from trtkit.cli.options import Device, Json, Threads, Tree, drafting_named
from trtkit.cli.output import facts, finish, gigabytes, notice, table


def command(
    engine: Annotated[
        list[Path] | None,
        typer.Option("--engine", help="Engine directory; repeat to compare. Default: the latest built."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Rows; repeatable. Default: 1, 8, 32.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Timed tokens per row.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="The median of this many counts.")] = 3,
    problems: Annotated[
        Path | None, typer.Option("--problems", help="JSONL whose prompts to use; default: random tokens.")
    ] = None,
    tree: Tree = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = True,
) -> None:
    """Measure memory bandwidth, then prefill and decode speed of engines. The last line is one JSON document."""
    engines = engine or [chosen_engine(None)]

    from trtkit.bench import BenchOptions, measure

    speculative, shape = drafting_named(tree)
    options = BenchOptions(
        batches=tuple(batch or (1, 8, 32)), prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
        device=device, threads=threads, problems=problems, speculative=speculative, tree=shape,
    )  # fmt: skip
    result = measure(engines, options)
    machine = result.machine
    facts(
        "machine",
        {
            "device": machine.device,
            "threads": f"{machine.threads} of {machine.cores} usable cores",
            "software": f"Python {machine.python}, torch {machine.torch}",
            "memory": f"reads {machine.read_bytes_per_second / 1e9:,.1f} GB/s, "
            f"copies {machine.copy_bytes_per_second / 1e9:,.1f} GB/s",
            "load": f"{machine.load_average:.1f}" + (" (busy: figures too low)" if machine.busy else ""),
        },
    )
    notice("")
    headings = ("engine", "precision", "drafter", "batch", "bytes/step", "ceiling", "decode", "of ceiling",
                "tok/step", "prefill")  # fmt: skip
    table(
        headings,
        [
            (
                Path(point.engine).name,
                point.precision,
                point.drafter or "-",
                str(point.batch),
                gigabytes(point.step_bytes),
                f"{point.ceiling_tokens_per_second:,.0f}",
                f"{point.tokens_per_second:,.1f}",
                f"{point.roofline_fraction:.1%}",
                f"{point.tokens_per_step:.2f}",
                f"{point.prefill_tokens_per_second:,.0f}",
            )
            for point in result.points
        ],
        right=headings[3:],
    )
    notice("")
    notice("ceiling, decode and prefill in tok/s over all rows; ceiling = memory bandwidth / bytes per step.")
    finish("trtkit solve problems.jsonl", result.document() if as_json else None)
