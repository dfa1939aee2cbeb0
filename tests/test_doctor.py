from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtkit import doctor
from trtkit.errors import ConfigError, UnsupportedError
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


@pytest.mark.parametrize(("gpu", "nccl", "status"), [("l4x4", True, "ok"), ("l4x4", False, "warn"), ("l4", True, "")])
def test_several_gpus_take_nccl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, nccl: bool, status: str
) -> None:
    monkeypatch.setattr(doctor, "detect", lambda: profile_named(gpu))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: nccl)
    checks = [check for check in doctor.examine(tmp_path).checks if check.name == "together"]
    assert [check.status for check in checks] == ([status] if status else [])
    assert all("--tp" in check.detail for check in checks)


def test_what_is_installed_is_told_with_its_version(tmp_path: Path) -> None:
    for name in ("torch", "transformers", "safetensors", "tokenizers", "math-verify"):
        check = found(tmp_path, name)
        assert (check.status, check.detail) == ("ok", importlib.metadata.version(name))
    assert doctor.installed_version("no-such-package") is None


def test_a_package_is_too_old_here_when_it_is_for_pip() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(re.findall(r'^  "([a-z-]+)[>=]=([0-9.]+)",$', text, re.MULTILINE))
    for name, least in doctor._LEAST.items():
        assert asked[name].startswith(f"{least[0]}.{least[1]}"), name


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "warn"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "warn")]
)
def test_a_python_that_was_not_tested_is_told(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(doctor.sys, "version_info", (*version, 0, "final", 0))
        check = doctor._python_check()
    assert (check.status, "3.11 to 3.13" in check.hint) == (status, status == "warn")


@pytest.mark.parametrize(("version", "status", "said"), [("0.40.0", "ok", "0.40.0"), (None, "info", "optional")])
@pytest.mark.parametrize(
    ("package", "extra"),
    [("nvidia-modelopt", "trtkit[modelopt]"), ("aiohttp", "trtkit[endpoint]"), ("fastapi", "trtkit[serve]")],
)
def test_extras_are_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, version: str | None, status: str,
    said: str,
) -> None:  # fmt: skip
    versions(monkeypatch, **{package: version})
    check = found(tmp_path, package)
    assert check.status == status
    assert said in check.detail
    assert (f"pip install '{extra}'" in check.hint) is (version is None)
    assert doctor.examine(tmp_path).healthy


def test_a_gpu_is_told_and_needs_no_cpu_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, tensorrt_llm="1.2.0")
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("l4x2"))
    assert found(tmp_path, "device").detail == "2x L4, 24.2 GB each, compute capability 8.9"
    assert found(tmp_path, "tensorrt-llm").detail == "1.2.0"
    assert "kernels" not in {check.name for check in doctor.examine(tmp_path).checks}
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("cpu"))
    assert found(tmp_path, "device").detail == "CPU (nominal), 17.2 GB; no CUDA GPU"
    assert found(tmp_path, "tensorrt-llm").detail == "1.2.0, but no NVIDIA GPU to run it on"


@pytest.mark.parametrize(
    ("problem", "status", "said", "hint"),
    [
        (UnsupportedError("X9 is not in the table", hint="pass another"), "warn", "X9 is not in the table", "pass ano"),
        (OSError("libcudart.so.13: cannot open"), "fail", "torch does not work: libcudart.so.13", "reinstall torch"),
    ],
)
def test_a_device_that_cannot_be_told_leaves_the_rest_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, status: str, said: str, hint: str
) -> None:
    def detect() -> None:
        raise problem

    versions(monkeypatch, tensorrt_llm="1.2.0")
    monkeypatch.setattr(doctor, "detect", detect)
    check = found(tmp_path, "device")
    assert (check.status, check.detail.startswith(said), check.hint.startswith(hint)) == (status, True, True)
    diagnosis = doctor.examine(tmp_path)
    assert {support.detail for support in diagnosis.precisions} == {"unknown device"}
    assert diagnosis.healthy is (status != "fail")
    assert "no NVIDIA GPU" in found(tmp_path, "tensorrt-llm").detail


def test_without_torch_the_device_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "detect", lambda: pytest.fail("that would import it"))
    check = found(tmp_path, "device")
    assert (check.status, check.detail) == ("info", "unknown without torch")


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


def test_kernels_that_cannot_be_kept_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A home that is read-only, as containers have, or none at all: decoding is slow, and that is said."""
    monkeypatch.setattr(doctor, "detect", lambda: profile_named("cpu"))
    monkeypatch.delenv(loader.SWITCH, raising=False)
    monkeypatch.setattr(loader, "compiler_path", lambda: "/usr/bin/g++")
    monkeypatch.setattr(loader, "_cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    check = found(tmp_path, "kernels")
    assert check.status == "warn"
    assert "Not a directory" in check.detail
    assert "TORCH_EXTENSIONS_DIR" in check.hint
    assert not loader.load.__wrapped__()
    assert "decoding is slow: " in caplog.text
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert found(tmp_path, "kernels").status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "looking makes nothing"


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


def test_other_systems_know_less_of_their_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(doctor.os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(doctor.os, "getloadavg", raising=False)
    for counted, said in ((6, "6 CPU cores usable, load average 0.0"), (None, "1 CPU cores usable, load average 0.0")):
        monkeypatch.setattr(doctor.os, "cpu_count", lambda counted=counted: counted)
        assert found(tmp_path, "threads").detail == said


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


def test_a_practice_checkpoint_with_a_hole_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "practice_dir", lambda: tmp_path)
    (tmp_path / "tokenizer.json").touch()
    check = found(tmp_path, "practice")
    assert (check.status, check.detail) == ("fail", f"{tmp_path}: model.safetensors missing")
    (tmp_path / "model.safetensors").touch()
    assert found(tmp_path, "practice").status == "ok"


def test_precisions_by_device() -> None:
    assert doctor.precision_support(scheme_named("fp8"), profile_named("l4")).native  # 8.9, the least that has it
    on_cpu = {
        name: doctor.precision_support(scheme_named(name), profile_named("cpu")).native for name in ("bf16", "fp8")
    }
    assert on_cpu == {"bf16": True, "fp8": False}
    assert not doctor.precision_support(scheme_named("fp8"), profile_named("a100")).native
    assert not doctor.precision_support(scheme_named("int8"), None).native
    assert doctor.precision_support(scheme_named("int8-sq"), profile_named("cpu")).native
    a100, l4 = (doctor.precision_support(scheme_named("fp8"), profile_named(name)) for name in ("a100", "l4"))
    assert (a100.detail, l4.detail) == ("not on A100 80GB (8.0)", "runs on L4")
    assert a100.needs == "GPU with compute capability 8.9"
