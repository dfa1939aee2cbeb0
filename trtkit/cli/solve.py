"""``trtkit solve``: problems to voted answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtkit.cli.engines import chosen_engine, stem
from trtkit.cli.options import (
    ChosenThreads,
    Device,
    Drafter,
    Json,
    LookUp,
    OutputLayer,
    ServerModel,
    ServerSeeds,
    ServerTokenizer,
    ServerUrl,
    TensorParallel,
    Tree,
    drafting_named,
    idle_beside_server,
    out_of_range_is_usage,
    refuse_idle,
    server_named,
)
from trtkit.cli.output import facts, finish, notice, quoted, show

if TYPE_CHECKING:
    from trtkit.solve.options import SolveOptions
    from trtkit.solve.run import Outcome
    from trtkit.solve.sandbox import SandboxOptions


def command(
    context: typer.Context,
    problems: Annotated[Path, typer.Argument(help="JSONL or CSV: id, problem, and the answer if it is known.")],
    engine: Annotated[
        Path | None, typer.Option("--engine", help="Engine directory; default: the latest in engines/built.")
    ] = None,
    endpoint: ServerUrl = None,
    endpoint_model: ServerModel = None,
    endpoint_seeds: ServerSeeds = True,
    tokenizer: ServerTokenizer = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the result; default: runs/PROBLEMS-ENGINE.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Samples per problem.")] = 32,
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
    switch_penalty: Annotated[
        str | None,
        typer.Option("--switch-penalty", help="ALPHA,BETA[,WORD...]: hold each thought for BETA tokens, e.g. 3,600."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same samples.")] = 0,
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time-limit", help="For everything: 90s, 10m, 5h, or just seconds. Past it, answers come at once."
        ),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option("--reserve", help="Time of the limit to keep back, e.g. 3m; default: 1 % of it."),
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option("--difficulty", help="From train-difficulty: harder problems get more of the clock.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="competition: sequential, stop rules, everything is answered.")
    ] = None,
    order: Annotated[
        str | None, typer.Option("--order", help="pooled (default, all in one batch) or sequential (one at a time).")
    ] = None,
    together: Annotated[
        int | None,
        typer.Option("--together", min=0, help="Pooled: samples of one problem that run at once; default: 8, 0: all."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            help="Rules beside 'unassailable', e.g. 'beta(0.95)+stragglers(2)', or none; "
            "default: certificate(0.05). Repeatable.",
        ),
    ] = None,
    full_vote: Annotated[
        bool, typer.Option("--full-vote", help="Run every sample to its end, to measure pass@1.")
    ] = False,
    stop_at: Annotated[
        str, typer.Option("--stop-at", help="A sample ends at: think (</think>), first-box or eos (end of turn).")
    ] = "think",
    kill_loops: Annotated[
        bool | None, typer.Option("--kill-loops/--no-kill-loops", help="End samples that go in circles; default: yes.")
    ] = None,
    force_close: Annotated[
        bool | None,
        typer.Option(
            "--force-close/--no-force-close", help="Make samples answer whose budget or time is spent; default: yes."
        ),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            "--probe", help="EVERY,TIMES: ask samples every so many tokens; equal answers in a row end one, e.g. 512,3."
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option("--weights", help="Votes weigh by: majority, finish, length, confidence; '+damped' for guesses."),
    ] = "majority",
    default_answer: Annotated[
        str | None, typer.Option("--default-answer", help="What is answered where no sample gave an answer.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Prompt variant: solve, reason, system, nemotron, python. Repeat to mix several over the samples.",
        ),
    ] = None,
    tools: Annotated[
        str | None, typer.Option("--tools", help="python: run the code that samples write, in a sandbox.")
    ] = None,
    tool_calls: Annotated[int, typer.Option("--tool-calls", min=1, help="Code blocks that a sample may have run.")] = 6,
    tool_seconds: Annotated[float, typer.Option("--tool-seconds", min=0.1, help="Longest run of one block.")] = 2.0,
    tools_unsafe: Annotated[
        bool, typer.Option("--tools-unsafe", help="Run code even where it can reach the network or files.")
    ] = False,
    answer_mode: Annotated[str, typer.Option("--answer-mode", help="auto or integer.")] = "auto",
    modulus: Annotated[int | None, typer.Option("--modulus", help="Reduce integer answers by it (AIMO: 1000).")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Most rows in flight.")] = None,
    tree: Tree = "auto",
    drafter: Drafter = None,
    lookup: LookUp = False,
    device: Device = "auto",
    tensor_parallel: TensorParallel = None,
    threads: ChosenThreads = None,
    output_layer: OutputLayer = None,
    save_text: Annotated[bool, typer.Option("--save-text", help="Keep each sample's text.")] = False,
    save_confidence: Annotated[
        bool, typer.Option("--save-confidence", help="Keep each sample's mean log-probability, for revote.")
    ] = False,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Throw away the run that --out holds and start over.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Solve problems by majority vote. Interrupt it at any time: the same command goes on from there."""
    began = time.monotonic()

    from trtkit.chat import VARIANTS, prompt_names
    from trtkit.errors import OutputError, UsageError
    from trtkit.interrupts import sigterm_as_interrupt
    from trtkit.log import logger
    from trtkit.recipe import BUNDLE_FILE, ENGINE_FILE
    from trtkit.runtime.api import SamplingParams
    from trtkit.runtime.processors import read_switch_penalty
    from trtkit.runtime.sources import DirectorySource
    from trtkit.solve.answers import AnswerMode
    from trtkit.solve.clock import parse_duration
    from trtkit.solve.difficulty import predict_tokens
    from trtkit.solve.options import SolveOptions
    from trtkit.solve.policy import policy_named
    from trtkit.solve.probe_options import read_probe
    from trtkit.solve.problems import read_problems, refuse_directory

    drafting = drafting_named(context, tree=tree, drafter=drafter, lookup=lookup)
    refuse_directory(problems)
    directory = None if endpoint is not None else chosen_engine(engine)
    defaults = SolveOptions()
    limit = parse_duration(time_limit, "--time-limit") if time_limit is not None else None
    chosen: dict[str, Any] = {} if policy is None else dict(policy_named(policy, time_limit=limit))
    waves = "only in pooled runs, without --time-limit and --full-vote: elsewhere all samples of a problem run at once"
    pooled = (order or chosen.get("order", defaults.order)) == "pooled" and limit is None and not full_vote
    refuse_idle(context, [
        (tools is None, ("--tool-calls", "--tool-seconds", "--tools-unsafe"), "only with --tools python"),
        (full_vote and bool(kill_loops), ("--kill-loops",), "not with --full-vote, which runs every sample to its end"),
        (full_vote and bool(force_close), ("--force-close",), "not with --full-vote, which forces no answer"),
        (full_vote and stop != ["none"], ("--stop",), "not with --full-vote, which uses no stop rule"),
        (not pooled, ("--together",), waves),
        *idle_beside_server(endpoint, "--engine"),
    ])  # fmt: skip
    code = _tools_named(tools, calls=tool_calls, seconds=tool_seconds, unsafe=tools_unsafe)
    fitting = prompt_names(tools=code is not None)
    variants = tuple(prompt) if prompt else fitting if code else defaults.variants
    given: dict[str, Any] = {"order": order, "together": together, "stop": tuple(stop or ()) or None}
    given |= {"kill_loops": kill_loops, "force_close": force_close}
    given |= {"default_answer": default_answer, "probe": None if probe is None else read_probe(probe)}
    chosen |= {name: value for name, value in given.items() if value is not None}

    def options(sampling: SamplingParams) -> SolveOptions:
        return SolveOptions(
            samples=samples,
            max_tokens=max_tokens,
            sampling=sampling,
            variants=variants,
            seed=seed,
            mode=AnswerMode(kind=answer_mode, modulus=modulus),  # type: ignore[arg-type]  # checked there
            full_vote=full_vote,
            stop_at=stop_at,  # type: ignore[arg-type]
            weighting=weights,
            outstanding=2 * batch if batch else defaults.outstanding,
            time_limit=limit,
            reserve=parse_duration(reserve, "--reserve") if reserve is not None else None,
            policy=policy,
            tools=code,
            save_text=save_text,
            save_confidence=save_confidence,
            output_layer=output_layer,  # type: ignore[arg-type]  # checked there
            **chosen,
        )

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    if difficulty is not None and limit is None:
        raise UsageError("--difficulty scales the shares of a clock", hint="give it one, e.g. --time-limit 5h")
    with out_of_range_is_usage():
        options(SamplingParams(**sampling))  # type: ignore[arg-type]  # refused before anything is read
    rows = read_problems(problems) if directory is None else []
    source = (
        server_named(endpoint or "", model=endpoint_model, seeds=endpoint_seeds, tokenizer=tokenizer)
        if directory is None
        else DirectorySource.of(directory)  # a wrong directory is told as such, before its tokenizer is missed
    )
    if source.greedy and not prompt:
        variants = fitting
    rows = rows or read_problems(problems)
    if difficulty is not None:
        chosen["difficulty"] = predict_tokens(difficulty, rows)
    chat = source.chat
    with out_of_range_is_usage():
        switch = None if switch_penalty is None else read_switch_penalty(switch_penalty, chat.encode, chat.decode)
    told = [name for name in variants if VARIANTS[name].tools] if code is None else []
    if told:
        logger.warning("note: --prompt %s tells the model that its code runs, and without --tools it does not", told[0])
    final = options(SamplingParams(**sampling, switch=switch))  # type: ignore[arg-type]
    for text in source.notices(final.sampling, logprobs=final.wants_logprobs):
        logger.warning("note: %s", text)
    if time_limit and limit:
        _tell_limit(time_limit, limit, len(rows))
    name = stem(source.model) if directory is None else directory.resolve().name
    target = out or Path("runs") / f"{problems.stem}-{name}"
    if target.exists() and not target.is_dir():
        raise OutputError("is a file, not a directory", where=str(target), hint="choose another --out")
    if any((target / name).is_file() for name in (ENGINE_FILE, BUNDLE_FILE)):  # where the run would be lost with it
        raise UsageError("is an engine or a bundle, no place for a run", where=str(target), hint="choose another --out")

    from trtkit.runtime.load import OpenOptions
    from trtkit.solve.display import observer_for, result_table
    from trtkit.solve.run import Places, run_solve

    opening = OpenOptions(
        device=device, threads=threads, rows=batch, output_layer=final.output_layer, tensor_parallel=tensor_parallel,
        **drafting,
    )  # fmt: skip
    with sigterm_as_interrupt():
        outcome = run_solve(
            Places(problems=problems, engine=source.place, out=target),
            lambda: source.open(opening, patient=limit is not None),
            chat,
            final,
            observer=observer_for(quiet=not logger.isEnabledFor(20)),
            force_new=force_new,
            began=began,
        )
    show(result_table(outcome.verdicts))
    notice("")
    facts("summary", _shown(outcome, final, target))
    finish(f"trtkit report {quoted(target)}", outcome.summary.document() if as_json else None)


def _tools_named(name: str | None, *, calls: int, seconds: float, unsafe: bool) -> SandboxOptions | None:
    """What ``--tools`` and its companions ask for; None without it."""
    from trtkit.errors import UsageError
    from trtkit.solve.sandbox import SandboxOptions

    if name not in (None, "python"):
        raise UsageError(f"unknown tools {name!r}", where="--tools", hint="python")
    if name is None:
        return None
    return SandboxOptions(calls=calls, seconds=seconds, unsafe=unsafe)


def _tell_limit(text: str, seconds: float, problems: int) -> None:
    """Say what a time limit comes to, before minutes pass under the wrong one."""
    from trtkit.log import format_seconds, logger

    each = seconds / problems
    logger.info(
        "time limit: %s for %d problem(s), loading included: %s each on average",
        format_seconds(seconds), problems, format_seconds(each),
    )  # fmt: skip
    if each < 1 and not text.strip()[-1].isalpha():
        logger.warning("note: --time-limit %s counts seconds; write %sm or %sh for minutes or hours", text, text, text)


def _shown(outcome: Outcome, options: SolveOptions, target: Path) -> dict[str, str]:
    """The figures of a run, for people."""
    summary, weighting = outcome.summary, options.votes.text
    shown = {"answered": f"{summary.answered} of {summary.problems} problems"}
    if summary.defaulted:
        shown["answered"] += f", {summary.defaulted} with the default answer"
    if summary.accuracy is not None and summary.pass_at_1 is not None:
        vote = f"maj@{summary.samples}"
        if weighting != "majority":  # then the accuracy is not that of the plain majority
            vote = f"votes by {weighting}; {vote} {summary.maj_at_k:.1%}"
        shown["accuracy"] = f"{summary.accuracy:.1%} ({vote}; pass@1 {summary.pass_at_1:.1%})"
    shown["stopped early"] = f"{summary.stopped_early} problems"
    if summary.time_limit is not None:
        shown["stopped early"] += f", {summary.out_of_time} of them by the clock"
        used = summary.seconds + summary.loading_seconds
        shown["time"] = (
            f"{used:.1f} of {summary.time_limit:.1f} s, {summary.loading_seconds:.1f} of them to start; "
            f"a problem was given {summary.share_seconds or 0.0:.1f} s on average"
        )
    shown["samples"] = (
        f"{summary.answers_per_problem:.1f} answers per problem; {summary.forced} made to answer, "
        f"{summary.looped} ended in a loop, {summary.cancelled} cancelled"
    )
    if options.probe is not None and options.probe.times:
        shown["samples"] += f"; {summary.settled} said the same answer {options.probe.times} times"
    shown["tokens"] = f"{summary.tokens:,} in {summary.seconds:.1f} s: {summary.tokens_per_second:,.0f} tok/s"
    if options.tools is not None:
        calls = [attempt.tool_calls for verdict in outcome.verdicts for attempt in verdict.solution.attempts]
        ran = f"{sum(calls)} blocks run, by {sum(map(bool, calls))} of {len(calls)} samples"
        shown["code"] = ran if any(calls) else "no sample wrote a block to run"
    engine = summary.engine
    if engine is not None and engine.tokens_per_step is not None:
        shown["engine"] = f"{engine.tokens_per_step:.2f} tokens per step, at most {engine.peak_rows} rows"
        if engine.accepted_by_depth:
            shares = ", ".join(f"{share:.0%}" for share in engine.accepted_by_depth)
            shown["engine"] += f"; drafts in {engine.drafting or 0.0:.0%} of them, accepted by depth: {shares}"
        if engine.phase_seconds:
            phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in engine.phase_seconds.items())
            shown["phases"] = phases
    shown["files"] = f"{target}/solutions.jsonl, journal.jsonl, run.json, summary.json"
    return shown
