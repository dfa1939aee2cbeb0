"""What ``scripts/gpu_bench`` says of the machine, and how long a stage may take on it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import threading
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

__all__ = ["STUCK", "device_answers", "environment", "time_limit"]

STUCK = 75
"""Exit code of a process whose device no longer answers. ``scripts/gpu_bench`` goes on in another one."""
_PATIENCE_SECONDS = 20.0
"""Between the exception and the end of the process."""


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that the figures belong to."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        from trtkit.runtime.cuda.dependent import SWITCH  # loads triton

        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda, "early_start": os.environ.get(SWITCH) == "1",
        }  # fmt: skip
    else:
        facts["device"] = platform.processor() or platform.machine()
    for name in ("triton", "transformers"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return facts


def device_answers(device: torch.device) -> bool:
    """False after an error that a CUDA context does not survive: it stays, whatever is asked for next."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises :class:`TimeoutError` in the block when the time is up, between two steps. Where the block waits within a
    kernel that does not end, no exception reaches it: the process then leaves with ``STUCK``."""

    def ring(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    def leave() -> None:
        faulthandler.dump_traceback()
        os._exit(STUCK)

    before = signal.signal(signal.SIGALRM, ring)
    watch = threading.Timer(seconds + _PATIENCE_SECONDS, leave)
    watch.daemon = True
    watch.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watch.cancel()
