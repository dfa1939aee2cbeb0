"""The memory for keys and values: what Linux can give, within what a container may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trtkit.runtime.memory import free_bytes

CPU = torch.device("cpu")
MEMINFO = "MemTotal: 24684084 kB\nMemFree: 100 kB\nMemAvailable: 9000 kB\nCached: 8900 kB\n"
V2 = {"memory.max": "5000000\n", "memory.current": "3000000\n", "memory.stat": "anon 1\ninactive_file 1000000\n"}
V1 = {
    "memory.limit_in_bytes": "5000000\n", "memory.usage_in_bytes": "3000000\n",
    "memory.stat": "inactive_file 7\ntotal_inactive_file 1000000\n",
}  # fmt: skip


def write(root: Path, **files: str | dict[str, str]) -> Path:
    """Files by path; a dictionary is a folder of files."""
    for name, text in files.items():
        for path, content in (
            {name: text}.items() if isinstance(text, str) else {f"{name}/{n}": t for n, t in text.items()}.items()
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
    return root


def test_what_the_system_keeps_of_files_can_be_had(tmp_path: Path) -> None:
    """After a build nearly all memory may hold the checkpoint's pages, which count as used and are free to take."""
    assert free_bytes(CPU, system=write(tmp_path, **{"proc/meminfo": MEMINFO})) == 9000 * 1024


@pytest.mark.parametrize("meminfo", [None, "MemTotal: 24684084 kB\n"])
def test_an_old_kernel_says_less(tmp_path: Path, meminfo: str | None) -> None:
    system = tmp_path if meminfo is None else write(tmp_path, **{"proc/meminfo": meminfo})
    assert 0 < free_bytes(CPU, system=system) < 1 << 50


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/", "sys/fs/cgroup", V2),
        ("0::/user.slice/job", "sys/fs/cgroup/user.slice/job", V2),
        ("0::/user.slice/job", "sys/fs/cgroup/user.slice", V2),  # the limit of a group above
        ("4:cpu,memory:/docker/abc", "sys/fs/cgroup/memory", V1),  # in a container, with the host's path
        ("4:memory:/docker/abc", "sys/fs/cgroup/memory/docker/abc", V1),
    ],
)
def test_a_container_has_no_more_than_its_limit(tmp_path: Path, line: str, folder: str, files: dict[str, str]) -> None:
    other = "7:cpuset:/x\n1:name=systemd:/\n"
    system = write(tmp_path, **{"proc/meminfo": MEMINFO, "proc/self/cgroup": f"{other}{line}\n", folder: files})
    assert free_bytes(CPU, system=system) == 5_000_000 - 3_000_000 + 1_000_000
    limit = next(name for name in files if name not in ("memory.stat", "memory.current", "memory.usage_in_bytes"))
    (system / folder / limit).write_text("2000000\n")
    assert free_bytes(CPU, system=system) == 0
    (system / folder / limit).write_text("max\n" if files is V2 else "9223372036854771712\n")
    assert free_bytes(CPU, system=system) == 9000 * 1024
