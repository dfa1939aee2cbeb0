"""The roofline card: what this machine's memory can do, measured in the process that measures the engines."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trtkit.log import logger

__all__ = ["Machine", "measure_machine"]

_BUFFER_BYTES = 256 << 20
"""Far larger than any cache."""


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


def measure_machine(device_name: str) -> Machine:
    """Measure this machine's memory; ``device_name`` is auto, cpu or cuda. Warns when other programs are running."""
    name = device_name
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
