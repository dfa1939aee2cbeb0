"""``scripts/gpu_bench``: the speed of the CUDA path on one bare GPU, in one call of minutes, without a checkpoint.

Each stage runs on its own: what fails, hangs or has no time left is named, and does not take the others along. The
document is written after every figure; where a stage takes the process or the device's context down, ``--resume`` goes
on behind it, which the script does by itself. Random weights of Qwen2.5-14B's shape, a cache filled with random
numbers, acceptance forced to the published profile: figures of speed, none of quality.

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
from trtkit.bench.gpu_machine import STUCK, device_answers, time_limit
from trtkit.bench.gpu_points import PointPlan, measure_point, profile_point
from trtkit.bench.gpu_ranks import SharedPlan, measure_shared
from trtkit.bench.gpu_stages import STAGES, bandwidth
from trtkit.bench.gpu_targets import goals, lines
from trtkit.bench.random_model import SHAPES, RandomWeights, shape_spec
from trtkit.errors import UsageError
from trtkit.files import read_json, write_json
from trtkit.runtime.load import device_named
from trtkit.runtime.model import DecoderModel
from trtkit.scheme import Precision

__all__ = ["GpuBench", "GpuBenchOptions", "main"]


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
    """Add to the document that is there the stages that it has not, or that failed in it."""

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
    spent_before: float = 0.0
    """Seconds of the budget, by the processes before this one."""
    _model: tuple[str, DecoderModel] | None = None

    def run(self) -> dict[str, Any]:
        """Every stage, one after the other."""
        self.document = {"points": [], "failures": {}, "tracebacks": {}, "stage_seconds": {}}
        if self.options.resume and self.options.out.is_file():
            self._take_up()
        names = self.options.stages or tuple(
            name for name in STAGES if not (self.options.quick and name in ("tests", "peer"))
        )
        names = tuple(name for name in names if name not in self.document["stage_seconds"])
        for done, name in enumerate(names, start=1):
            self._stage(name)
            if name in self.document["failures"] and done < len(names) and not device_answers(self.options.device):
                self.say("  the device no longer answers")
                os._exit(STUCK)  # after an error of its own a CUDA context carries no further work, not even a tidy end
        self.document["goals"] = goals(self.document)
        self.document["seconds"] = sum(self.document["stage_seconds"].values())
        self._write()
        for line in lines(self.document):
            self.say(line)
        return self.document

    def _take_up(self) -> None:
        """Go on with a document: behind the stage that brought its process down, or, where it is finished, with what
        failed."""
        self.document |= read_json(self.options.out)
        if self.document.pop("goals", None) is not None:
            for name in list(self.document["failures"]):
                for part in ("failures", "tracebacks", "stage_seconds"):
                    self.document[part].pop(name, None)
            return
        left: dict[str, Any] | None = self.document.pop("running", None)
        if left is not None:
            self.document["failures"][left["stage"]] = "the process ended in it, or hung: see its stderr"
            self.document["stage_seconds"][left["stage"]] = max(0.0, time.time() - left["began"])
        self.spent_before = sum(self.document["stage_seconds"].values())

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.options.budget_seconds - self.spent_before - (time.perf_counter() - self.began)

    def _stage(self, name: str) -> None:
        begin, stage = time.perf_counter(), STAGES[name]
        self.document["running"] = {"stage": name, "began": time.time()}
        self._write()
        if self.left < stage.least_seconds and not self.options.tiny:
            self.document["failures"][name] = f"skipped: {self.left:.0f} s of the budget were left"
        else:
            try:
                with time_limit(min(max(self.left, 20.0), stage.most_seconds)):
                    stage.work(self)
            except Exception as problem:  # one stage must not take the others along
                self.document["failures"][name] = f"{type(problem).__name__}: {str(problem)[:2000]}"
                self.document["tracebacks"][name] = traceback.format_exc()[-6000:]
        self.document["stage_seconds"][name] = time.perf_counter() - begin
        del self.document["running"]
        self._write()
        failure = self.document["failures"].get(name)
        self.say(f"[{time.perf_counter() - self.began:6.1f} s] {name}{': ' + failure if failure else ''}")
        if failure is None or device_answers(self.options.device):
            self.free()

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

    def point(self, plan: PointPlan, head: Drafter | None = None, **notes: Any) -> dict[str, Any]:
        """Measure, and keep the figures and the notes."""
        cuda = self.options.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if "copy_bytes_per_second" not in self.document:
            bandwidth(self)
        copy: float = self.document["copy_bytes_per_second"]
        found = measure_point(self.model(plan.precision), plan, copy, head) | notes
        found["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else 0
        self.document["points"].append(found)
        self._write()
        self.say(
            f"  {plan.precision:6} rows {plan.rows:3} context {plan.context:6} {found['tree'] or '-':4} "
            f"{found['tokens_per_second']:9.1f} tok/s {found['step_ms']:8.2f} ms/step "
            f"{found['copy_fraction']:6.2f} of copy{' overlapped' if plan.overlap else ''}"
        )
        return found

    def shared(self, plan: SharedPlan) -> None:
        """Measure an engine over several devices, and keep the figures."""
        if "copy_bytes_per_second" not in self.document:
            bandwidth(self)
        found = measure_shared(plan, self.document["copy_bytes_per_second"])
        self.document.setdefault("shared_points", []).append(found)
        self._write()
        self.say(
            f"  {found['precision']:6} over {found['ranks']} {found['tree'] or '-':4} "
            f"{found['tokens_per_second']:9.1f} tok/s {found['step_ms']:8.2f} ms/step"
        )

    def profile(self, plan: PointPlan, found: dict[str, Any], head: Drafter | None = None) -> None:
        """Add to a point's figures where its time goes."""
        profile_point(self.model(plan.precision), plan, found, head)
        self._write()


def _options(arguments: Sequence[str]) -> GpuBenchOptions:
    parser = argparse.ArgumentParser(
        prog="gpu_bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu_bench.json"), help="the JSON document")
    parser.add_argument("--shape", choices=SHAPES, default="14b")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--stages", default="", help=f"comma-separated, of: {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="fewer steps, without the peer and the tests")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds; stages that no longer fit are skipped")
    parser.add_argument("--resume", action="store_true", help="add to the document that is there")
    parsed = parser.parse_args(arguments)
    stages = tuple(part for part in parsed.stages.split(",") if part)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    try:
        device = device_named(parsed.device)
    except UsageError as problem:
        parser.error(str(problem))
    if device.type == "cpu" and parsed.shape != "tiny":
        parser.error("the 14b shape needs a CUDA device; --shape tiny runs anywhere")
    return GpuBenchOptions(
        shape=parsed.shape, device=device, out=parsed.out, stages=stages, quick=parsed.quick,
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
