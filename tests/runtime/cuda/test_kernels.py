"""When the Triton kernels are used, and that nothing imports triton before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from trtkit.runtime.cuda import kernels
from trtkit.runtime.cuda.kernels import attend_fits, open_cuda_kernels
from trtkit.runtime.native.loader import SWITCH

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(kernels, "_compiles", lambda device: True)


def test_a_cuda_device_with_triton_gets_them() -> None:
    pytest.importorskip("triton")
    assert type(open_cuda_kernels(CUDA, torch.bfloat16)).__name__ == "TritonPointwise"


def test_without_a_device_or_triton_or_leave_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert open_cuda_kernels(torch.device("cpu"), torch.bfloat16) is None
    assert open_cuda_kernels(CUDA, torch.float64) is None
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "0")
        assert open_cuda_kernels(CUDA, torch.bfloat16) is None
    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        assert open_cuda_kernels(CUDA, torch.bfloat16) is None
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_compiles", lambda device: False)
        assert open_cuda_kernels(CUDA, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert open_cuda_kernels(CUDA, torch.bfloat16) is None


def test_an_fp8_cache_needs_a_gpu_that_knows_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attend_fits(CUDA, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert not attend_fits(CUDA, "fp8")
    assert attend_fits(CUDA, "int8")


def test_the_cpu_path_imports_no_triton() -> None:
    code = "import sys, trtkit.runtime.decode, trtkit.runtime.cuda.batch; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
