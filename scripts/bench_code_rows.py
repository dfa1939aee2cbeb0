"""What a row that waits for its code costs the others: tok/s of the rest of the batch.

One row of a batch rests while its code runs in the sandbox, over and over until the others have ended: code that
sleeps, or code that keeps a core busy. Beside them the same batch without any code, in turns, medians; the last line is
one JSON document. The decoding takes one thread, so that a second core is free for the code.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from trtkit.build.native import build_native
from trtkit.bundled import PRACTICE, practice_dir
from trtkit.chat import VARIANTS, load_chat
from trtkit.recipe import Recipe
from trtkit.runtime.api import Engine, Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.problems import read_problems
from trtkit.solve.sandbox import Call, Sandbox

CODE = {"sleeping": "import time\ntime.sleep(2)", "busy": "while True: pass"}


def main(
    rows: Annotated[int, typer.Option(min=2)] = 16,
    tokens: Annotated[int, typer.Option(min=16, help="per row")] = 384,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure and print a table."""
    speeds: dict[str, list[float]] = {name: [] for name in ("nothing", *CODE)}
    with tempfile.TemporaryDirectory() as scratch, Sandbox() as sandbox:
        directory = Path(scratch, "engine")
        build_native(Recipe(model=PRACTICE, precision="bf16"), directory)
        with open_engine(directory, OpenOptions(threads=1, rows=rows)) as engine:
            decode(engine, sandbox, rows, tokens, None)  # warms up
            for turn in range(rounds):
                for name, found in speeds.items():
                    found.append(decode(engine, sandbox, rows, tokens, CODE.get(name)))
                print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    print(f"| code of the waiting row | tok/s of the other {rows - 1} | against nothing |")
    print("|---|---|---|")
    for name, speed in middle.items():
        print(f"| {name} | {speed:,.0f} | {speed / middle['nothing'] - 1:+.1%} |")
    print(json.dumps({"rows": rows, "tokens": tokens, "tokens_per_second": speeds}))


def decode(engine: Engine, sandbox: Sandbox, rows: int, tokens: int, code: str | None) -> float:
    """tok/s of all rows but the first, which is put to rest at once and whose ``code`` runs until they have ended."""
    chat = load_chat(practice_dir())
    prompts = [chat.prompt(one.text, VARIANTS["solve"]) for one in read_problems(practice_dir() / "problems.jsonl")]
    for row in range(rows):
        engine.submit(
            Request(
                id=str(row), prompt=prompts[row], sampling=SamplingParams(), max_tokens=tokens, seed=row, hold=row == 0
            )
        )
    engine.step()
    engine.pause("0")
    call = Call(id="0", code=code or "", earlier=())
    if code is not None:
        sandbox.submit(call)
    made, began = 0, time.perf_counter()
    while engine.has_work:
        made += sum(len(output.tokens) for output in engine.step())
        if sandbox.ready() and code is not None:
            sandbox.submit(call)
    seconds = time.perf_counter() - began
    if code is not None:
        sandbox.drop("0")
    engine.cancel("0")
    return made / seconds


if __name__ == "__main__":
    typer.run(main)
