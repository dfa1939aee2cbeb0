"""A worker that generates without a model; its variant says how it misbehaves. Run by test_bench_peers.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from peers.worker import Mark, Task, run_worker


class _Model:
    def __init__(self, task: Task) -> None:
        self.weight_bytes = 1000
        self._variant = task.variant

    def generate(self, prompt: Sequence[int], batch: int, new_tokens: int, seed: int, mark: Mark) -> list[list[int]]:
        if self._variant == "crash":
            os.kill(os.getpid(), signal.SIGILL)
        if self._variant == "child":  # left running, it would disturb whoever comes next
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print("libraries talk on stdout")  # noqa: T201
        length = new_tokens - (self._variant == "short")
        for step in range(length):
            time.sleep(0.01)
            mark(batch * (step + 1))
        return [[0 if self._variant == "equal" else seed + row] * length for row in range(batch)]


def _prepare(task: Task) -> None:
    if task.variant == "unprepared":
        raise SystemExit("error: no such format")


def _load(task: Task) -> tuple[dict[str, str], object]:
    if task.variant == "slow":
        time.sleep(600)
    return {"fake": "1"}, lambda: _Model(task)


if __name__ == "__main__":
    raise SystemExit(run_worker(_prepare, _load))
