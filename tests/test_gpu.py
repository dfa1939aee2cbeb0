from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtkit.errors import UnsupportedError, UsageError
from trtkit.gpu import GPUS, cpu_profile, detect, profile_named


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("l4", "l4", 1), ("L4x4", "l4", 4), ("4xL4", "l4", 4), ("RTX 4090", "rtx4090", 1), ("3 x RTX 4090", "rtx4090", 3),
     ("h100-pcie x5", "h100-pcie", 5), ("l4x1", "l4", 1), ("16xA100", "a100", 16)],
)  # fmt: skip
def test_names_as_people_write_them(name: str, kind: str, count: int) -> None:
    profile = profile_named(name)
    assert (profile.kind, profile.count) == (kind, count)


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'h100'"):
        profile_named("h10")


@pytest.mark.parametrize("name", ["l4x0", "l4x", "xl4", "cpux2", "2xcpu", "l4x2x2", "2xl4x2"])
def test_numbers_of_devices_that_make_no_sense(name: str) -> None:
    with pytest.raises(UsageError, match="unknown GPU"):
        profile_named(name)


def test_every_profile_is_plausible() -> None:
    for name, profile in GPUS.items():
        assert profile.name == name
        assert profile.memory_bytes > 8e9
        assert profile.flops["bf16"] > 0
        # fp8 units came with compute capability 8.9.
        assert profile.is_cpu or ("fp8" in profile.flops) == ((profile.capability or (0, 0)) >= (8, 9))


def fake_cuda(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 1) -> None:
    properties = SimpleNamespace(name=name, total_memory=23_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "count", "expected"),
    [("NVIDIA L4", 4, "l4x4"), ("NVIDIA L40S", 1, "l40s"), ("NVIDIA H100 80GB HBM3", 2, "h100x2"),
     ("NVIDIA GeForce RTX 4090", 1, "rtx4090"), ("NVIDIA A100-SXM4-80GB", 1, "a100"), ("Tesla T4", 2, "t4x2"),
     ("NVIDIA H100 PCIe", 2, "h100-pciex2"), ("NVIDIA H200", 8, "h200x8")],
)  # fmt: skip
def test_detect_names_the_device(monkeypatch: pytest.MonkeyPatch, device: str, count: int, expected: str) -> None:
    fake_cuda(monkeypatch, device, count)
    found = detect()
    assert found.name == expected
    assert found.memory_bytes == 23_000_000_000


@pytest.mark.parametrize("device", ["NVIDIA L4", "NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe"])
@pytest.mark.parametrize("count", range(1, 17))
def test_what_is_detected_has_a_name_that_can_be_given(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int
) -> None:
    """A recipe keeps the name only, and `plan` prints it for `build --gpu`."""
    fake_cuda(monkeypatch, device, count)
    found = detect()
    named = profile_named(found.name)
    assert named == replace(found, memory_bytes=named.memory_bytes)
    assert (named.count, named.kind) == (count, found.kind)
    assert profile_named(named.kind).count == 1


def test_only_devices_like_the_first_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, "NVIDIA L4", 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("NVIDIA L4", "Tesla T4", "NVIDIA L4")[index])
    assert detect().name == "l4x2"


@pytest.mark.parametrize(
    ("device", "gb_per_s", "least_gb"),
    [("NVIDIA H100 80GB HBM3", 3350, 80), ("NVIDIA H100 PCIe", 2000, 80), ("NVIDIA H100 NVL", 3900, 94),
     ("NVIDIA A100-SXM4-80GB", 2039, 80), ("NVIDIA A100 80GB PCIe", 1935, 80), ("NVIDIA A100-SXM4-40GB", 1555, 40),
     ("NVIDIA A100-PCIE-40GB", 1555, 40), ("A100-PCIE-40GB", 1555, 40), ("NVIDIA H200 NVL", 4800, 141)],
)  # fmt: skip
def test_cards_of_one_family_have_their_own_memory(
    monkeypatch: pytest.MonkeyPatch, device: str, gb_per_s: int, least_gb: int
) -> None:
    """Data-sheet figures; the memory of the table is what a plan for another machine counts with."""
    fake_cuda(monkeypatch, device)
    found = detect()
    assert found.bandwidth == gb_per_s * 1e9
    assert least_gb * 1e9 < GPUS[found.name].memory_bytes < least_gb * 1.1e9
    for spelling in (found.name, found.name.replace("-", ""), found.name.upper()):
        assert profile_named(spelling) is GPUS[found.name]


@pytest.mark.parametrize(
    "device",
    ["NVIDIA GB9000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40", "NVIDIA L4-24Q",
     "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM-64GB", "NVIDIA H800"],
)  # fmt: skip
def test_an_unknown_device_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    fake_cuda(monkeypatch, device)
    with pytest.raises(UnsupportedError, match="--gpu"):
        detect()


def test_without_cuda_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() == cpu_profile()


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="asks Linux")
def test_a_computers_memory_is_its_own() -> None:
    found = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    assert cpu_profile().memory_bytes == pytest.approx(int(found[1]) * 1024, rel=0.01)


def test_the_table_needs_no_torch() -> None:
    code = "import sys, trtkit.gpu, trtkit.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
