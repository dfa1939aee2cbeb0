"""What HTTP costs: tok/s of `trtkit serve` beside the same requests on an engine in this process.

So many clients at once, each asking again when it is answered, through OpenAI's own client: answers whole, and as
streams. The engine decodes with one thread, so that on two cores the clients have one of their own. Rounds take turns,
medians; the last line is one JSON document.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import AsyncOpenAI

from trtkit.build.native import build_native
from trtkit.bundled import PRACTICE, practice_dir
from trtkit.chat import load_chat
from trtkit.recipe import Recipe
from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve.problems import read_problems

SAMPLING = {"temperature": 1.0, "top_p": 0.9}


def main(
    engine: Annotated[Path | None, typer.Option(help="Engine directory; default: the practice model in bf16.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="At once; repeatable. Default: 1, 8, 32.")] = None,
    each: Annotated[int, typer.Option(min=1, help="Requests of each client.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Measure and print a table."""
    clients = clients or [1, 8, 32]
    found: dict[str, dict[int, list[float]]] = {
        kind: {n: [] for n in clients} for kind in ("direct", "whole", "stream")
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = engine or Path(scratch, "engine")
        if engine is None:
            build_native(Recipe(model=PRACTICE, precision="bf16"), directory)
        with served(directory, max(clients)) as (url, model):
            for turn in range(rounds):
                for count in clients:
                    found["direct"][count].append(direct(directory, count, count * each, tokens))
                    for kind in ("whole", "stream"):
                        speed = asyncio.run(over_http(url, model, count, each, tokens, stream=kind == "stream"))
                        found[kind][count].append(speed)
                print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    print(f"| clients | {' | '.join(found)} |")
    print("|---" * (len(found) + 1) + "|")
    for count in clients:
        middle = {kind: statistics.median(speeds[count]) for kind, speeds in found.items()}
        shown = [f"{speed:,.0f} ({speed / middle['direct']:.0%})" for speed in middle.values()]
        print(f"| {count} | {' | '.join(shown)} |")
    print(json.dumps({"tokens": tokens, "each": each, "tokens_per_second": found}))


@contextmanager
def served(directory: Path, rows: int) -> Iterator[tuple[str, str]]:
    """(URL, model) of a server in a process of its own."""
    command = [sys.executable, "-m", "trtkit.cli", "--quiet", "serve", str(directory), "--port", "0", "--json"]
    command += ["--threads", "1", "--batch", str(rows), "--tree", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = next((line for line in server.stdout if line.startswith("{")), None)
        if line is None:
            raise SystemExit("the server did not start")
        document = json.loads(line)
        try:
            yield document["url"], document["models"][0]
        finally:
            server.terminate()


def texts(directory: Path) -> list[str]:
    return [problem.text for problem in read_problems(practice_dir() / "problems.jsonl")]


def direct(directory: Path, rows: int, requests: int, tokens: int) -> float:
    """tok/s of the engine alone, asked for the same, all at once."""
    chat, problems = load_chat(directory), texts(directory)
    with open_engine(directory, OpenOptions(threads=1, rows=rows, speculative=False)) as engine:
        for name, count, length in (("warm", rows, 8), ("timed", requests, tokens)):
            for number in range(count):
                prompt = chat.conversation([{"role": "user", "content": problems[number % len(problems)]}])
                engine.submit(
                    Request(
                        id=f"{name}/{number}", prompt=prompt, sampling=SamplingParams(**SAMPLING), max_tokens=length,
                        seed=number,
                    )
                )  # fmt: skip
            began, made = time.perf_counter(), 0
            while engine.has_work:
                made += sum(len(output.tokens) for output in engine.step())
        return made / (time.perf_counter() - began)


async def over_http(url: str, model: str, clients: int, each: int, tokens: int, *, stream: bool) -> float:
    """tok/s of so many clients together."""
    problems = texts(practice_dir())
    async with AsyncOpenAI(base_url=url, api_key="any", timeout=3600) as client:

        async def ask(number: int, length: int) -> int:
            asked: dict[str, Any] = {
                "model": model, "messages": [{"role": "user", "content": problems[number % len(problems)]}],
                "seed": number, "max_tokens": length, **SAMPLING, "extra_body": {"ignore_eos": True, "min_p": 0},
            }  # fmt: skip
            if not stream:
                return (await client.chat.completions.create(**asked)).usage.completion_tokens
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            made = 0
            async for chunk in await client.chat.completions.create(**asked):
                made += chunk.usage.completion_tokens if chunk.usage else 0
            return made

        async def stay(place: int) -> int:
            return sum([await ask(place + clients * turn, tokens) for turn in range(each)])

        await asyncio.gather(*(ask(number, 8) for number in range(clients)))
        began = time.perf_counter()
        made = await asyncio.gather(*map(stay, range(clients)))
        return sum(made) / (time.perf_counter() - began)


if __name__ == "__main__":
    typer.run(main)
