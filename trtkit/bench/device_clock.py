"""Times on the device: a closure as a CUDA graph between two events, kernels by name, the bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["copy_bandwidth", "device_seconds", "kernels_of", "spent_by_name"]

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
_WARM_UPS = 3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second of a plain copy far larger than any cache: the best of several."""
    size = _COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(_timed(lambda: target.copy_(source), device) for _ in range(10))


def device_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median duration of ``work``; on CUDA of its replay as a graph, so that launches do not count."""
    run: Callable[[], object] = work
    if device.type == "cuda":
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            work()
        run = graph.replay
    run()
    return statistics.median(_timed(run, device) for _ in range(repeats if device.type == "cuda" else 3))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begins, ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begins.record()
    work()
    ends.record()
    ends.synchronize()
    return float(begins.elapsed_time(ends)) * 1e-3


def kernels_of(work: Callable[[], object], device: torch.device, repeats: int, most: int = 12) -> dict[str, float]:
    """Microseconds per run of ``work`` by kernel (by operation on a CPU), the longest first."""
    activities = [ProfilerActivity.CPU] if device.type == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as recorded:
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent: dict[str, float] = {}
    for name, micros in spent_by_name(recorded.key_averages(), device).items():
        spent[name[:80]] = spent.get(name[:80], 0.0) + micros / repeats
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:most])


def spent_by_name(averages: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Microseconds of the profiler's ``key_averages()`` by kernel or copy; by operation on a CPU. Nothing counts twice.

    On CUDA the operation that launched a kernel has the kernel's time too, and a call in which the host waits for the
    device has it once more.
    """
    spent: dict[str, float] = {}
    for event in averages:
        if device.type == "cpu":
            micros = float(event.self_cpu_time_total)
        else:
            micros = 0.0 if event.device_type.name == "CPU" else float(event.self_device_time_total)
        if micros > 0:
            spent[event.key] = spent.get(event.key, 0.0) + micros
    return spent
