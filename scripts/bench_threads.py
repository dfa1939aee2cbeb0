"""What another process costs a decode on the CPU: tok/s with all threads, with one fewer and with the number chosen.

Beside nothing; beside one process that keeps a core busy; beside one per core at low priority. In turns, medians; the
last line is one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from trtkit.build.native import build_native
from trtkit.bundled import PRACTICE
from trtkit.recipe import Recipe, read_manifest
from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine

BUSY = "while True: pass"


def main(
    engine: Annotated[Path | None, typer.Option(help="Engine directory; default: the practice model in bf16.")] = None,
    rows: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=16, help="per row")] = 384,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure and print a table."""
    most = torch.get_num_threads()
    threads = {f"{most} threads": most, f"{max(1, most - 1)}": max(1, most - 1), "chosen": None}
    others = {"nothing": (0, 0), "a busy process": (1, 0), "one per core, nice 15": (most, 15)}
    speeds: dict[str, dict[str, list[float]]] = {other: {name: [] for name in threads} for other in others}
    with tempfile.TemporaryDirectory() as scratch:
        directory = engine or Path(scratch, "engine")
        if engine is None:
            build_native(Recipe(model=PRACTICE, precision="bf16"), directory)
        decode(directory, rows, 16, None)  # warms up
        for turn in range(rounds):
            for other, (count, niceness) in others.items():
                for name, number in threads.items():
                    torch.set_num_threads(most)  # what an engine's own choice begins with
                    with beside(count, niceness):
                        speeds[other][name].append(decode(directory, rows, tokens, number))
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    print(f"| beside | {' | '.join(threads)} |")
    print(f"|---{'|---' * len(threads)}|")
    for other, found in speeds.items():
        print(f"| {other} | {' | '.join(f'{statistics.median(each):,.0f}' for each in found.values())} |")
    print(json.dumps({"rows": rows, "tokens": tokens, "threads": most, "tokens_per_second": speeds}))


@contextlib.contextmanager
def beside(count: int, niceness: int) -> Iterator[None]:
    """So many processes at work."""
    started = [
        subprocess.Popen([sys.executable, "-c", f"import os; os.nice({niceness})\n{BUSY}"]) for _ in range(count)
    ]
    try:
        time.sleep(0.3 if started else 0.0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def decode(directory: Path, rows: int, tokens: int, threads: int | None) -> float:
    """tok/s of a full batch from its first step on."""
    vocab = 250  # of any model here
    limit = read_manifest(directory).recipe.limits.total_tokens
    with open_engine(directory, OpenOptions(device="cpu", threads=threads, rows=rows, speculative=False)) as engine:
        for row in range(rows):
            prompt = tuple((7 * row + 3 * place) % vocab for place in range(16))
            length = min(tokens, limit - len(prompt))
            engine.submit(Request(id=str(row), prompt=prompt, sampling=SamplingParams(), max_tokens=length, seed=row))
        made, began = 0, time.perf_counter()
        while engine.has_work:
            made += sum(len(output.tokens) for output in engine.step())
        seconds = time.perf_counter() - began
    return made / seconds


if __name__ == "__main__":
    typer.run(main)
