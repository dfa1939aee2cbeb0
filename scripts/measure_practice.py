"""Accuracy of the practice checkpoint per precision on its held-out problems: the table of the README.

Builds an engine for each precision, solves the problems with full votes at temperature 1, prints a markdown table and,
as the last line, one JSON document. About 15 minutes on two CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("bf16", "int8", "int8-sq", "fp8", "int4")


def verb(*arguments: str) -> dict[str, Any]:
    """Run a trtkit verb and return its JSON document; its progress stays on stderr."""
    command = [sys.executable, "-m", "trtkit.cli", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def main(
    work: Annotated[Path, typer.Option(help="where engines and runs go")] = ROOT / "engines" / "built" / "measured",
    samples: Annotated[int, typer.Option(min=1)] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    precision: Annotated[list[str] | None, typer.Option(help="repeatable; default: all five")] = None,
) -> None:
    """Build, solve, tabulate."""
    problems = str(ROOT / "engines" / "practice" / "problems.jsonl")
    rows = []
    for name in precision or PRECISIONS:
        engine, run = work / f"practice-{name}", work / f"run-{name}"
        built = verb("build", "--precision", name, "--out", str(engine), "--force")
        solved = verb(
            "solve", problems, "--engine", str(engine), "--out", str(run), "--samples", str(samples), "--full-vote",
            "--temperature", "1", "--top-p", "1", "--min-p", "0", "--threads", str(threads), "--force-new",
        )  # fmt: skip
        rows.append({"precision": name, "quality": built["quality"], **solved})
    print(f"| precision | pass@1 | maj@{samples} | mean KL to bf16 | tok/s |")
    print("|---|---|---|---|---|")
    for row in rows:
        kl = "" if row["quality"] is None else f"{row['quality']['kl_mean']:.4f}"
        print(
            f"| {row['precision']} | {row['pass_at_1']:.1%} | {row['maj_at_k']:.1%} | {kl} "
            f"| {row['tokens_per_second']:,.0f} |"
        )
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    typer.run(main)
