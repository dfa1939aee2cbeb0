"""The machine under the measurement: how busy others keep it, and how fast its memory reads. Standard library only,
apart from the read probe, which runs in a process of its own with torch."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

__all__ = ["BUSY_SHARE", "ForeignLoad", "cores", "cpu_features", "cpu_name", "idle_share"]

BUSY_SHARE = 0.1
"""Other programs took more of one core than this: the timing counts as disturbed. A second busy process multiplies
two-thread steps by 10 to 30."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor as the system names it."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Of the vector extensions that decide which kernels a peer can run, those that are there."""
    flags = _cpu_field("flags").split()
    return [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags]


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


class ForeignLoad:
    """CPU time that everything but this process takes, from the moment it is made. Linux only."""

    def __init__(self) -> None:
        self._clock, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Mean share of one core (2.0: two cores) since then, stolen time included; None where it cannot be read."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        passed = max(time.perf_counter() - self._clock, 1e-9)
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / passed)


def idle_share(seconds: float = 1.0) -> float | None:
    """What others take of one core while this process sleeps."""
    load = ForeignLoad()
    time.sleep(seconds)
    return load.share()


def _busy_seconds() -> float | None:
    """All cores' time in user, nice, system, irq, softirq and steal since boot: proc(5)."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, line[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
