"""``scripts/gpu_bench``: the speed of the CUDA path on one bare GPU, in one call of minutes, without a checkpoint.

Each stage runs on its own: what fails or has no time left is named, and does not take the others along. The document is
written after every stage. Random weights of Qwen2.5-14B's shape, a cache filled with random numbers, acceptance forced
to the published profile: figures of speed, none of quality.

The targets are shares of the bandwidth of a plain copy, measured in the same run, that a step's necessary reads reach
(weights, lm_head, keys and values), and ratios of tokens per second between precisions.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drafter.model import Drafter
from trtkit.bench.device_clock import copy_bandwidth
from trtkit.bench.gpu_machine import environment, time_limit
from trtkit.bench.gpu_points import BLOCK_SIZE, PointPlan, measure_point
from trtkit.bench.gpu_subprocess import gpu_tests, peer_figures
from trtkit.bench.gpu_targets import goals, lines
from trtkit.bench.random_model import SHAPES, RandomWeights, random_head, shape_spec
from trtkit.files import read_json, write_json
from trtkit.runtime.kv_cache import kv_block_bytes
from trtkit.runtime.model import DecoderModel
from trtkit.scheme import Precision

__all__ = ["STAGES", "GpuBench", "GpuBenchOptions", "main"]

PUBLISHED_ACCEPTANCE = (0.86, 0.74, 0.65)
"""Shares of steps that accept at least 1, 2, 3 drafted tokens. Published for the 14B head: all three in 65 % of the
steps; the first two are about what a constant chance per depth gives."""
DRAFT_VOCABULARY = 32768
"""Of the trimmed head that is measured beside the published one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBenchOptions:
    """What is run."""

    shape: str = "14b"
    device: torch.device
    out: Path
    stages: tuple[str, ...] = ()
    """In this order; empty: all."""
    quick: bool = False
    """Fewer steps, without the peer and the tests."""
    budget_seconds: float = 460.0
    resume: bool = False
    """Add to the document that is there."""

    @property
    def tiny(self) -> bool:
        """Sizes for a test of the benchmark itself."""
        return self.shape == "tiny"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return 64 if self.tiny else 2048

    @property
    def steps(self) -> int:
        """Timed steps of a point."""
        return 4 if self.tiny else 24 if self.quick else 64


@dataclass(slots=True, kw_only=True)
class GpuBench:
    """The run: options, the document as far as it has come, and the model that the last stage left."""

    options: GpuBenchOptions
    say: Callable[[str], None]
    document: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    _model: tuple[str, DecoderModel] | None = None

    def run(self) -> dict[str, Any]:
        """Every stage, one after the other."""
        self.document = {"points": [], "failures": {}, "tracebacks": {}, "stage_seconds": {}}
        if self.options.resume:
            self.document |= read_json(self.options.out)
        names = self.options.stages or tuple(
            name for name in STAGES if not (self.options.quick and name in ("tests", "peer"))
        )
        for done, name in enumerate(names, start=1):
            self._stage(name)
            if "CUDA error" in self.document["failures"].get(name, "") and done < len(names):
                self._start_anew(names[done:])
        self.document["goals"] = goals(self.document)
        self.document["seconds"] = sum(self.document["stage_seconds"].values())
        self._write()
        for line in lines(self.document):
            self.say(line)
        return self.document

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget_seconds - (time.perf_counter() - self.began)

    def _stage(self, name: str) -> None:
        begin = time.perf_counter()
        work, least = STAGES[name]
        if self.left < least and not self.options.tiny:
            self.document["failures"][name] = f"skipped: {self.left:.0f} s of the budget were left"
        else:
            try:
                with time_limit(max(self.left, 20.0)):
                    work(self)
            except Exception as problem:  # one stage must not take the others along
                self.document["failures"][name] = f"{type(problem).__name__}: {str(problem)[:2000]}"
                self.document["tracebacks"][name] = traceback.format_exc()[-6000:]
        self.free()
        self.document["stage_seconds"][name] = time.perf_counter() - begin
        self._write()
        failure = self.document["failures"].get(name)
        self.say(f"[{time.perf_counter() - self.began:6.1f} s] {name}{': ' + failure if failure else ''}")

    def _start_anew(self, stages: Sequence[str]) -> None:
        """Go on in a new process: after an error of its own, a CUDA context carries no further work."""
        self.say("  a CUDA error: going on in a new process")
        arguments = [str(self.options.out), "--resume", "--shape", self.options.shape, "--stages", ",".join(stages)]
        arguments += ["--device", str(self.options.device), "--budget", str(self.left)]
        arguments += ["--quick"] if self.options.quick else []
        os.execv(sys.executable, [sys.executable, "-m", "trtkit.bench.gpu", *arguments])

    def _write(self) -> None:
        write_json(self.options.out, self.document)

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()

    def model(self, precision: Precision) -> DecoderModel:
        """The model in that precision; the one before it is dropped."""
        if self._model is None or self._model[0] != precision:
            self._model = None
            self.free()
            weights = RandomWeights(
                spec=shape_spec(self.options.shape), precision=precision, device=self.options.device
            )
            reach = 17408 if not self.options.tiny else 1024
            made = DecoderModel(weights, device=self.options.device, dtype=self.options.dtype, max_tokens=reach)
            self._model = (precision, made)
        return self._model[1]

    def drop(self) -> None:
        """Forget the model."""
        self._model = None
        self.free()

    def point(self, plan: PointPlan, head: Drafter | None = None, *, profiled: bool = True, **notes: Any) -> None:
        """Measure, and keep the figures and the notes."""
        cuda = self.options.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if "copy_bytes_per_second" not in self.document:
            _bandwidth(self)
        copy: float = self.document["copy_bytes_per_second"]
        found = measure_point(self.model(plan.precision), plan, copy, head, profiled=profiled) | notes
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else 0
        self.document["points"].append(found)
        self._write()
        self.say(
            f"  {plan.precision:6} rows {plan.rows:3} context {plan.context:6} {found['tree'] or '-':4} "
            f"{found['tokens_per_second']:9.1f} tok/s {found['step_ms']:8.2f} ms/step "
            f"{found['copy_fraction']:6.2f} of copy{' overlapped' if plan.overlap else ''}"
        )


def _environment(bench: GpuBench) -> None:
    facts = {"shape": bench.options.shape, **environment(bench.options.device)}
    bench.document["environment"] = facts
    bench.say("  " + ", ".join(f"{key} {value}" for key, value in facts.items()))


def _bandwidth(bench: GpuBench) -> None:
    bench.document["copy_bytes_per_second"] = copy_bandwidth(bench.options.device)
    bench.say(f"  copy: {bench.document['copy_bytes_per_second'] / 1e9:.0f} GB/s, read plus written")


def _precision(precision: Precision) -> Callable[[GpuBench], None]:
    def work(bench: GpuBench) -> None:
        options = bench.options
        for rows in (1, 12):
            bench.point(PointPlan(precision=precision, rows=rows, context=options.context, steps=options.steps))

    return work


def _draft(bench: GpuBench) -> None:
    """fp8 with the draft head. Acceptance is forced to the published profile: not a model's own."""
    options, spec = bench.options, shape_spec(bench.options.shape)
    plan = PointPlan(
        precision="fp8", rows=12, context=options.context, steps=options.steps, shares=PUBLISHED_ACCEPTANCE
    )  # fmt: skip
    for vocabulary in (None, 64 if options.tiny else DRAFT_VOCABULARY):
        head = random_head(spec, device=options.device, dtype=options.dtype, vocabulary=vocabulary)
        bench.point(plan, head, draft_vocabulary=vocabulary or spec.vocab, acceptance="forced, not a model's")
        del head
        bench.free()


def _long(bench: GpuBench) -> None:
    """64 rows of 16k tokens with fp8 weights, in a cache of 8 bits where 16 do not fit; fewer rows where neither do."""
    options, spec = bench.options, shape_spec(bench.options.shape)
    context, steps = (512, 4) if options.tiny else (16384, 16)
    model = bench.model("fp8")
    bench.free()
    free = torch.cuda.mem_get_info()[0] - (3 << 30) if options.device.type == "cuda" else 1 << 30
    needs = {}
    for kv_dtype in ("model", "fp8"):
        plan = PointPlan(precision="fp8", rows=64, context=context, steps=steps, kv_dtype=kv_dtype)
        block = kv_block_bytes(spec, plan.kv_dtype, model.dtype, BLOCK_SIZE)
        needs[kv_dtype] = plan.blocks * block
        if needs[kv_dtype] <= free:
            break
    rows = min(64, int(free // (needs[plan.kv_dtype] / 64)))
    bench.document["long"] = {"free_bytes": free, "needed_bytes": needs, "rows": rows, "kv_dtype": plan.kv_dtype}
    if rows < 64:
        bench.say(f"  64 rows need {needs['fp8'] / 1e9:.0f} GB of cache, {free / 1e9:.0f} GB are free: {rows} rows")
    bench.point(
        PointPlan(precision="fp8", rows=rows, context=context, steps=steps, kv_dtype=plan.kv_dtype), profiled=False
    )


def _overlap(bench: GpuBench) -> None:
    """fp8, 12 rows, as the engine runs by default: each step launched before the one in flight is read. The other
    points are without, so that a fault of it takes nothing along."""
    options = bench.options
    plan = PointPlan(precision="fp8", rows=12, context=options.context, steps=options.steps, overlap=True)
    bench.point(plan, profiled=False)


def _peer(bench: GpuBench) -> None:
    bench.drop()
    options = bench.options
    limit = min(150.0, bench.left) if not options.tiny else 100.0
    new_tokens = 8 if options.tiny else 64
    bench.document["transformers"] = peer_figures(options.shape, options.device, options.context, new_tokens, limit)


def _tests(bench: GpuBench) -> None:
    bench.drop()
    bench.document["gpu_tests"] = found = gpu_tests(min(150.0, max(bench.left, 20.0)))
    bench.say("  " + found["summary"])


STAGES: dict[str, tuple[Callable[[GpuBench], None], float]] = {
    "environment": (_environment, 0.0),
    "bandwidth": (_bandwidth, 0.0),
    "bf16": (_precision("bf16"), 15.0),
    "fp8": (_precision("fp8"), 15.0),
    "draft": (_draft, 20.0),
    "long": (_long, 25.0),
    "overlap": (_overlap, 15.0),
    "int4": (_precision("int4"), 15.0),
    "int8": (_precision("int8"), 15.0),
    "tests": (_tests, 20.0),
    "peer": (_peer, 45.0),
}
"""The stages in their order, and the seconds of the budget without which one does not begin."""


def _options(arguments: Sequence[str]) -> GpuBenchOptions:
    parser = argparse.ArgumentParser(
        prog="gpu_bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu_bench.json"), help="the JSON document")
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--stages", default="", help=f"comma-separated, of: {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="fewer steps, without the peer and the tests")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds; stages that no longer fit are skipped")
    parser.add_argument("--resume", action="store_true", help="add to the document that is there")
    parsed = parser.parse_args(arguments)
    stages = tuple(part for part in parsed.stages.split(",") if part)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if parsed.device == "auto" else parsed.device
    if name == "cpu" and parsed.shape != "tiny":
        parser.error("the 14b shape needs a CUDA device; --shape tiny runs anywhere")
    return GpuBenchOptions(
        shape=parsed.shape, device=torch.device(name), out=parsed.out, stages=stages, quick=parsed.quick,
        budget_seconds=parsed.budget, resume=parsed.resume,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run, and print what comes. 0 when every stage ran, 1 otherwise; missed targets are no failure."""

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    options = _options(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = GpuBench(options=options, say=say).run()
    say(f"document: {options.out}")
    return 1 if document["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
