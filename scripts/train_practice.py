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
    updates: Annotated[int, typer.Option(min=1, help="number of updates")] = 5_800,
    tokens_per_update: Annotated[int, typer.Option(min=512)] = 2048,
    seed: int = 1,
    muon_rate: float = 0.008,
    adam_rate: float = 0.003,
    decay_share: Annotated[float, typer.Option(help="share of the run in which the rate falls to zero")] = 0.5,
    export_every: Annotated[int, typer.Option(min=1)] = 750,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 1,
    work: Annotated[Path, typer.Option(help="folder for the resumable state and the log")] = Path("build/practice"),
    start_from: Annotated[Path | None, typer.Option(help="state.pt of a run to start from")] = None,
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
        decay_share=decay_share,
        export_every=export_every,
    )
    run(plan, work, PRACTICE, out, start_from)


if __name__ == "__main__":
    app()
