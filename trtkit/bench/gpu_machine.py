"""What ``scripts/gpu_bench`` says of the machine, and how long a stage may take on it."""

from __future__ import annotations

import contextlib
import platform
import signal
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

__all__ = ["environment", "time_limit"]


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that the figures belong to."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    else:
        facts["device"] = platform.processor() or platform.machine()
    for name in ("triton", "transformers"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return facts


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TimeoutError` in the block when the time is up; between two steps, not within a kernel."""

    def ring(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
