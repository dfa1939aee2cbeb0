"""The measurement: prepare every line, then rounds of one fresh process per line, rotated, on a machine left alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.catalogue import Line, Peer
from peers.environments import InstallError, ensure_environment, last_words
from peers.machine import BUSY_SHARE, idle_share
from peers.worker import Task

__all__ = ["Attempt", "Plan", "Run", "rotated", "run_peers"]

_SCRIPTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and where things lie."""

    lines: tuple[Line, ...]
    peers: Mapping[str, Peer]
    work: Path
    """Environments, tasks and logs."""
    prepared: Path
    """What was converted from ``model``."""
    model: Path
    prompt: tuple[int, ...]
    batches: tuple[int, ...] = (1, 8, 16, 32)
    new_tokens: int = 40
    rounds: int = 3
    threads: int = 2
    timeout_seconds: float = 1800.0
    patience_seconds: float = 60.0
    """How long a process waits for other programs to become quiet before it is started all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process of one line."""

    peer: str
    variant: str
    round: int
    """From 1; 0: preparing."""
    seconds: float
    outcome: dict[str, Any] | None
    """The worker's JSON line; None: it failed."""
    failure: str | None = None
    busy_share: float | None = None
    """What other programs took of one core just before it started."""


@dataclass(slots=True)
class Run:
    """Everything found so far."""

    attempts: list[Attempt] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a line (``peer:variant``) could not be measured to the end."""
    read_bytes_per_second: list[float] = field(default_factory=list)


def rotated(lines: Sequence[Line], turn: int, turns: int) -> list[Line]:
    """The order of round ``turn`` of ``turns``: begun further on each time, so that no line always follows the same
    state of the machine, nor always comes first."""
    start = turn * max(1, len(lines) // turns) % max(1, len(lines))
    return [*lines[start:], *lines[:start]]


def run_peers(plan: Plan, run: Run, say: Callable[[str], None], save: Callable[[], None]) -> None:
    """Add everything found to ``run``, and save it after every process: an interrupt leaves what there is.

    A line that cannot be installed, prepared or run is told with its reason, and the others go on.
    """
    pythons = _installed(plan, run, say)
    for line in plan.lines:
        if str(line) not in run.unavailable:
            _prepare(plan, run, line, pythons, say)
    todo = [(turn, line) for turn in range(plan.rounds) for line in rotated(plan.lines, turn, plan.rounds)]
    for index, (turn, line) in enumerate(todo):
        if index % max(1, len(plan.lines)) == 0:
            _probe(plan, run, say)
        if str(line) in run.unavailable:
            continue
        left = _seconds_left(run, [other for _, other in todo[index:]])
        say(f"round {turn + 1} of {plan.rounds}: {line}" + (f", about {left / 60:.0f} min left" if left else ""))
        share = _quiet(plan, say)
        attempt = _process(plan, line, "measure", pythons, turn + 1)
        run.attempts.append(replace(attempt, busy_share=share))
        if attempt.failure:
            run.unavailable[str(line)] = attempt.failure
            say(f"  {attempt.failure}")
        save()
    _probe(plan, run, say)
    save()


def _installed(plan: Plan, run: Run, say: Callable[[str], None]) -> dict[str, Path]:
    """Interpreters by peer; a peer without one is marked unavailable."""
    pythons: dict[str, Path] = {}
    for name in dict.fromkeys(line.peer for line in plan.lines):
        environment = plan.peers[name].environment
        if environment is None:
            pythons[name] = Path(sys.executable)
            continue
        say(f"environment of {name} (minutes the first time)")
        try:
            pythons[name] = ensure_environment(
                environment, plan.work / "environments" / environment, plan.work / "logs" / f"install-{environment}.log"
            )
        except InstallError as problem:
            say(f"  {problem}")
            run.unavailable |= {str(line): str(problem) for line in plan.lines if line.peer == name}
    return pythons


def _prepare(plan: Plan, run: Run, line: Line, pythons: Mapping[str, Path], say: Callable[[str], None]) -> None:
    say(f"checkpoint of {line}")
    attempt = _process(plan, line, "prepare", pythons, 0)
    if attempt.failure:
        run.unavailable[str(line)] = f"not prepared: {attempt.failure}"
        say(f"  {attempt.failure}")


def _quiet(plan: Plan, say: Callable[[str], None]) -> float | None:
    """Wait until other programs leave the machine alone; what they still take after the patience is over."""
    end = time.monotonic() + plan.patience_seconds
    while (share := idle_share()) is not None and share > BUSY_SHARE and time.monotonic() < end:
        pass
    if share is not None and share > BUSY_SHARE:
        say(f"  other programs take {share:.0%} of a core: measured all the same, and marked")
    return share


def _seconds_left(run: Run, lines: Sequence[Line]) -> float:
    """From what each line took before; a line not seen yet counts as the mean."""
    seen: dict[str, float] = {f"{a.peer}:{a.variant}": a.seconds for a in run.attempts if a.outcome}
    if not seen:
        return 0.0
    mean = sum(seen.values()) / len(seen)
    return sum(seen.get(str(line), mean) for line in lines if str(line) not in run.unavailable)


def _process(plan: Plan, line: Line, action: str, pythons: Mapping[str, Path], number: int) -> Attempt:
    """Run the worker once, in a process group of its own."""
    peer = plan.peers[line.peer]
    stem = f"{line.peer}-{line.variant}-{action}"
    log, file = plan.work / "logs" / f"{stem}-{number}.log", plan.work / "tasks" / f"{stem}.json"
    for folder in (log.parent, file.parent, plan.prepared / line.peer):
        folder.mkdir(parents=True, exist_ok=True)
    task = Task(
        action=action, variant=line.variant, model=str(plan.model.resolve()), prompt=plan.prompt,
        prepared=str((plan.prepared / line.peer / line.variant).resolve()), batches=plan.batches,
        new_tokens=plan.new_tokens, threads=plan.threads, seed=1 + 10_000 * number,
    )  # fmt: skip
    file.write_text(json.dumps(asdict(task)))
    paths = [str(_SCRIPTS), str(_SCRIPTS.parent)] if peer.environment is None else [str(_SCRIPTS)]
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(plan.threads),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **peer.variables,
    }  # fmt: skip
    command = [str(pythons[line.peer]), "-P", "-m", peer.module, str(file)]
    begin = time.monotonic()
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stream, env=variables, cwd=plan.work, text=True,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            answer, _ = process.communicate(timeout=plan.timeout_seconds)
            failure = _failure(process.returncode, log)
        except subprocess.TimeoutExpired:
            answer, failure = "", f"not done after {plan.timeout_seconds:.0f} s"
        finally:
            _end(process)
    outcome: dict[str, Any] | None = None
    if failure is None:
        try:
            outcome = json.loads(answer.splitlines()[-1])
        except (IndexError, ValueError):
            failure = f"no result came back (see {log})"
    return Attempt(
        peer=line.peer, variant=line.variant, round=number, seconds=time.monotonic() - begin, outcome=outcome,
        failure=failure,
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing of a worker may run beside the next one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _failure(code: int, log: Path) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"crashed: {signal.Signals(-code).name} (see {log})"
    return f"failed: {last_words(log)} (see {log})"


def _probe(plan: Plan, run: Run, say: Callable[[str], None]) -> None:
    """One reading of the memory bandwidth, in a process of its own. The best reading counts: others only lower it."""
    _quiet(plan, say)
    code = (
        "import sys, torch; from trtkit.bench.machine import measure_machine\n"
        "torch.set_num_threads(int(sys.argv[1])); print(measure_machine('cpu').read_bytes_per_second)"
    )
    command = [sys.executable, "-c", code, str(plan.threads)]
    variables = {**os.environ, "PYTHONPATH": str(_SCRIPTS.parent)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode == 0:
        run.read_bytes_per_second.append(float(done.stdout))
