"""``examine``: is this machine fit for the job, and for which precisions and backends?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from trtkit import __version__
from trtkit.bundled import practice_dir
from trtkit.errors import TrtkitError
from trtkit.gpu import GpuProfile, capability_text, detect
from trtkit.scheme import SCHEMES, QuantScheme

__all__ = ["Check", "Diagnosis", "PrecisionSupport", "examine", "installed_version", "precision_support"]

Status: TypeAlias = Literal["ok", "info", "warn", "fail"]

_LEAST = {"torch": (2, 7), "transformers": (4, 53), "safetensors": (0, 5), "tokenizers": (0, 21), "math-verify": (0, 9)}
_TENSORRT_WINDOW = ((1, 0), (1, 3))
"""First release with ReDrafter for Qwen; first one without the TensorRT backend."""
_LITTLE_DISK_BYTES = 5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. ``fail`` means that the base job (build and solve the practice checkpoint) cannot work here."""

    name: str
    status: Status
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionSupport:
    """How this machine runs one precision."""

    precision: str
    needs: str
    native: bool
    """The device has units for it; a CPU without them computes the same numbers the slow way, a GPU does not."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that ``doctor`` found."""

    checks: tuple[Check, ...]
    precisions: tuple[PrecisionSupport, ...]

    @property
    def healthy(self) -> bool:
        """True when nothing that the base job needs is broken."""
        return all(check.status != "fail" for check in self.checks)


def examine(directory: Path) -> Diagnosis:
    """Look at this machine; ``directory`` is where outputs would go."""
    device, gpu = _device_check()
    checks = (
        _python_check(), *(_package_check(name, least) for name, least in _LEAST.items()),
        _optional_check("nvidia-modelopt", "for --calibrator modelopt: pip install 'trtkit[modelopt]'"),
        _optional_check("aiohttp", "for solve and serve --endpoint: pip install 'trtkit[endpoint]'"),
        _optional_check("fastapi", "for serve: pip install 'trtkit[serve]'"),
        _tensorrt_check(gpu), device, *_together_checks(gpu), *_kernels_checks(gpu), _threads_check(),
        _disk_check(directory), _practice_check(),
    )  # fmt: skip
    return Diagnosis(checks=checks, precisions=tuple(precision_support(s, gpu) for s in SCHEMES.values()))


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, None when it is absent."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = [*(int(part) for part in re.findall(r"\d+", version)), 0, 0]
    return major, minor


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _python_check() -> Check:
    found = f"trtkit {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check(name="python", status="ok", detail=found)
    return Check(name="python", status="warn", detail=found, hint="tested with Python 3.11 to 3.13")


def _package_check(name: str, least: tuple[int, int]) -> Check:
    version = installed_version(name)
    hint = f"pip install '{name}>={_dotted(least)}'"
    if version is None:
        return Check(name=name, status="fail", detail="not installed", hint=hint)
    if _release(version) < least:
        return Check(name=name, status="fail", detail=f"{version} is too old", hint=hint)
    return Check(name=name, status="ok", detail=version)


def _optional_check(name: str, purpose: str) -> Check:
    version = installed_version(name)
    if version is None:
        return Check(name=name, status="info", detail="not installed (optional)", hint=purpose)
    return Check(name=name, status="ok", detail=version)


def _tensorrt_check(gpu: GpuProfile | None) -> Check:
    name, version = "tensorrt-llm", installed_version("tensorrt_llm")
    low, high = _TENSORRT_WINDOW
    window = f">={_dotted(low)},<{_dotted(high)}"
    if version is None:
        return Check(
            name=name, status="info", detail=f"not installed (optional; {window} with an NVIDIA GPU)",
            hint="the torch backend needs none of it",
        )  # fmt: skip
    if low <= _release(version) < high:
        detail = version if gpu is not None and not gpu.is_cpu else f"{version}, but no NVIDIA GPU to run it on"
        return Check(name=name, status="ok", detail=detail)
    why = "is older than Qwen's ReDrafter" if _release(version) < low else "has no TensorRT backend any more"
    return Check(
        name=name, status="warn", detail=f"{version} {why}; usable: {window}",
        hint="use --backend torch, or install tensorrt-llm 1.0 to 1.2",
    )  # fmt: skip


def _device_check() -> tuple[Check, GpuProfile | None]:
    if importlib.util.find_spec("torch") is None:
        return Check(name="device", status="info", detail="unknown without torch"), None
    try:
        gpu = detect()
    except TrtkitError as problem:
        return Check(name="device", status="warn", detail=problem.message, hint=problem.hint or ""), None
    except Exception as problem:  # a torch that does not import raises anything
        return Check(
            name="device", status="fail", detail=f"torch does not work: {problem}", hint="reinstall torch"
        ), None
    memory = f"{gpu.memory_bytes / 1e9:.1f} GB"
    if gpu.is_cpu:
        return Check(name="device", status="ok", detail=f"{gpu.title}, {memory}; no CUDA GPU"), gpu
    detail = f"{gpu.title}, {memory} each, compute capability {capability_text(gpu.capability)}"
    return Check(name="device", status="ok", detail=detail), gpu


def _together_checks(gpu: GpuProfile | None) -> tuple[Check, ...]:
    """Whether one engine can run on all GPUs; nothing to say on one."""
    if gpu is None or gpu.count == 1:
        return ()
    import torch.distributed

    if not torch.distributed.is_nccl_available():
        hint = "install a CUDA build of torch on Linux, or use one GPU"
        return (Check(name="together", status="warn", detail="torch has no NCCL: --tp does not work", hint=hint),)
    return (Check(name="together", status="ok", detail=f"NCCL is there: --tp {gpu.count} runs an engine on all GPUs"),)


def _kernels_checks(gpu: GpuProfile | None) -> tuple[Check, ...]:
    """What a CPU engine runs on; nothing to say on a GPU."""
    if gpu is None or not gpu.is_cpu:
        return ()
    from trtkit.runtime.native import loader

    detail, switch = loader.kernels_here(), os.environ.get(loader.SWITCH, "")
    if switch == "0":
        return (
            Check(
                name="kernels", status="warn", detail=f"turned off by {loader.SWITCH}=0: plain torch",
                hint="unset it: decoding is several times as fast with them",
            ),
        )  # fmt: skip
    if detail is None and loader.compiler_path() is None:
        return (
            Check(
                name="kernels", status="warn", detail="no C++ compiler: plain torch",
                hint="install g++: decoding is several times as fast with compiled kernels",
            ),
        )  # fmt: skip
    if detail is not None and (why := loader.kept_nowhere()) is not None:
        return (
            Check(
                name="kernels", status="warn", detail=f"plain torch: the kernels cannot be kept ({why})",
                hint="set TORCH_EXTENSIONS_DIR to a writable folder: decoding is several times as fast with them",
            ),
        )  # fmt: skip
    return (Check(name="kernels", status="ok", detail=detail or "plain torch: the CPU has no AVX2"),)


def _threads_check() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    detail = f"{usable} CPU cores usable, load average {load:.1f}"
    if load > usable + 0.5:
        return Check(
            name="threads", status="warn", detail=detail,
            hint="other programs are busy: `solve` takes as many threads as are fastest, `bench` measures too little",
        )  # fmt: skip
    return Check(name="threads", status="ok", detail=detail)


def _disk_check(directory: Path) -> Check:
    place = next((p for p in (directory, *directory.resolve().parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free in {place}"
    if not os.access(place, os.W_OK):
        return Check(
            name="disk", status="warn", detail=f"{place} is not writable", hint="pass --out with a writable place"
        )
    if free < _LITTLE_DISK_BYTES:
        return Check(name="disk", status="warn", detail=detail, hint="a quantized 14B engine takes 10 to 30 GB")
    return Check(name="disk", status="ok", detail=detail)


def _practice_check() -> Check:
    try:
        directory = practice_dir()
    except TrtkitError as problem:
        return Check(name="practice", status="fail", detail=problem.message, hint=problem.hint or "")
    missing = [name for name in ("model.safetensors", "tokenizer.json") if not (directory / name).is_file()]
    if missing:
        return Check(
            name="practice", status="fail", detail=f"{directory}: {', '.join(missing)} missing",
            hint="restore it from the repository, or make it with scripts/train_practice.py",
        )  # fmt: skip
    return Check(name="practice", status="ok", detail=f"practice checkpoint in {directory}")


def precision_support(scheme: QuantScheme, gpu: GpuProfile | None) -> PrecisionSupport:
    """Whether ``gpu`` runs ``scheme`` with its own units."""
    needs = f"GPU with compute capability {capability_text(scheme.min_capability)}"
    if gpu is None:
        native, detail = False, "unknown device"
    elif gpu.capability is None:
        native, detail = scheme.name == "bf16" or scheme.activations == "int8", "runs on the CPU (torch backend)"
    elif gpu.capability >= scheme.min_capability:
        native, detail = True, f"runs on {gpu.title}"
    else:
        native, detail = False, f"not on {gpu.title} ({capability_text(gpu.capability)})"
    return PrecisionSupport(precision=scheme.name, needs=needs, native=native, detail=detail)
