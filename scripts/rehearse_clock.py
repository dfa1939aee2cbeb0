"""A competition rehearsal on practice problems: the time bank beside an even split of the same limit.

One problem after the other, a limit too short for full budgets, the competition policy. "Even" gives every problem the
same share and nothing to draw; "even, plain" is that without stop rules and forced answers. Each run is a process of
its own, whose start counts; the last line is one JSON document.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trtkit.cli.app import main as trtkit
from trtkit.solve.clock import TimeBudget

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ("--stop", "none", "--no-force-close")
KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {"bank": (False, ()), "even": (True, ()), "even, plain": (True, PLAIN)}
"""Whether the limit is split evenly, and what is said besides."""


def main(
    work: Annotated[Path, typer.Option(help="where engine, problems and runs go")] = ROOT / "runs" / "rehearsal",
    limit: Annotated[str, typer.Option(help="time limit of each run: 90s, 10m; a plain number counts seconds")] = "20s",
    count: Annotated[int, typer.Option(min=1, help="problems")] = 50,
    samples: Annotated[int, typer.Option(min=1, help="samples per problem")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="runs with each clock")] = 1,
) -> None:
    """Build, solve, tabulate."""
    work = work.resolve()  # everything below runs in the repository
    work.mkdir(parents=True, exist_ok=True)
    problems, engine = work / "problems.jsonl", work / "engine"
    subprocess.run(
        [sys.executable, "scripts/train_practice.py", "problems", "--split", "heldout", "--count", str(count), "--out",
         str(problems)], cwd=ROOT, check=True,
    )  # fmt: skip
    document("build", "--precision", "bf16", "--out", str(engine), "--force")
    common = ("--engine", str(engine), "--samples", str(samples), "--threads", "1", "--force-new")
    full = document("solve", str(problems), *common, "--full-vote", "--out", str(work / "full"))
    print(f"full vote of the same problems: {full['accuracy']:.0%} right, {full['seconds']:.1f} s\n")
    print("| clock | answered by vote | accuracy | answers per problem | made to answer | time |")
    print("|---|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    for _ in range(rounds):
        for kind, (even, more) in KINDS.items():
            clock = ("--time-limit", limit, "--policy", "competition")
            out = ("--out", str(work / kind.replace(", ", "-")))
            run = document("solve", str(problems), *common, *clock, *more, *out, even=even)
            used = run["seconds"] + run["loading_seconds"]
            print(
                f"| {kind} | {run['answered']} of {run['problems']} | {run['accuracy']:.0%} "
                f"| {run['answers_per_problem']:.1f} | {run['forced']} | {used:.1f} of {run['time_limit']:.0f} s |"
            )
            found.append({"clock": kind, **run})
    print(json.dumps({"full_vote": full, "runs": found}))


def document(*arguments: str, even: bool = False) -> dict[str, Any]:
    """What a trtkit verb says with --json, in a process of its own."""
    command = [sys.executable, __file__, "even" if even else "bank", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def split_evenly() -> None:
    """Give every problem of this process limit / problems, and no bank to draw from."""
    published = TimeBudget.of

    def of(limit_seconds: float, problems: int, reserve_seconds: float | None = None) -> TimeBudget:
        reserve = published(limit_seconds, problems, reserve_seconds).reserve_seconds
        return TimeBudget(
            limit_seconds=limit_seconds, reserve_seconds=reserve, base_seconds=(limit_seconds - reserve) / problems,
            draw_seconds=0.0,
        )  # fmt: skip

    TimeBudget.of = of


if __name__ == "__main__":
    if sys.argv[1:2] in (["even"], ["bank"]):
        if sys.argv.pop(1) == "even":
            split_evenly()
        trtkit()
    else:
        typer.run(main)
