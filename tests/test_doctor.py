from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtkit import doctor
from trtkit.errors import ConfigError
from trtkit.gpu import profile_named
from trtkit.runtime.native import loader
from trtkit.scheme import scheme_named


def found(directory: Path, name: str) -> doctor.Check:
    return next(check for check in doctor.examine(directory).checks if check.name == name)


def versions(monkeypatch: pytest.MonkeyPatch, **known: str | None) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: known[name] if name in known else real(name))


def test_this_machine(tmp_path: Path) -> None:
    diagnosis = doctor.examine(tmp_path)
    assert {support.precision for support in diagnosis.precisions} == {"bf16", "int8", "int8-sq", "fp8", "int4"}
    assert {"python", "torch", "device", "disk", "practice"} <= {check.name for check in diagnosis.checks}
    assert all(check.status != "fail" or check.hint for check in diagnosis.checks)
    assert {check.status for check in diagnosis.checks if check.name in ("python", "practice")} == {"ok"}


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [("1.0.0", "ok", ""), ("1.2.1", "ok", ""), ("1.3.0", "warn", "no TensorRT backend"), ("0.21.0", "warn", "older"),
     (None, "info", "optional")],
)  # fmt: skip
def test_the_tensorrt_llm_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, status: str, said: str
) -> None:
    versions(monkeypatch, tensorrt_llm=version)
    check = found(tmp_path, "tensorrt-llm")
    assert check.status == status
    assert said in check.detail


@pytest.mark.parametrize("version", [None, "2.6.0"])
def test_a_missing_or_old_torch_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    versions(monkeypatch, torch=version)
    assert found(tmp_path, "torch").status == "fail"
    assert not doctor.examine(tmp_path).healthy


def test_a_cpu_without_a_compiler_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("cpu"))
    monkeypatch.delenv(loader.SWITCH, raising=False)
    monkeypatch.setattr(loader, "compiler_path", lambda: None)
    check = found(tmp_path, "kernels")
    assert check.status == "warn"
    assert "g++" in check.hint


BF16 = "avx512_bf16 avx512_vnni avx512vbmi avx512_vbmi2"


@pytest.mark.parametrize(
    ("flags", "vectors", "said"),
    [(f"{BF16} amx_tile amx_bf16 amx_int8", "AVX512", "(AMX)"), (BF16, "AVX512", "(AVX512 with BF16)"),
     ("avx512f avx512_vnni", "AVX512", "(AVX512 with VNNI)"), ("avx512f", "AVX512", "(AVX512)"),
     ("avx2", "AVX2", "(AVX2)"), ("sse2", "DEFAULT", "plain torch")],
)  # fmt: skip
def test_which_kernels_a_cpu_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, vectors: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("cpu"))
    monkeypatch.delenv(loader.SWITCH, raising=False)
    monkeypatch.setattr(loader, "compiler_path", lambda: "/usr/bin/g++")
    monkeypatch.setattr(loader, "_cpu_flags", lambda: set(flags.split()))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    check = found(tmp_path, "kernels")
    assert check.status == "ok"
    assert said in check.detail


def test_kernels_that_are_turned_off_are_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("cpu"))
    monkeypatch.setenv(loader.SWITCH, "0")
    check = found(tmp_path, "kernels")
    assert (check.status, check.hint.startswith("unset it")) == ("warn", True)


@pytest.mark.parametrize(
    ("free", "writable", "status", "said"),
    [(20e9, True, "ok", "20.0 GB free"), (4e9, True, "warn", "4.0 GB free"), (20e9, False, "warn", "not writable")],
)
def test_the_disk_that_outputs_would_go_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, writable: bool, status: str, said: str
) -> None:
    asked = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: writable)
    for directory in (tmp_path, tmp_path / "not" / "made yet"):
        check = found(directory, "disk")
        assert (check.status, said in check.detail) == (status, True)
    assert asked == [tmp_path, tmp_path]


def test_a_busy_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for load, status in ((3.2, "ok"), (4.0, "warn")):
        monkeypatch.setattr(doctor.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert found(tmp_path, "threads").status == status


@pytest.mark.parametrize(("version", "status"), [("2.7.0+cpu", "ok"), ("2.10.1", "ok"), ("2.6.9", "fail")])
def test_versions_are_numbers_and_the_least_one_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: str
) -> None:
    versions(monkeypatch, torch=version)
    assert found(tmp_path, "torch").status == status


def test_a_missing_practice_checkpoint_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ConfigError("not here", hint="get it")

    monkeypatch.setattr(doctor, "practice_dir", missing)
    assert found(tmp_path, "practice").status == "fail"


def test_precisions_by_device() -> None:
    assert doctor.precision_support(scheme_named("fp8"), profile_named("l4")).native  # 8.9, the least that has it
    on_cpu = {
        name: doctor.precision_support(scheme_named(name), profile_named("cpu")).native for name in ("bf16", "fp8")
    }
    assert on_cpu == {"bf16": True, "fp8": False}
    assert not doctor.precision_support(scheme_named("fp8"), profile_named("a100")).native
    assert not doctor.precision_support(scheme_named("int8"), None).native
