from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from trtkit.errors import UnsupportedError, UsageError
from trtkit.gpu import GPUS, cpu_profile, detect, profile_named


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("l4", "l4", 1), ("L4x4", "l4", 4), ("4xL4", "l4", 4), ("RTX 4090", "rtx4090", 1)]
)
def test_names_as_people_write_them(name: str, kind: str, count: int) -> None:
    profile = profile_named(name)
    assert (profile.kind, profile.count) == (kind, count)


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'h100'"):
        profile_named("h10")


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
     ("NVIDIA GeForce RTX 4090", 1, "rtx4090"), ("NVIDIA A100-SXM4-80GB", 1, "a100")],
)  # fmt: skip
def test_detect_names_the_device(monkeypatch: pytest.MonkeyPatch, device: str, count: int, expected: str) -> None:
    fake_cuda(monkeypatch, device, count)
    found = detect()
    assert found.name == expected
    assert found.memory_bytes == 23_000_000_000


def test_an_unknown_device_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, "NVIDIA GB9000")
    with pytest.raises(UnsupportedError, match="--gpu"):
        detect()


def test_without_cuda_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() == cpu_profile()


def test_the_table_needs_no_torch() -> None:
    code = "import sys, trtkit.gpu, trtkit.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
