"""``measure``: the roofline card of this machine, and how close an engine comes to it.

Everything goes through the ``Engine`` protocol. A figure is the median of several repeats after a warm-up; the ceiling
is the memory bandwidth measured here, in the same process, divided by the bytes that a decode step must read.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from drafter.config import TreeShape
from trtkit.chat import VARIANTS, load_chat
from trtkit.errors import RequestError, UsageError
from trtkit.log import logger
from trtkit.model_spec import read_model_spec
from trtkit.plan import step_bytes
from trtkit.recipe import EngineManifest, read_manifest
from trtkit.runtime.api import Engine, Request, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.scheme import scheme_named
from trtkit.solve.problems import read_problems

__all__ = ["BenchOptions", "BenchResult", "Machine", "Point", "measure"]

_BUFFER_BYTES = 256 << 20
"""Far larger than any cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 64
    new_tokens: int = 64
    """Timed tokens per row and repeat."""
    repeats: int = 3
    device: str = "auto"
    threads: int | None = None
    problems: Path | None = None
    """Problems to ask. A draft head is only as good as on text of its kind, so measure it on some."""
    speculative: bool = True
    tree: TreeShape | None = None
    """None: the engine's choice at each batch size."""

    def __post_init__(self) -> None:
        fields = ("prompt_tokens", "new_tokens", "repeats")
        wrong = [f"{name} {getattr(self, name)}: must be at least 1" for name in fields if getattr(self, name) < 1]
        wrong += [f"batch {batch}: must be at least 1" for batch in self.batches if batch < 1]
        if not self.batches:
            wrong.append("name at least one batch size")
        if self.threads is not None and self.threads < 1:
            wrong.append(f"threads {self.threads}: must be at least 1")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The roofline card."""

    device: str
    cores: int
    threads: int
    python: str
    torch: str
    read_bytes_per_second: float
    copy_bytes_per_second: float
    """Bytes read plus bytes written per second of a plain copy."""
    load_average: float
    busy: bool
    """Other programs were running: the figures are too low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One engine at one batch size."""

    engine: str
    precision: str
    drafter: str | None
    batch: int
    tokens_per_second: float
    """Decoding, all rows together; median of the repeats."""
    prefill_tokens_per_second: float
    tokens_per_step: float
    step_bytes: float
    ceiling_tokens_per_second: float
    roofline_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """The card and all points."""

    machine: Machine
    points: tuple[Point, ...]

    def document(self) -> dict[str, Any]:
        """The stable JSON document of ``trtkit bench``."""
        return {"machine": asdict(self.machine), "points": [asdict(point) for point in self.points]}


def measure(engines: Sequence[Path], options: BenchOptions) -> BenchResult:
    """Measure this machine, then every engine directory at every batch size."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for directory in engines:  # a wrong path must not surface after minutes of measuring
        read_manifest(directory)
    machine = _machine(options)
    points = []
    for directory in engines:
        for batch in options.batches:
            points.append(_point(directory, batch, options, machine))
            gc.collect()
    return BenchResult(machine=machine, points=tuple(points))


def _machine(options: BenchOptions) -> Machine:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = load > 0.5
    if busy:
        logger.warning(
            "the load average is %.1f before the measurement starts: other programs are running, so figures "
            "may be several times too low",
            load,
        )
    device = torch.device(name)
    read, copy = _bandwidths(device)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Machine(
        device=title, cores=cores, threads=torch.get_num_threads(), python=platform.python_version(),
        torch=torch.__version__, read_bytes_per_second=read, copy_bytes_per_second=copy, load_average=load, busy=busy,
    )  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def _bandwidths(device: torch.device) -> tuple[float, float]:
    """(read, copy) in bytes per second."""
    source = torch.ones(_BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # A sum reads everything and writes nothing; a product with ones would be bound by arithmetic on small CPUs.
    read = _BUFFER_BYTES / _median_seconds(lambda: source.sum(), device)
    copy = 2 * _BUFFER_BYTES / _median_seconds(lambda: target.copy_(source), device)
    return read, copy


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timing:
    prefill_tokens_per_second: float
    tokens_per_second: float
    tokens_per_step: float


def _point(directory: Path, batch: int, options: BenchOptions, machine: Machine) -> Point:
    manifest = read_manifest(directory)
    spec = read_model_spec(directory)
    logger.info("measuring %s at batch %d", directory, batch)
    timings = []
    opening = OpenOptions(
        device=options.device, threads=options.threads, rows=batch, speculative=options.speculative, tree=options.tree
    )
    prompts = _prompts(directory, spec.vocab, options)
    with open_engine(directory, opening) as engine:
        asked = max(map(len, prompts))
        if asked + options.new_tokens + 1 > engine.max_total_tokens:
            raise UsageError(
                f"{asked} prompt and {options.new_tokens} new tokens exceed the engine's {engine.max_total_tokens}",
                hint="lower --prompt-tokens or --new-tokens",
            )
        for repeat in range(options.repeats + 1):  # the first one warms up
            timings.append(_once(engine, prompts, batch, options, repeat))
    timings = timings[1:]
    speed = statistics.median(t.tokens_per_second for t in timings)
    step = statistics.median(t.tokens_per_step for t in timings)
    read = step_bytes(
        spec,
        scheme_named(manifest.recipe.precision),
        rows=batch,
        context=statistics.mean(map(len, prompts)) + options.new_tokens / 2,
        kv_dtype=manifest.recipe.kv_dtype,
    )
    ceiling = batch * step * machine.read_bytes_per_second / read
    return Point(
        engine=str(directory), precision=manifest.recipe.precision,
        drafter=_drafter(manifest, options), batch=batch, tokens_per_second=speed,
        prefill_tokens_per_second=statistics.median(t.prefill_tokens_per_second for t in timings),
        tokens_per_step=step, step_bytes=read, ceiling_tokens_per_second=ceiling, roofline_fraction=speed / ceiling,
    )  # fmt: skip


def _drafter(manifest: EngineManifest, options: BenchOptions) -> str | None:
    if manifest.recipe.tree is None or not options.speculative:
        return None
    return "auto" if options.tree is None else str(options.tree)


def _prompts(directory: Path, vocab: int, options: BenchOptions) -> list[tuple[int, ...]]:
    """Prompts to take in turns: those of the problems, or random tokens."""
    if options.problems is None:
        source = random.Random(0)
        return [tuple(source.randrange(vocab) for _ in range(options.prompt_tokens)) for _ in range(256)]
    chat = load_chat(directory)
    return [chat.prompt(problem.text, VARIANTS["solve"]) for problem in read_problems(options.problems)]


def _once(
    engine: Engine, prompts: Sequence[tuple[int, ...]], batch: int, options: BenchOptions, repeat: int
) -> _Timing:
    """Prefill ``batch`` prompts, then decode them all to the end without stop ids."""
    for row in range(batch):
        prompt = prompts[(repeat * batch + row) % len(prompts)]
        request = Request(
            id=f"bench-{repeat}-{row}", prompt=prompt, sampling=SamplingParams(), max_tokens=options.new_tokens + 1,
            seed=row,
        )  # fmt: skip
        engine.submit(request)
    before = engine.stats()
    running: set[str] = set()
    begin = time.perf_counter()
    first_seconds = 0.0
    while engine.has_work and len(running) < batch:
        running.update(output.request_id for output in engine.step() if output.tokens)
    first_seconds = time.perf_counter() - begin
    filled = engine.stats()
    begin = time.perf_counter()
    while engine.has_work:
        if any(output.finish is None and not output.tokens for output in engine.step()):
            raise RequestError("the engine made a step without a token")
    seconds = time.perf_counter() - begin
    after = engine.stats()
    tokens, row_steps = after.new_tokens - filled.new_tokens, after.row_steps - filled.row_steps
    # Backends that do not split their time give the whole first steps, decoding included.
    prefill_seconds = filled.seconds.get("prefill", 0.0) - before.seconds.get("prefill", 0.0) or first_seconds
    return _Timing(
        prefill_tokens_per_second=(filled.prefill_tokens - before.prefill_tokens) / max(prefill_seconds, 1e-9),
        tokens_per_second=tokens / max(seconds, 1e-9),
        tokens_per_step=tokens / row_steps if row_steps else 1.0,
    )
