"""``GpuProfile``: what a GPU set-up can hold and how fast it is, from the vendors' data sheets. No torch at import.

FLOP/s are dense (data sheets often print the sparse figure, twice as large). Memory is what the driver reports, which
is less than the name says.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from trtkit.errors import UnsupportedError, UsageError
from trtkit.files import nearest

__all__ = ["GPUS", "GpuProfile", "LinkKind", "MemoryKind", "capability_text", "cpu_profile", "cuda_device", "detect",
           "profile_named"]  # fmt: skip

_MIB = 1 << 20

MemoryKind: TypeAlias = Literal["gddr", "hbm", "ddr"]
LinkKind: TypeAlias = Literal["nvlink", "pcie", "host"]
"""How devices exchange partial sums: NVLink, PCIe peer-to-peer, or PCIe through the host's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProfile:
    """One machine's accelerators: ``count`` equal devices. All figures are per device."""

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    """Bytes per second of device memory."""
    flops: Mapping[str, float]
    """Dense operations per second by activation format: bf16, int8, fp8 (absent where there is no such unit)."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a CPU."""
    memory: MemoryKind
    link: LinkKind
    count: int = 1

    @property
    def kind(self) -> str:
        """The name of one device: ``l4`` for ``l4x4``."""
        return self.name.removesuffix(f"x{self.count}")

    @property
    def is_cpu(self) -> bool:
        """True for the embedded runtime without a GPU."""
        return self.capability is None

    def times(self, count: int) -> GpuProfile:
        """The same device ``count`` times."""
        if count == 1:
            return self
        return replace(self, name=f"{self.name}x{count}", title=f"{count}x {self.title}", count=count)


def _profile(name: str, title: str, mib: int, gb_per_s: float, tflops: tuple[float, float, float],
             capability: tuple[int, int], memory: MemoryKind, link: LinkKind) -> GpuProfile:  # fmt: skip
    formats = zip(("bf16", "int8", "fp8"), tflops, strict=True)
    return GpuProfile(
        name=name, title=title, memory_bytes=mib * _MIB, bandwidth=gb_per_s * 1e9,
        flops={kind: value * 1e12 for kind, value in formats if value}, capability=capability, memory=memory, link=link,
    )  # fmt: skip


# NVIDIA's data sheets of T4, L4, L40S, A100 (40GB and 80GB, PCIe and SXM), H100 (SXM and NVL; PCIe: that of 2022),
# H200 (SXM and NVL) and B200, and the Ada GPU architecture paper for the RTX 4090. A bridge between PCIe cards is not
# counted: a name does not tell of it.
_SINGLE = (
    _profile("t4", "T4", 15360, 320, (65, 130, 0), (7, 5), "gddr", "host"),
    _profile("l4", "L4", 23034, 300, (121, 242, 242), (8, 9), "gddr", "host"),
    _profile("l40s", "L40S", 46068, 864, (362, 733, 733), (8, 9), "gddr", "pcie"),
    _profile("rtx4090", "RTX 4090", 24564, 1008, (165, 660, 330), (8, 9), "gddr", "host"),
    _profile("a100", "A100 80GB", 81920, 2039, (312, 624, 0), (8, 0), "hbm", "nvlink"),
    _profile("a100-pcie", "A100 80GB PCIe", 81920, 1935, (312, 624, 0), (8, 0), "hbm", "pcie"),
    _profile("a100-40gb", "A100 40GB", 40960, 1555, (312, 624, 0), (8, 0), "hbm", "nvlink"),
    _profile("a100-pcie-40gb", "A100 40GB PCIe", 40960, 1555, (312, 624, 0), (8, 0), "hbm", "pcie"),
    _profile("h100", "H100 SXM", 81559, 3350, (989, 1979, 1979), (9, 0), "hbm", "nvlink"),
    _profile("h100-pcie", "H100 PCIe", 81559, 2000, (756, 1513, 1513), (9, 0), "hbm", "pcie"),
    _profile("h100-nvl", "H100 NVL", 95830, 3900, (835, 1671, 1671), (9, 0), "hbm", "pcie"),
    _profile("h200", "H200", 143771, 4800, (989, 1979, 1979), (9, 0), "hbm", "nvlink"),
    _profile("h200-nvl", "H200 NVL", 143771, 4800, (835, 1671, 1671), (9, 0), "hbm", "pcie"),
    _profile("b200", "B200", 183359, 8000, (2250, 4500, 4500), (10, 0), "hbm", "nvlink"),
)
_REPORTED = {
    "T4": "t4", "L4": "l4", "L40S": "l40s", "RTX 4090": "rtx4090",
    "A100-SXM4-80GB": "a100", "A100 80GB PCIe": "a100-pcie",
    "A100-SXM4-40GB": "a100-40gb", "A100-PCIE-40GB": "a100-pcie-40gb",
    "H100 80GB HBM3": "h100", "H100 PCIe": "h100-pcie", "H100 NVL": "h100-nvl",
    "H200": "h200", "H200 NVL": "h200-nvl", "B200": "b200",
}  # fmt: skip
"""What the driver (torch, NVML) calls them behind its maker's and line's names. The whole name counts: an "RTX 4090
Laptop GPU" is another card, and "H100 80GB HBM3 MIG 1g.10gb" a part of one."""
_CPU = GpuProfile(
    name="cpu", title="CPU (nominal)", memory_bytes=16 << 30, bandwidth=20e9,
    flops={"bf16": 0.4e12, "int8": 0.8e12, "fp8": 0.4e12}, capability=None, memory="ddr", link="host",
)  # fmt: skip

GPUS: dict[str, GpuProfile] = {
    profile.name: profile for single in _SINGLE for profile in (single, *(single.times(count) for count in (2, 4, 8)))
} | {"cpu": _CPU}
"""One device of each kind, and the counts that machines are sold with; ``profile_named`` takes every count."""
_COUNT = r"([1-9][0-9]?)"


def profile_named(name: str) -> GpuProfile:
    """The set-up called ``name`` (``l4``, ``l4x4``, ``3xh100``, ``cpu``); :class:`UsageError` with the nearest name."""
    key = _plain(name)
    known = {_plain(listed): profile for listed, profile in GPUS.items()}
    if key in known:
        return known[key]
    several = {_plain(single.name): single for single in _SINGLE}
    for pattern, kind, count in ((rf"(.+)x{_COUNT}", 1, 2), (rf"{_COUNT}x(.+)", 2, 1)):
        match = re.fullmatch(pattern, key)
        if match and match.group(kind) in several:
            return known[match.group(kind)].times(int(match.group(count)))
    raise UsageError(
        f"unknown GPU {name!r}{nearest(key, GPUS)}",
        hint=f"one of: {', '.join(single.name for single in _SINGLE)}, several of them as l4x4 or 4xl4; cpu; auto",
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def cpu_profile() -> GpuProfile:
    """The CPU profile with this machine's memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # no such figure on this system
        return _CPU
    return replace(_CPU, title=f"this CPU ({platform.machine()})", memory_bytes=memory)


def detect() -> GpuProfile:
    """The accelerators of this machine: the first CUDA device's kind, as often as it is there; else the CPU.

    Raises :class:`UnsupportedError` for a CUDA device that the table does not know.
    """
    import torch

    if not torch.cuda.is_available():
        return cpu_profile()
    device = torch.cuda.get_device_properties(0)
    name = _REPORTED.get(re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device.name))
    if name is None:
        raise UnsupportedError(
            f"{device.name} is not in the table of GPUs", hint="pass the most similar one with --gpu, e.g. --gpu h100"
        )
    alike = sum(torch.cuda.get_device_name(i) == device.name for i in range(torch.cuda.device_count()))
    return replace(GPUS[name], memory_bytes=device.total_memory).times(alike)


def cuda_device() -> tuple[str, tuple[int, int]] | None:
    """Name and compute capability of the first CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return torch.cuda.get_device_name(0), (major, minor)


def capability_text(capability: tuple[int, int] | None) -> str:
    """``(8, 9)`` -> ``8.9``; None (a CPU) -> ``none``."""
    return "none" if capability is None else f"{capability[0]}.{capability[1]}"
