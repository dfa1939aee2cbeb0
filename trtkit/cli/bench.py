"""``trtkit bench``: the roofline card and measured speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtkit.bundled import PRACTICE
from trtkit.cli.engines import BUILT, chosen_engine, stem
from trtkit.cli.options import (
    Device,
    Drafter,
    Json,
    LookUp,
    Model,
    OutputLayer,
    ServerModel,
    ServerSeeds,
    ServerTokenizer,
    ServerUrl,
    TensorParallel,
    Threads,
    Tree,
    drafting_named,
    idle_beside_server,
    refuse_idle,
    server_named,
)
from trtkit.cli.output import facts, finish, gigabytes, notice, quoted, table
from trtkit.errors import UsageError

if TYPE_CHECKING:
    from trtkit.bench.engines import BenchOptions, Point
    from trtkit.bench.machine import Machine
    from trtkit.runtime.endpoint.remote import Remote


def command(
    context: typer.Context,
    engine: Annotated[
        list[Path] | None,
        typer.Option("--engine", help="Engine directory; repeat to compare. Default: the latest built."),
    ] = None,
    endpoint: ServerUrl = None,
    endpoint_model: ServerModel = None,
    endpoint_seeds: ServerSeeds = True,
    tokenizer: ServerTokenizer = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Rows; repeatable. Default: 1, 8, 32.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Timed tokens per row.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="The median of this many counts.")] = 3,
    problems: Annotated[
        Path | None, typer.Option("--problems", help="JSONL or CSV whose prompts to use; default: random tokens.")
    ] = None,
    tree: Tree = "auto",
    drafter: Drafter = None,
    lookup: LookUp = False,
    draft_vocabulary: Annotated[
        int | None, typer.Option("--draft-vocabulary", help="Draft only the N most frequent tokens.")
    ] = None,
    draft_precision: Annotated[
        str, typer.Option("--draft-precision", help="Of the head's output layer: model or int8.")
    ] = "model",
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=100, help="Of the sampling.")] = 1.0,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Open each engine this often; plain and drafting take turns.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step goes, in place of speeds.")
    ] = False,
    suite: Annotated[
        bool, typer.Option("--suite", help="Build and measure every precision of --model; JSON and PNG in --out.")
    ] = False,
    model: Model = PRACTICE,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where --suite writes; default: engines/built/suite-MODEL.")
    ] = None,
    device: Device = "auto",
    tensor_parallel: TensorParallel = None,
    threads: Threads = None,
    output_layer: OutputLayer = None,
    as_json: Json = True,
) -> None:
    """Measure memory bandwidth and engines' speed.

    Prefill and decode, plain and with their draft heads.

    The last line is one JSON document.
    """
    beside = ("--engine", "--suite", "--profile", "--model", "--out", "--rounds", "--draft-vocabulary",
              "--draft-precision")  # fmt: skip
    refuse_idle(context, [
        *idle_beside_server(endpoint, *beside),
        (not suite and endpoint is None, ("--model",), "only with --suite; an engine is named with --engine"),
        (problems is not None, ("--prompt-tokens",), "not with --problems, whose prompts are used"),
        (profile, ("--new-tokens", "--repeats", "--rounds"), "not with --profile"),
        (tree == "none", ("--drafter", "--draft-vocabulary", "--draft-precision"), "not with --tree none"),
    ])  # fmt: skip
    _check_together(suite=suite, profile=profile, engine=bool(engine), out=out is not None)
    engines = [] if suite or endpoint is not None else engine or [chosen_engine(None)]

    from trtkit.bench.engines import BenchOptions, measure
    from trtkit.runtime.draft_head import HeadOptions

    options = BenchOptions(
        batches=tuple(batch or (1, 8, 32)), prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
        rounds=rounds, device=device, tensor_parallel=tensor_parallel, threads=threads, problems=problems,
        temperature=temperature, **drafting_named(context, tree=tree, drafter=drafter, lookup=lookup),
        output_layer=output_layer,  # type: ignore[arg-type]  # checked there
        head=HeadOptions(vocabulary=draft_vocabulary, precision=draft_precision),  # type: ignore[arg-type]
    )  # fmt: skip
    if endpoint is not None:
        remote = server_named(endpoint, model=endpoint_model, seeds=endpoint_seeds, tokenizer=tokenizer)
        again = [] if endpoint_model is None else ["--endpoint-model", quoted(endpoint_model)]
        again += [] if tokenizer is None else ["--tokenizer", quoted(tokenizer)]
        again += [] if endpoint_seeds else ["--no-endpoint-seeds"]
        _server(remote, options, again, as_json=as_json)
        return
    if profile:
        _profile(engines, options, as_json=as_json)
        return
    if suite:
        from trtkit.bench.suite import measure_suite

        target = out or BUILT / f"suite-{stem(model)}"
        result = measure_suite(model, target, options)
    else:
        result = measure(engines, options)
    _show_machine(result.machine)
    notice("")
    _show_points(result.points)
    notice("")
    notice("ceiling, decode and prefill in tok/s over all rows; ceiling = memory bandwidth / bytes per step.")
    drafting = [point for point in result.points if point.drafter is not None]
    if drafting:
        notice("")
        _show_drafting(drafting, asked=problems is not None)
    if suite:
        notice("")
        notice(f"files: {target}/suite.json" + (", suite.png" if (target / "suite.png").is_file() else ""))
    fastest = max(result.points, key=lambda point: point.tokens_per_second)
    finish(_advice(fastest, options), result.document() if as_json else None)


def _advice(fastest: Point, options: BenchOptions) -> str:
    """The run that was fastest."""
    words = ["trtkit solve problems.jsonl --engine", quoted(fastest.engine)]
    if fastest.drafter is not None:
        words += [] if options.drafter is None else ["--drafter", quoted(options.drafter)]
        words += ["--lookup"] * options.lookup
        words += [] if options.tree is None else ["--tree", str(options.tree)]
    words += [] if options.output_layer is None else ["--output-layer", options.output_layer]
    words += [] if options.tensor_parallel is None else ["--tp", str(options.tensor_parallel)]
    return " ".join(words)


def _check_together(*, suite: bool, profile: bool, engine: bool, out: bool) -> None:
    """Refuse what would be ignored."""
    wrong = []
    if suite and profile:
        wrong.append("--profile: not with --suite")
    if suite and engine:
        wrong.append("--engine: --suite builds its own from --model")
    if out and not suite:
        wrong.append("--out: only with --suite")
    if wrong:
        raise UsageError("options that make no sense", offenders=wrong, hint="see: trtkit bench --help")


def _server(remote: Remote, options: BenchOptions, again: Sequence[str], *, as_json: bool) -> None:
    from trtkit.bench.endpoint import measure_server

    points = list(measure_server(remote, options))
    headings = ("model", "batch", "decode", "per request", "first token")
    table(
        headings,
        [
            (
                point.model,
                str(point.batch),
                f"{point.tokens_per_second:,.1f}",
                f"{point.tokens_per_second / point.batch:,.1f}",
                f"{point.first_token_seconds:.3f} s",
            )
            for point in points
        ],
        right=headings[1:],
    )
    notice("")
    notice("decode in tok/s over all requests, from when each has its first token; first token: of all of them.")
    finish(
        " ".join(["trtkit solve problems.jsonl --endpoint", quoted(remote.endpoint.url), *again]),
        {"points": [asdict(point) for point in points]} if as_json else None,
    )


def _profile(engines: Sequence[Path], options: BenchOptions, *, as_json: bool) -> None:
    from trtkit.bench.engines import check_sources
    from trtkit.bench.profile import KINDS, profile_engine

    check_sources(engines, options)
    found = [profile_engine(directory, batch, options) for directory in engines for batch in options.batches]
    kinds = [kind for kind in KINDS if kind != "exchange" or any(step.kinds[kind] for step in found)]
    headings = ("engine", "batch", "step", *kinds)
    table(
        headings,
        [
            (
                Path(step.engine).name,
                str(step.batch),
                f"{1e3 * step.step_seconds:.2f} ms",
                *(f"{step.kinds[kind] / step.step_seconds:.0%}" for kind in kinds),
            )
            for step in found
        ],
        right=headings[1:],
    )
    notice("")
    phases = ("phases", "batch", "prefill", "draft", "verify", "accept")
    table(
        phases,
        [
            (
                Path(step.engine).name,
                str(step.batch),
                *(f"{1e3 * step.phases.get(name, 0.0):.2f} ms" for name in phases[2:]),
            )
            for step in found
        ],
        right=phases[1:],
    )
    notice("")
    notice("measured under a profiler, which takes time itself: read the shares")
    finish(
        f"trtkit bench --engine {quoted(engines[0])}"
        + ("" if options.tensor_parallel is None else f" --tp {options.tensor_parallel}")
        + (" --lookup" if options.lookup else "")
        + ("" if options.drafter is None else f" --drafter {quoted(options.drafter)}"),
        {"profiles": [step.document() for step in found]} if as_json else None,
    )


def _show_machine(machine: Machine) -> None:
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


def _show_points(points: Sequence[Point]) -> None:
    together = any(point.tensor_parallel > 1 for point in points)
    tp = ("tp",) if together else ()
    headings = ("engine", "precision", "drafter", "batch", *tp, "bytes/step", "ceiling", "decode", "of ceiling",
                "speed-up", "prefill")  # fmt: skip
    table(
        headings,
        [
            (
                Path(point.engine).name,
                point.precision,
                point.drafter or "-",
                str(point.batch),
                *([str(point.tensor_parallel)] if together else []),
                gigabytes(point.step_bytes),
                f"{point.ceiling_tokens_per_second:,.0f}",
                f"{point.tokens_per_second:,.1f}",
                f"{point.roofline_fraction:.1%}",
                "" if point.speedup is None else f"{point.speedup:.2f}x",
                f"{point.prefill_tokens_per_second:,.0f}",
            )
            for point in points
        ],
        right=headings[3:],
    )


def _show_drafting(points: Sequence[Point], *, asked: bool) -> None:
    """How good the drafts are, and where a step's time goes."""
    headings = ("drafting", "batch", "tok/step", "accepted at least 1, 2, ...", "draft", "verify", "accept")
    table(
        headings,
        [
            (
                f"{Path(point.engine).name} {point.drafter}",
                str(point.batch),
                f"{point.tokens_per_step:.2f}",
                " ".join(f"{share:.0%}" for share in point.accepted_by_depth),
                *(f"{1e3 * point.phase_seconds.get(name, 0.0):.2f} ms" for name in headings[4:]),
            )
            for point in points
        ],
        right=(*headings[1:3], *headings[4:]),
    )
    # At a large batch the automatic choice may well be not to draft.
    judged = [point.tokens_per_step for point in points if "auto" not in (point.drafter or "") or point.batch == 1]
    if judged and min(judged) < 1.5:
        notice(
            "warning: below 1.5 tokens per step drafting rarely pays"
            + ("" if asked else "; these were random tokens, measure it on text of its kind: --problems FILE")
        )
