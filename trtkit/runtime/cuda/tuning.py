"""Choosing by measurement: every candidate timed once per device, shape and row count, and remembered between runs.

A candidate runs as it will in a decode step: within a CUDA graph, and with the L2 full of something else, for each
weight comes from memory there. Nothing may be tuned while a graph is captured; engines call ``CudaLinear.prepare``
before.
A wrong or damaged file costs speed at most, so nothing here is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from triton.errors import TritonError

from trtkit.errors import InputError, OutputError
from trtkit.files import cache_home, read_json, write_json
from trtkit.log import logger
from trtkit.runtime.cuda import choices, conversions, products
from trtkit.runtime.cuda.choices import Choice, Gpu, Shape

__all__ = ["Table", "fastest", "gpu_of", "table_of"]

_REPEATS = 11
_OTHER_BYTES = 256 << 20
"""More than the L2 of any GPU."""
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Most shared memory of one program, where it is not 99 KiB."""


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What the candidates depend on; for a CPU (Triton's interpreter) that of an H200."""
    if device.type != "cuda":
        return Gpu(sms=132, capability=(9, 0), shared_bytes=227 << 10)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Gpu(
        sms=properties.multi_processor_count, capability=capability, shared_bytes=_SHARED_KIB.get(capability, 99) << 10
    )


def fastest(options: Iterable[Choice], run: Callable[[Choice], object], device: torch.device) -> tuple[Choice, float]:
    """The choice with the least microseconds, and those. Options that cannot run here are left out.

    Raises :class:`RuntimeError` when none can, or when one takes the device's context down: nothing runs after that.
    """
    other = torch.zeros(_OTHER_BYTES // 4, device=device)
    best: tuple[Choice, float] | None = None
    for option in options:
        try:
            spent = _microseconds(functools.partial(run, option), other)
        except torch.cuda.OutOfMemoryError:
            continue
        except (RuntimeError, TritonError) as problem:
            _check_survived(option, problem, device)
            logger.debug("%s: not possible here: %s", option, str(problem)[:200])
            continue
        if best is None or spent < best[1]:
            best = option, spent
    if best is None:
        raise RuntimeError("no kernel of this product runs on this device")
    return best


def _check_survived(option: Choice, problem: Exception, device: torch.device) -> None:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise RuntimeError(f"{option} failed, and the device with it: {problem}") from problem


def _microseconds(run: Callable[[], object], other: torch.Tensor) -> float:
    run()  # compiles and reserves
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        run()
    times: list[float] = []
    for _ in range(_REPEATS):
        # Read, not written: dirty lines would have to go back to memory within the time. It takes longer than
        # launching the graph, so the launch is no part of the time.
        other.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return median(times)


class Table:
    """What was measured on one kind of device, in ``$XDG_CACHE_HOME/trtkit/linears/`` (``~/.cache`` by default)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._choices: dict[str, Choice] = {}
        self._stored: dict[str, Any] = {}
        try:
            # In a home of somebody else's even the question whether there is a file is refused.
            if path.is_file():
                stored = read_json(path, InputError)
                self._choices = {key: Choice(**entry["choice"]) for key, entry in stored.items()}
                self._stored = dict(stored)
        except (OSError, InputError, KeyError, TypeError, AttributeError) as problem:
            logger.debug("%s: not used: %s", path, problem)

    def get(self, shape: Shape, bucket: int) -> Choice | None:
        """What was chosen for the shape, if it was measured."""
        return self._choices.get(_key(shape, bucket))

    def put(self, shape: Shape, bucket: int, choice: Choice, microseconds: float) -> None:
        """Keep a choice, here and on disk."""
        key = _key(shape, bucket)
        self._choices[key] = choice
        self._stored[key] = {"choice": dataclasses.asdict(choice), "microseconds": round(microseconds, 2)}
        with contextlib.suppress(OSError, OutputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._stored)


def _key(shape: Shape, bucket: int) -> str:
    prepared = " prepared" if shape.prepared_input else ""
    return f"{shape.kind}{prepared} N={shape.columns} K={shape.depth} M<={bucket}"


@functools.cache
def table_of(device: torch.device) -> Table:
    """The table of this device, with this Triton, torch and these kernels."""
    sources = "".join(Path(str(room.__file__)).read_text(encoding="utf-8") for room in (choices, conversions, products))
    identity = (torch.cuda.get_device_name(device), triton.__version__, torch.__version__, sources)
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:24]
    return Table(cache_home() / "trtkit" / "linears" / f"{digest}.json")
