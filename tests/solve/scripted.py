"""A small world for solver tests: problems whose samples follow from their seeds, and a run to kill.

``python -m tests.solve.scripted PROBLEMS ENGINE_DIR OUT SECONDS_PER_STEP STOP`` is a run in its own process.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tests.fakes import EOS_ID, FakeChat, FakeEngine
from trtkit.chat import Chat
from trtkit.runtime.api import Request, StepOutput
from trtkit.solve.options import SolveOptions
from trtkit.solve.run import Outcome, Places, run_solve

CHAT = cast(Chat, FakeChat())


def say(request: Request, chat: Any = CHAT) -> Sequence[int]:
    """What the sample says: mostly the right answer 7, else 8, 9 or nothing, sometimes without an end."""
    rng = random.Random(request.seed)
    if bytes(token for token in request.prompt if token < 256).endswith(b"\\boxed{"):  # made to answer
        return [*chat.encode(rng.choice("7789") + "}. And so on")]
    thought = "thinking " * rng.randint(1, 6)
    answer = rng.choice(["7", "7", "7", "7", "8", "9", None])
    text = thought + (f"\\boxed{{{answer}}}" if answer else "I give up")
    ending = rng.choice(["</think>", "</think>", "</think>", "eos", "cap"])
    tokens = [*chat.encode(text + ("</think>" if ending == "</think>" else ""))]
    return [*tokens, EOS_ID] if ending == "eos" else tokens


class SlowEngine(FakeEngine):
    """A fake engine that takes its time, so that a run can be killed in the middle."""

    def __init__(self, seconds_per_step: float) -> None:
        super().__init__(say, rows=6, burst=3)
        self._seconds = seconds_per_step

    def step(self) -> list[StepOutput]:
        time.sleep(self._seconds)
        return super().step()


def write_problems(path: Path, count: int) -> Path:
    rows = [{"id": f"p{n}", "problem": f"problem {n}", "answer": "7"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_engine(directory: Path) -> Path:
    """An engine directory as far as a run's identity is concerned."""
    directory.mkdir()
    (directory / "engine.json").write_text('{"version": 1}')
    return directory


def options_with(stop: str = "none") -> SolveOptions:
    """Nine samples under one more stop rule than ``unassailable``."""
    return SolveOptions(samples=9, outstanding=20, stop=(stop,))


def run(places: Places, options: SolveOptions | None = None, *, seconds_per_step: float = 0.0, **more: Any) -> Outcome:
    # No stop rule but unassailable: others look at samples in order of arrival, which an interruption changes.
    options = options or options_with()
    return run_solve(places, lambda: SlowEngine(seconds_per_step), CHAT, options, **more)


def places_in(directory: Path, problems: int) -> Places:
    """Problems and an engine in that directory, to be run into its ``run``."""
    return Places(
        problems=write_problems(directory / "problems.jsonl", problems), engine=write_engine(directory / "engine"),
        out=directory / "run",
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers(places: Places) -> list[tuple[str, str | None]]:
    return [(row["id"], row["answer"]) for row in rows(places.out / "solutions.jsonl")]


def outcomes(places: Places) -> list[dict[str, Any]]:
    """The solutions without what counts time and unfinished work."""
    return [
        {name: value for name, value in row.items() if name not in ("tokens", "seconds")}
        for row in rows(places.out / "solutions.jsonl")
    ]


if __name__ == "__main__":
    problems, engine, out, seconds, stop = sys.argv[1:]
    run(
        Places(problems=Path(problems), engine=Path(engine), out=Path(out)),
        options_with(stop),
        seconds_per_step=float(seconds),
    )
