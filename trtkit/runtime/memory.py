"""How much memory there still is on a device, for keys and values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["free_bytes"]

_FILES = {
    "cgroup v2": ("memory.max", "memory.current", "inactive_file"),
    "cgroup v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of a control group: its limit, what it holds, and the line of memory.stat for files that can be dropped from that."""


def free_bytes(device: torch.device, *, system: Path = Path("/")) -> int:
    """On CUDA what the driver gives; on a CPU what Linux calls available, less where a container may have less.

    That is more than what nobody uses: the page cache, which holds the checkpoint after a build, gives way. ``system``:
    the root directory, for tests.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left in torch's own cache is free, too
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([_available(system / "proc/meminfo"), *_left_in_groups(system)])


def _available(meminfo: Path) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_groups(system: Path) -> Iterator[int]:
    """What the limits of this process's control groups leave (man 7 cgroups)."""
    groups = system / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = system / "sys/fs/cgroup", _FILES["cgroup v2"]
        elif "memory" in controllers.split(","):
            root, files = system / "sys/fs/cgroup/memory", _FILES["cgroup v1"]
        else:
            continue
        # The limits above count as well. In a container the path may be that of the host, with only the root in sight.
        inside = Path(path.lstrip("/"))
        for group in dict.fromkeys([inside, *inside.parents, Path()]):
            left = _left(root / group, *files)
            if left is not None:
                yield left


def _left(group: Path, limit_file: str, usage_file: str, cached_line: str) -> int | None:
    try:
        limit = (group / limit_file).read_text(encoding="ascii").strip()
        usage = int((group / usage_file).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - usage + int(stat.get(cached_line, 0)))
