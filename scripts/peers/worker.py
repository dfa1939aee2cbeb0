"""What every worker does around its engine: the protocol, the timing, the checks. Standard library only.

A worker is a module run in its peer's own environment, ``python -P -m peers.llama TASK.json``, once to prepare a
variant (convert the checkpoint) and once per process to measure it. It answers with one JSON line on stdout; whatever
its libraries print goes to stderr. ``-P`` keeps this folder off the module path, where ``openvino.py`` would hide
OpenVINO.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peers.machine import ForeignLoad

__all__ = ["Mark", "Opened", "Outcome", "Point", "Task", "directory_bytes", "run_worker"]

_WARM_UP = 16
"""Prompt tokens of the warm-up."""
Mark = Callable[[int], None]
"""Called after every step of the whole batch with the tokens generated so far, all rows together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process of one variant."""

    action: str
    """``prepare`` or ``measure``."""
    variant: str
    model: str
    """The Hugging Face checkpoint that all peers run."""
    prepared: str
    """Where the variant's converted checkpoint is, or goes."""
    prompt: tuple[int, ...]
    batches: tuple[int, ...]
    new_tokens: int
    threads: int
    seed: int

    @property
    def total_tokens(self) -> int:
        """Longest sequence, with room for the warm-up."""
        return len(self.prompt) + self.new_tokens + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One batch size in one process."""

    batch: int
    prefill_seconds: float
    """Until every row had its first token."""
    decode_seconds: float
    steps: int
    decode_tokens: int
    """All rows together, without each row's first."""
    foreign_share: float | None
    """CPU time that other programs took meanwhile, as a share of one core; None where it cannot be read."""
    wrong: str | None = None
    """Why this cannot be a correct run: a row too short, equal samples for different seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The JSON line of a worker."""

    versions: dict[str, str] = field(default_factory=dict)
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    weight_bytes: int = 0
    """Bytes of weights that one decode step reads."""
    peak_rss_bytes: int = 0
    """High-water mark of the process, mapped weight pages included."""
    points: tuple[Point, ...] = ()


class Opened(Protocol):
    """A loaded model."""

    weight_bytes: int

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        """``batch`` samples of ``prompt``, ``new_tokens`` each: temperature 1, all tokens, no stop token."""


def run_worker(
    prepare: Callable[[Task], None],
    load: Callable[[Task], tuple[dict[str, str], Callable[[], Opened]]],
) -> int:
    """The main of a worker. ``load`` imports its libraries, and returns their versions and what opens the model."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries write to stdout, some of them from C
    data = json.loads(Path(sys.argv[1]).read_text())
    task = Task(**{**data, "prompt": tuple(data["prompt"]), "batches": tuple(data["batches"])})
    if task.action == "prepare":
        prepare(task)
        outcome = Outcome()
    else:
        outcome = _measure(task, load)
    answer.write(json.dumps(asdict(outcome)) + "\n")
    answer.flush()
    return 0


def _measure(task: Task, load: Callable[[Task], tuple[dict[str, str], Callable[[], Opened]]]) -> Outcome:
    begin = time.perf_counter()
    versions, opener = load(task)
    imported = time.perf_counter()
    model = opener()
    loaded = time.perf_counter()
    points = tuple(_point(model, task, batch) for batch in task.batches)
    return Outcome(
        versions=versions, import_seconds=imported - begin, load_seconds=loaded - imported,
        weight_bytes=model.weight_bytes, points=points,
        peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )  # fmt: skip


def _point(model: Opened, task: Task, batch: int) -> Point:
    # Warm-up: buffers, kernels chosen by shape. The prompt is short, since several peers compute it for every row.
    model.generate(task.prompt[:_WARM_UP], batch, 3, task.seed + 1000, lambda _: None)
    marks: list[tuple[float, int]] = []
    load = ForeignLoad()
    begin = time.perf_counter()
    rows = model.generate(
        task.prompt, batch, task.new_tokens, task.seed, lambda tokens: marks.append((time.perf_counter(), tokens))
    )
    foreign = load.share()
    wrong = _wrong(rows, batch, task.new_tokens)
    first = next((index for index, (_, tokens) in enumerate(marks) if tokens >= batch), None)
    if first is None or len(marks) < first + 2:
        wrong, first, marks = wrong or f"{len(marks)} steps seen, at least 2 expected", 0, marks or [(begin, 0)]
    return Point(
        batch=batch, prefill_seconds=marks[first][0] - begin, decode_seconds=marks[-1][0] - marks[first][0],
        steps=len(marks) - 1 - first, decode_tokens=marks[-1][1] - marks[first][1], foreign_share=foreign, wrong=wrong,
    )  # fmt: skip


def _wrong(rows: list[list[int]], batch: int, new_tokens: int) -> str | None:
    if len(rows) != batch:
        return f"{len(rows)} rows came back for a batch of {batch}"
    lengths = sorted({len(row) for row in rows})
    if lengths != [new_tokens]:
        return f"rows of {lengths} tokens, {new_tokens} asked for"
    if new_tokens >= 8 and len({tuple(row) for row in rows}) < batch:
        return "different seeds gave equal samples"
    return None


def directory_bytes(directory: Path, pattern: str) -> int:
    """Bytes of the files that match."""
    return sum(path.stat().st_size for path in directory.glob(pattern))


def versions_of(*packages: str) -> dict[str, Any]:
    """Installed versions by package name."""
    from importlib.metadata import version

    return {package: version(package) for package in packages}
