"""Make the practice checkpoint: its tokenizer, its training run, its problem files, its measured accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
PRACTICE = Path(__file__).resolve().parent.parent / "engines" / "practice"


@app.command()
def tokenizer(out: Annotated[Path, typer.Option(help="folder for tokenizer.json")] = PRACTICE) -> None:
    """Train the tokenizer. A model belongs to its tokenizer: do this once, before training."""
    from practice.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(), out)


@app.command()
def train(
    updates: Annotated[int, typer.Option(min=1, help="number of updates")] = 4_000,
    tokens_per_update: Annotated[int, typer.Option(min=512)] = 1536,
    seed: int = 1,
    muon_rate: Annotated[float, typer.Option(help="peak rate of the matrices")] = 0.004,
    adam_rate: Annotated[float, typer.Option(help="peak rate of everything else")] = 0.002,
    export_every: Annotated[int, typer.Option(min=1)] = 750,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    work: Annotated[Path, typer.Option(help="folder for the resumable state and the log")] = Path("build/practice"),
    start_from: Annotated[
        Path | None, typer.Option(help="checkpoint folder, or state.pt of a run, to start from")
    ] = None,
    out: Path = PRACTICE,
) -> None:
    """Train, or continue an interrupted run."""
    import torch
    from practice.training import Plan
    from practice.training import train as run

    torch.set_num_threads(threads)
    plan = Plan(
        updates=updates,
        tokens_per_update=tokens_per_update,
        seed=seed,
        muon_rate=muon_rate,
        adam_rate=adam_rate,
        embedding_rate=5 * adam_rate,
        continued=start_from is not None,
        export_every=export_every,
    )
    run(plan, work, PRACTICE, out, start_from)


@app.command()
def problems(
    split: Annotated[str, typer.Option(help="train, heldout or demo")] = "train",
    count: Annotated[int, typer.Option(min=0, help="0: write the three bundled files instead")] = 0,
    seed: int = 1,
    with_solutions: Annotated[bool, typer.Option(help="rows in OpenMathReasoning's schema")] = False,
    out: Annotated[Path, typer.Option(help="a .jsonl file, or the folder of the bundled files")] = PRACTICE,
) -> None:
    """Write problems: the bundled files, or any number of a split."""
    from practice.files import write_bundled, write_drawn
    from practice.problems import SPLITS

    if split not in SPLITS:
        raise SystemExit(f"no split {split!r}\nhint: one of {', '.join(SPLITS)}")
    if count == 0:
        write_bundled(out)
    elif out.suffix != ".jsonl":
        raise SystemExit(f"{out} is no .jsonl file\nhint: give --out FILE.jsonl with --count")
    else:
        write_drawn(out, split=split, count=count, seed=seed, solutions=with_solutions)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="checkpoint folder")] = PRACTICE,
    problems: Annotated[Path, typer.Option(help="JSONL with problem, answer, family")] = PRACTICE / "problems.jsonl",
    samples: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[int, typer.Option(help="use the first N problems only")] = 0,
    seed: int = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
) -> None:
    """Measure greedy, pass@1 and majority accuracy per family; the last line is JSON."""
    import json
    from dataclasses import asdict

    import torch
    from practice.checkpoint import load_model
    from practice.evaluate import evaluate as measure
    from practice.files import read_rows
    from practice.tokenizer import load_tokenizer

    torch.set_num_threads(threads)
    rows = read_rows(problems)[: limit or None]
    scores = measure(load_model(model), load_tokenizer(model), rows, samples=samples, seed=seed)
    print("| family | problems | greedy | pass@1 | maj@" + str(samples) + " | no answer |\n|---|---|---|---|---|---|")
    for name, score in scores.items():
        shares = (score.greedy, score.pass_at_1, score.majority, score.unfinished)
        print(f"| {name} | {score.problems} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    print(json.dumps({name: asdict(score) for name, score in scores.items()}))


if __name__ == "__main__":
    app()
