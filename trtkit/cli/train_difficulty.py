"""``trtkit train-difficulty``: a regressor from problem text to the tokens that a sample takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.engines import BUILT, check_replaced
from trtkit.cli.options import Device, Json, Threads
from trtkit.cli.output import facts, finish, notice, quoted

_DEFAULT_MODEL = "answerdotai/ModernBERT-base"


def command(
    data: Annotated[
        list[str],
        typer.Option("--data", help="Run directory, its journal, or JSONL with problem and tokens. Repeatable."),
    ],
    model: Annotated[str, typer.Option("--model", help="Hub id or directory of a ModernBERT.")] = _DEFAULT_MODEL,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the result; default: engines/built/difficulty.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="Passes over the problems.")] = 3.0,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Problems per update.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens of a problem that it sees.")] = 256,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.01, max=0.5, help="Share of the problems to measure on.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Learn from runs how many tokens problems take.

    So that the clock can give hard ones more time.
    """
    from dataclasses import asdict

    from trtkit.difficulty import DIFFICULTY_FILE
    from trtkit.runtime.load import device_named, set_threads
    from trtkit.solve.difficulty import is_run, labels_of_run
    from trtkit.training.difficulty import DifficultyPlan, read_labels, train_difficulty

    labels = [
        label for path in map(Path, data) for label in (labels_of_run(path) if is_run(path) else read_labels(path))
    ]
    plan = DifficultyPlan(
        model=model, epochs=epochs, batch=batch, rate=rate, max_tokens=max_tokens, held_out=held_out, seed=seed
    )
    target = out or BUILT / "difficulty"
    check_replaced(target, force=force, marks=[DIFFICULTY_FILE])
    set_threads(threads)
    report = train_difficulty(plan, labels, target, device=device_named(device), replace_out=force)
    held = report.held_out
    facts(
        "difficulty regressor",
        {
            "directory": str(target),
            "trained on": f"{report.problems - held.problems} problems, {report.updates} updates",
            "measured on": f"{held.problems} other problems",
            "squared error": f"{held.error:.3f} (the mean's: {held.error_of_mean:.3f}), in log-tokens",
            "off by": f"{held.off_by_tokens:,.0f} tokens (the mean: {held.mean_off_by_tokens:,.0f})",
            "rank correlation": f"{held.rank_correlation:.2f}",
            "usable": "yes" if report.usable else "no",
        },
    )
    document = {"difficulty_dir": str(target), "usable": report.usable, **asdict(report)}
    if report.usable:
        finish(
            f"trtkit solve problems.jsonl --time-limit 5h --difficulty {quoted(target)}", document if as_json else None
        )
        return
    notice("warning: on held-out problems this is no better than the mean, so `trtkit solve` will refuse it")
    finish("solve more problems with --full-vote and train on all those runs", document if as_json else None)
