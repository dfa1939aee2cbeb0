"""``measure``: how fast engines decode, and how close they come to the roofline of this machine.

Everything goes through the ``Engine`` protocol. A figure is the median of several repeats after a warm-up; the ceiling
is the memory bandwidth measured in the same process, divided by the bytes that a decode step must read. An engine with
a draft head is measured plain and speculative, in turns, so that a drifting machine favours neither.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from drafter.checkpoint import DrafterError, read_config
from drafter.config import TreeShape
from trtkit.bench.machine import Machine, measure_machine
from trtkit.chat import VARIANTS, Chat, load_chat
from trtkit.errors import EngineError, RequestError, UsageError
from trtkit.log import logger
from trtkit.model_spec import read_model_spec
from trtkit.plan import step_bytes
from trtkit.plan.memory import ValueBytes
from trtkit.recipe import output_layer_of, read_manifest
from trtkit.runtime.api import Engine, EngineStats, Request, SamplingParams
from trtkit.runtime.draft_head import HeadOptions
from trtkit.runtime.load import OpenOptions, compute_dtype, device_named, open_engine, rank_count
from trtkit.scheme import OutputLayer, scheme_named
from trtkit.solve.problems import read_problems

__all__ = [
    "BenchOptions",
    "BenchResult",
    "Point",
    "Timing",
    "can_draft",
    "check_sources",
    "measure",
    "prompts_of",
    "time_once",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 64
    new_tokens: int = 64
    """Timed tokens per row and repeat."""
    repeats: int = 3
    rounds: int = 1
    """How often each engine is opened; plain and speculative take turns."""
    device: str = "auto"
    tensor_parallel: int | None = None
    """As in :class:`OpenOptions`."""
    threads: int | None = None
    problems: Path | None = None
    """Problems to ask. A draft head is only as good as on text of its kind, so measure it on some."""
    temperature: float = 1.0
    speculative: bool = True
    """Measure engines with a draft head speculatively too."""
    tree: TreeShape | None = None
    """None: the engine's choice at each batch size."""
    drafter: Path | None = None
    """A draft head in place of the engines' own."""
    lookup: bool = False
    """Look drafts up, in every engine, beside a head or without one: in text, so with ``problems`` only."""
    head: HeadOptions = field(default_factory=HeadOptions)
    output_layer: OutputLayer | None = None
    """Of every engine, in place of its own."""

    def __post_init__(self) -> None:
        fields = ("prompt_tokens", "new_tokens", "repeats", "rounds")
        wrong = [f"{name} {getattr(self, name)}: must be at least 1" for name in fields if getattr(self, name) < 1]
        wrong += [f"batch {batch}: must be at least 1" for batch in self.batches if batch < 1]
        if not self.batches:
            wrong.append("name at least one batch size")
        if self.threads is not None and self.threads < 1:
            wrong.append(f"threads {self.threads}: must be at least 1")
        if self.output_layer not in (None, *get_args(OutputLayer)):
            wrong.append(f"output layer {self.output_layer!r}: must be model or int8")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)

    @property
    def threads_of_each(self) -> int:
        """CPU threads of every process of an engine: a number, so that it tries no other while it is measured."""
        return self.threads or max(1, torch.get_num_threads() // (self.tensor_parallel or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One engine at one batch size, plain or with its draft head."""

    engine: str
    precision: str
    output_layer: OutputLayer
    drafter: str | None
    """``auto`` or the tree, with ``+lookup`` where drafts are looked up, too; None for plain decoding."""
    batch: int
    tensor_parallel: int
    tokens_per_second: float
    """Decoding, all rows together; median of the repeats."""
    prefill_tokens_per_second: float
    tokens_per_step: float
    accepted_by_depth: tuple[float, ...]
    """Shares of drafting row-steps in which at least 1, 2, ... drafted tokens were accepted."""
    phase_seconds: dict[str, float]
    """Mean time of a step in draft, verify and accept."""
    speedup: float | None
    """Against plain decoding of the same engine at the same batch."""
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
    check_sources(engines, options)
    machine = measure_machine(options.device)
    points = [
        point
        for directory in engines
        for batch in options.batches
        for point in _points(directory, batch, options, machine)
    ]
    return BenchResult(machine=machine, points=tuple(points))


def check_sources(engines: Sequence[Path], options: BenchOptions) -> None:
    """Look at everything that is named: a wrong path must not surface after minutes of building or measuring.

    Raises :class:`EngineError`, :class:`InputError` or :class:`UsageError`.
    """
    device_named(options.device)
    if options.lookup and options.problems is None:
        raise UsageError(
            "drafts are looked up in text, and random tokens have nothing to look up",
            hint="name problems to ask: --problems FILE",
        )
    heads = [has_head(directory, options) for directory in engines]
    _check_head(options, there=options.drafter is not None or any(heads))
    if options.problems is not None:
        read_problems(options.problems)
    if options.drafter is not None:
        try:
            read_config(options.drafter)
        except DrafterError as problem:
            raise EngineError(str(problem), hint="a directory of `trtkit train-drafter`, or practice") from None


def can_draft(directory: Path, options: BenchOptions) -> bool:
    """Whether the engine drafts, with a head or without one."""
    return options.lookup or has_head(directory, options)


def has_head(directory: Path, options: BenchOptions) -> bool:
    """Whether the engine has a head: its own, or the one that all are to take."""
    return options.drafter is not None or read_manifest(directory).recipe.tree is not None


def _check_head(options: BenchOptions, *, there: bool) -> None:
    if there or ((options.tree is None or options.lookup) and options.head == HeadOptions()):
        return
    raise UsageError(
        "a draft tree or options of a draft head, but none of the engines has one",
        hint="name one with --drafter, or leave --tree, --draft-vocabulary and --draft-precision out",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One count."""

    first_seconds: float
    """Until every row had its first token."""
    prefill_tokens_per_second: float
    tokens_per_second: float
    tokens_per_step: float
    accepted_by_depth: tuple[float, ...]
    phase_seconds: dict[str, float]


def _points(directory: Path, batch: int, options: BenchOptions, machine: Machine) -> Iterator[Point]:
    """Plain, and speculative where there is a head."""
    kinds = (False, True) if can_draft(directory, options) and options.speculative else (False,)
    timings: dict[bool, list[Timing]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for speculative in kinds:
            logger.info("measuring %s at batch %d%s", directory, batch, ", drafting" if speculative else "")
            timings[speculative] += _timed(directory, batch, options, speculative)
            gc.collect()
    plain = _median(timings[False], "tokens_per_second")
    for speculative in kinds:
        yield _point(directory, batch, options, machine, timings[speculative], plain if speculative else None)


def _timed(directory: Path, batch: int, options: BenchOptions, speculative: bool) -> list[Timing]:
    opening = OpenOptions(
        device=options.device, threads=options.threads_of_each, tensor_parallel=options.tensor_parallel,
        rows=batch, speculative=speculative,
        tree=options.tree if speculative else None, drafter=options.drafter if speculative else None,
        lookup=options.lookup and speculative, head=options.head, output_layer=options.output_layer,
    )  # fmt: skip
    prompts = prompts_of(directory, read_model_spec(directory).vocab, options)
    with open_engine(directory, opening) as engine:
        asked = max(map(len, prompts))
        if asked + options.new_tokens + 1 > engine.max_total_tokens:
            raise UsageError(
                f"{asked} prompt and {options.new_tokens} new tokens exceed the engine's {engine.max_total_tokens}",
                hint="lower --prompt-tokens or --new-tokens",
            )
        # The first one warms up.
        return [time_once(engine, prompts, batch, options, repeat) for repeat in range(options.repeats + 1)][1:]


def _point(
    directory: Path, batch: int, options: BenchOptions, machine: Machine, timings: Sequence[Timing],
    plain: float | None,
) -> Point:  # fmt: skip
    """``plain``: the speed to compare with; None for plain decoding itself."""
    manifest, spec = read_manifest(directory), read_model_spec(directory)
    recipe = manifest.recipe
    output_layer = options.output_layer or output_layer_of(recipe)
    prompts = prompts_of(directory, spec.vocab, options)
    speed, step = _median(timings, "tokens_per_second"), _median(timings, "tokens_per_step")
    compiled = manifest.backend == "tensorrt-llm"
    per = ValueBytes() if compiled else ValueBytes(plain=compute_dtype(spec, device_named(options.device)).itemsize)
    read = step_bytes(
        spec, scheme_named(recipe.precision), rows=batch,
        context=statistics.mean(map(len, prompts)) + options.new_tokens / 2, kv_dtype=recipe.kv_dtype,
        output_layer=output_layer, per=per,
    )  # fmt: skip
    device = device_named(options.device)
    ranks = recipe.tensor_parallel if compiled else rank_count(recipe, options.tensor_parallel, device)
    together = 1 if device.type == "cpu" else ranks  # a CPU's processes share its memory
    ceiling = batch * step * together * machine.read_bytes_per_second / read
    drafter = None if plain is None else "auto" if options.tree is None else str(options.tree)
    if drafter is not None and options.lookup:
        drafter += "+lookup"
    return Point(
        engine=str(directory), precision=recipe.precision, output_layer=output_layer, drafter=drafter, batch=batch,
        tensor_parallel=ranks, tokens_per_second=speed,
        prefill_tokens_per_second=_median(timings, "prefill_tokens_per_second"), tokens_per_step=step,
        accepted_by_depth=tuple(map(statistics.mean, zip(*(t.accepted_by_depth for t in timings), strict=True))),
        phase_seconds={
            name: statistics.mean(t.phase_seconds[name] for t in timings) for name in timings[0].phase_seconds
        },
        speedup=None if plain is None else speed / plain, step_bytes=read, ceiling_tokens_per_second=ceiling,
        roofline_fraction=speed / ceiling,
    )  # fmt: skip


def _median(timings: Sequence[Timing], name: str) -> float:
    return float(statistics.median(getattr(timing, name) for timing in timings))


def prompts_of(tokenizer: Path | Chat, vocab: int, options: BenchOptions) -> list[tuple[int, ...]]:
    """Prompts to take in turns: those of the problems, or random tokens."""
    if options.problems is None:
        source = random.Random(0)
        return [tuple(source.randrange(vocab) for _ in range(options.prompt_tokens)) for _ in range(256)]
    chat = load_chat(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    return [chat.prompt(problem.text, VARIANTS["solve"]) for problem in read_problems(options.problems)]


def time_once(
    engine: Engine, prompts: Sequence[tuple[int, ...]], batch: int, options: BenchOptions, repeat: int
) -> Timing:
    """Prefill ``batch`` prompts, then decode them without stop ids until the first is done: a count of full batches.

    Rows that draft well end before the others, and what runs then is a smaller batch.
    """
    sampling = SamplingParams(temperature=options.temperature)
    for row in range(batch):
        prompt = prompts[(repeat * batch + row) % len(prompts)]
        engine.submit(
            Request(
                id=_name(repeat, row), prompt=prompt, sampling=sampling, max_tokens=options.new_tokens + 1,
                seed=row,
            )
        )  # fmt: skip
    before = engine.stats()
    running: set[str] = set()
    begin = time.perf_counter()
    while engine.has_work and len(running) < batch:
        running.update(output.request_id for output in engine.step() if output.tokens)
    first_seconds = time.perf_counter() - begin
    filled = engine.stats()
    begin = time.perf_counter()
    ended = False
    while engine.has_work and not ended:
        outputs = engine.step()
        if any(output.finish is None and not output.tokens for output in outputs):
            raise RequestError("the engine made a step without a token")
        ended = any(output.finish is not None for output in outputs)
    found = _timing(before, filled, engine.stats(), first_seconds, time.perf_counter() - begin)
    for row in range(batch):
        engine.cancel(_name(repeat, row))
    while engine.has_work:
        engine.step()
    return found


def _name(repeat: int, row: int) -> str:
    return f"bench-{repeat}-{row}"


def _timing(
    before: EngineStats, filled: EngineStats, after: EngineStats, first_seconds: float, seconds: float
) -> Timing:
    """From the counters before, when every row ran, and at the end."""
    tokens, row_steps = after.new_tokens - filled.new_tokens, after.row_steps - filled.row_steps
    steps = max(after.steps - filled.steps, 1)
    # Backends that do not split their time give the whole first steps, decoding included.
    prefill_seconds = filled.seconds.get("prefill", 0.0) - before.seconds.get("prefill", 0.0) or first_seconds
    accepted = zip(after.accepted_by_depth, filled.accepted_by_depth, strict=True)
    drafted = after.drafted_row_steps - filled.drafted_row_steps
    return Timing(
        first_seconds=first_seconds,
        prefill_tokens_per_second=(filled.prefill_tokens - before.prefill_tokens) / max(prefill_seconds, 1e-9),
        tokens_per_second=tokens / max(seconds, 1e-9),
        tokens_per_step=tokens / row_steps if row_steps else 1.0,
        accepted_by_depth=tuple((late - early) / max(drafted, 1) for late, early in accepted),
        phase_seconds={
            name: (total - filled.seconds[name]) / steps for name, total in after.seconds.items() if name != "prefill"
        },
    )
