"""What long prompts cost: tokens per second, the next turn of a conversation, and how long a running sample waits.

Random token ids, so that an engine without a tokenizer will do. The last line is one JSON document.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from trtkit.runtime.api import Engine, Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine

_ANSWER = 32
"""Tokens of a turn's answer."""


def main(
    engine: Annotated[Path, typer.Option(help="Engine directory.")],
    length: Annotated[list[int] | None, typer.Option(min=64, help="Tokens of a prompt; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Each figure is the best of so many.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Measure and print a table."""
    found: list[dict[str, float]] = []
    with open_engine(engine, OpenOptions(threads=threads, prefix_cache=True, speculative=False)) as opened:
        asker = Asker(opened)
        asker.ask(asker.text(256), 2)  # warms up
        for tokens in length or [256, 2048]:
            turns = [asker.turns(tokens) for _ in range(rounds)]
            gap = min(asker.longest_wait(tokens) for _ in range(rounds))
            first, following = (min(each) for each in zip(*turns, strict=True))
            found.append({"tokens": tokens, "first_seconds": first, "next_turn_seconds": following, "gap_seconds": gap})
            print(f"{tokens} tokens: {rounds} rounds", file=sys.stderr)
    print("| prompt | tok/s | first token | of the next turn | longest wait of a sample beside it |")
    print("|---|---|---|---|---|")
    for each in found:
        times = (f"{each[name]:.2f} s" for name in ("first_seconds", "next_turn_seconds", "gap_seconds"))
        print(f"| {each['tokens']:,} | {each['tokens'] / each['first_seconds']:,.0f} | {' | '.join(times)} |")
    print(json.dumps({"engine": str(engine), "rounds": rounds, "prompts": found}))


class Asker:
    """Prompts that an engine has not seen."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._asked = 0

    def text(self, tokens: int) -> list[int]:
        """Token ids that every vocabulary has."""
        return [self._random.randrange(256) for _ in range(tokens)]

    def submit(self, text: list[int], tokens: int) -> str:
        """Ask for so many tokens; the request's name."""
        self._asked += 1
        name = str(self._asked)
        self._engine.submit(
            Request(id=name, prompt=tuple(text), sampling=SamplingParams(), max_tokens=tokens, seed=self._asked)
        )
        return name

    def ask(self, text: list[int], tokens: int) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer."""
        self.submit(text, tokens)
        began, first, answer = time.perf_counter(), 0.0, []
        while self._engine.has_work:
            for output in self._engine.step():
                first = first or time.perf_counter() - began
                answer += output.tokens
        return first, answer

    def turns(self, tokens: int) -> tuple[float, float]:
        """Seconds to the first token of a prompt, and of a second turn behind its answer."""
        text = self.text(tokens)
        first, answer = self.ask(text, _ANSWER)
        return first, self.ask([*text, *answer, *self.text(16)], 1)[0]

    def longest_wait(self, tokens: int) -> float:
        """Seconds between two tokens of a sample at most, while a prompt of so many tokens is computed."""
        running = self.submit(self.text(64), 256)
        for _ in range(8):
            self._engine.step()
        long = self.submit(self.text(tokens), 1)
        gaps, last, waits = [], time.perf_counter(), True
        while waits:
            for output in self._engine.step():
                waits = waits and output.request_id != long
                if output.request_id == running:
                    gaps.append(time.perf_counter() - last)
                    last = time.perf_counter()
        self._engine.cancel(running)
        while self._engine.has_work:
            self._engine.step()
        return max(gaps)


if __name__ == "__main__":
    typer.run(main)
