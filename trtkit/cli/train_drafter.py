"""``trtkit train-drafter``: a draft head for a model, trained and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkit.bundled import PRACTICE, practice_dir
from trtkit.cli.engines import BUILT, DEFAULT_PRECISION, calibration_words, default_engine, stem
from trtkit.cli.options import Device, Json, Model, Threads, refuse_idle
from trtkit.cli.output import facts, finish, notice, quoted, table
from trtkit.errors import InputError, UsageError
from trtkit.recipe import ENGINE_FILE, read_manifest

_SELF = "self"
_FEW = 10
_OBJECTIVES = ("ce", "kd")
_OPTIONS = {
    "rows": "--rows", "split": "--split", "epochs": "--epochs", "rate": "--rate", "objective": "--loss",
    "exit_dim": "--exit-dim", "start_from": "--start-from", "layers": "--layers", "depths": "--depths",
    "window": "--window", "tokens_per_part": "--batch-tokens", "parts": "--parts", "max_tokens": "--max-tokens",
    "seed": "--seed",
}  # fmt: skip
"""What asks for the fields of a plan, beside --model, --data or --problems, and --no-rnn."""


def command(
    context: typer.Context,
    model: Model = PRACTICE,
    data: Annotated[
        str,
        typer.Option("--data", help="openmathreasoning, a JSONL, CSV or Parquet file, or self: its own answers."),
    ] = _SELF,
    problems: Annotated[
        str | None,
        typer.Option("--problems", help="With --data self: whose problems to answer (file or openmathreasoning)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the result; default: engines/built/MODEL-drafter.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Problems to train on.")] = 20_000,
    split: Annotated[str, typer.Option("--split", help="Split of OpenMathReasoning.")] = "cot",
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, max=1000, help="Passes over the rows.")] = 1.0,
    rate: Annotated[float, typer.Option("--rate", min=0, max=1, help="Peak learning rate.")] = 1e-3,
    loss: Annotated[str, typer.Option("--loss", help="ce (the next token) or kd (the model's distribution).")] = "ce",
    exit_dim: Annotated[
        int | None, typer.Option("--exit-dim", min=1, help="Width of the head; default: twice the hidden size.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option("--start-from", help="Trained head to go on from; its shape is kept.")
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=0, help="Residual blocks.")] = 2,
    rnn: Annotated[bool, typer.Option("--rnn/--no-rnn", help="Recurrent state, or a running sum.")] = True,
    depths: Annotated[int, typer.Option("--depths", min=1, help="Tokens to learn to draft.")] = 4,
    window: Annotated[int, typer.Option("--window", min=8, help="Tokens per solution that the loss sees.")] = 2048,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=8, help="Tokens per batch.")] = 8192,
    parts: Annotated[
        int, typer.Option("--parts", min=1, help="Batches per update; under torchrun shared out over the processes.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Longest solution.")] = 4096,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a ReDrafter head for a model.

    It is measured on held-out problems. Run again to go on.
    """
    if loss not in _OBJECTIVES:
        raise UsageError(f"unknown --loss {loss!r}", hint=f"one of: {', '.join(_OBJECTIVES)}")
    own = data == _SELF
    refuse_idle(context, [
        ("openmathreasoning" not in (data, problems), ("--split",), "only with OpenMathReasoning"),
        (start_from is not None, ("--exit-dim", "--layers", "--rnn"), "not with --start-from, whose shape is kept"),
    ])  # fmt: skip
    if problems is not None and not own:
        raise UsageError("--problems only goes with --data self", hint="pass the rows with --data")
    from trtkit.runtime.load import device_named, set_threads
    from trtkit.training.run import TrainingPlan, train_head

    plan = TrainingPlan(
        model=model,
        data=_problem_source(model, problems) if own else data,
        own=own,
        rows=rows,
        split=split,
        start_from=None if start_from is None else str(start_from),
        exit_dim=exit_dim,
        layers=layers,
        rnn=rnn,
        window=window,
        tokens_per_part=batch_tokens,
        parts=parts,
        epochs=epochs,
        rate=rate,
        objective=loss,  # type: ignore[arg-type]  # one of the two
        depths=depths,
        seed=seed,
        max_tokens=max_tokens,
    )
    target = out or BUILT / f"{stem(model)}-drafter"
    set_threads(threads)
    report = train_head(plan, target, device=device_named(device))
    if report is None:  # another process of the same torchrun tells
        return
    facts(
        "draft head",
        {
            "directory": str(target),
            "parameters": f"{report.parameters:,}",
            "trained on": f"{report.train_tokens:,} tokens, {report.updates:,} updates",
            "held out": f"{report.held_out:,} problem(s){', few to judge by' if report.held_out < _FEW else ''}",
        },
    )
    notice("")
    table(
        ("held-out text", *(f"top-1, depth {depth + 1}" for depth in range(depths))),
        [(hits.part, *(f"{share:.1%}" for share in hits.top1)) for hits in report.hits],
        right=[f"top-1, depth {depth + 1}" for depth in range(depths)],
    )
    notice("")
    table(
        ("tree", "temperature", "tokens per step", "whole beam accepted"),
        [(t.tree, f"{t.temperature:g}", f"{t.tokens_per_step:.2f}", f"{t.all_accepted:.1%}") for t in report.trees],
        right=["temperature", "tokens per step", "whole beam accepted"],
    )
    if report.trees and min(t.tokens_per_step for t in report.trees) < 1.5:
        notice(
            "warning: below 1.5 tokens per step a draft head rarely pays; train longer"
            + ("" if own else ", or on --data self")
        )
    document = {"drafter_dir": str(target), **asdict(report)}
    finish(_next_build(model, target), document if as_json else None)


def _next_build(model: str, head: Path) -> str:
    """The engine that the head is for; where it was trained for an engine, that one, from its checkpoint."""
    precision, said = DEFAULT_PRECISION, ""
    if (Path(model) / ENGINE_FILE).is_file():
        recipe = read_manifest(Path(model)).recipe
        model, precision, said = recipe.model, recipe.precision, f"--precision {recipe.precision} "
    there = default_engine(model, precision)
    aside = f" --out {quoted(f'{there}-drafter')}" if there.exists() else ""  # build refuses to write over an engine
    words = calibration_words(model, precision=precision)
    return f"trtkit build {said}--model {quoted(model)} --drafter {quoted(head)}{aside}{words}"


def same_command(plan: Mapping[str, Any], out: str) -> str:
    """The command line of a training, from its plan; or words where it was called from Python and has none."""
    from trtkit.training.plan import TrainingPlan

    defaults = {field.name: field.default for field in fields(TrainingPlan) if field.default is not MISSING}
    changed = {
        name: value
        for name, value in plan.items()
        if name not in ("model", "data", "own") and json.dumps(value) != json.dumps(defaults.get(name), default=asdict)
    }
    if beyond := sorted(changed.keys() - _OPTIONS.keys() - {"rnn"}):
        return f"call train_head as before: the command line has no option for {', '.join(beyond)}"
    words = ["trtkit", "train-drafter", "--model", str(plan.get("model"))]
    words += ["--problems" if plan.get("own") else "--data", str(plan.get("data"))]
    for name, value in changed.items():
        words += ["--no-rnn"] if name == "rnn" else [_OPTIONS[name], str(value)]
    return " ".join(map(quoted, [*words, "--out", out]))


def _problem_source(model: str, problems: str | None) -> str:
    if problems is not None:
        return problems
    if model == PRACTICE:
        return str(practice_dir() / "calibration.jsonl")
    raise InputError(
        "--data self needs problems for the model to answer",
        hint="pass --problems FILE.jsonl, or --problems openmathreasoning",
    )
