"""``trtkit solve``: problems to voted answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.engines import chosen_engine
from trtkit.cli.options import Device, Json, Out, Threads, Tree, drafting_named
from trtkit.cli.output import facts, finish, notice, show


def command(
    problems: Annotated[Path, typer.Argument(help="JSONL: id, problem, and the answer if it is known.")],
    engine: Annotated[
        Path | None, typer.Option("--engine", help="Engine directory; default: the latest in engines/built.")
    ] = None,
    out: Out = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples per problem.")] = 16,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Longest sample; the engine's own limit may be lower.")
    ] = 16384,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, max=100, help="0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Keep the likeliest tokens up to this mass.")
    ] = 0.9,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Keep this many tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option("--min-p", min=0, max=1, help="Drop tokens below this share of the best.")
    ] = 0.05,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same samples.")] = 0,
    order: Annotated[
        str, typer.Option("--order", help="pooled (all in one batch) or sequential (one problem at a time).")
    ] = "pooled",
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="Rule beside 'unassailable', e.g. 'agree(4)'. Repeatable."),
    ] = None,
    full_vote: Annotated[
        bool, typer.Option("--full-vote", help="Run every sample to its end, to measure pass@1.")
    ] = False,
    stop_at: Annotated[
        str, typer.Option("--stop-at", help="A sample ends at: think (</think>) or eos (end of turn).")
    ] = "think",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Prompt variant; repeat to mix several over the samples."),
    ] = None,
    answer_mode: Annotated[str, typer.Option("--answer-mode", help="auto or integer.")] = "auto",
    modulus: Annotated[int | None, typer.Option("--modulus", help="Reduce integer answers by it (AIMO: 1000).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Most rows in flight.")] = None,
    tree: Tree = "auto",
    device: Device = "auto",
    threads: Threads = None,
    save_text: Annotated[bool, typer.Option("--save-text", help="Keep each sample's text.")] = False,
    force_new: Annotated[bool, typer.Option("--force-new", help="Throw away what --out holds and start over.")] = False,
    as_json: Json = False,
) -> None:
    """Solve problems by majority vote. Interrupt it at any time: the same command goes on from there."""
    from trtkit.runtime.api import SamplingParams
    from trtkit.solve.answers import AnswerMode
    from trtkit.solve.options import SolveOptions

    directory = chosen_engine(engine)
    defaults = SolveOptions()
    options = SolveOptions(
        samples=samples,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        variants=tuple(prompt) if prompt else defaults.variants,
        seed=seed,
        mode=AnswerMode(kind=answer_mode, modulus=modulus),  # type: ignore[arg-type]  # checked there
        stop=tuple(stop or ()),
        full_vote=full_vote,
        stop_at=stop_at,  # type: ignore[arg-type]
        order=order,  # type: ignore[arg-type]
        outstanding=2 * batch if batch else defaults.outstanding,
        save_text=save_text,
    )
    target = out or Path("runs") / f"{problems.stem}-{directory.resolve().name}"

    from trtkit.chat import load_chat
    from trtkit.log import logger
    from trtkit.recipe import read_manifest
    from trtkit.runtime.load import OpenOptions, open_engine
    from trtkit.solve.display import observer_for, result_table
    from trtkit.solve.problems import read_problems
    from trtkit.solve.run import Places, run_solve, sigterm_as_interrupt

    read_manifest(directory)  # a wrong directory is told as such, before its tokenizer is missed
    read_problems(problems)
    speculative, shape = drafting_named(tree)
    opening = OpenOptions(device=device, threads=threads, rows=batch, speculative=speculative, tree=shape)
    with sigterm_as_interrupt():
        outcome = run_solve(
            Places(problems=problems, engine=directory, out=target),
            lambda: open_engine(directory, opening),
            load_chat(directory),
            options,
            observer=observer_for(quiet=not logger.isEnabledFor(20)),
            force_new=force_new,
        )
    summary = outcome.summary
    show(result_table(outcome.verdicts))
    notice("")
    shown = {"answered": f"{summary.answered} of {summary.problems} problems"}
    if summary.accuracy is not None and summary.pass_at_1 is not None:
        shown["accuracy"] = f"{summary.accuracy:.1%} (maj@{summary.samples}; pass@1 {summary.pass_at_1:.1%})"
    shown["stopped early"] = f"{summary.stopped_early} problems"
    shown["tokens"] = f"{summary.tokens:,} in {summary.seconds:.1f} s: {summary.tokens_per_second:,.0f} tok/s"
    shown["files"] = f"{target}/solutions.jsonl, journal.jsonl, run.json, summary.json"
    facts("summary", shown)
    finish(f"trtkit inspect {target}", summary.document() if as_json else None)
