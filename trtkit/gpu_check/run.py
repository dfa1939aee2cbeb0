"""Run the checklist on this machine."""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from trtkit.build.trtllm import require_tensorrt_llm
from trtkit.errors import TrtkitError
from trtkit.gpu import capability_text, cuda_device, detect
from trtkit.gpu_check.items import ITEMS
from trtkit.gpu_check.lab import FailedError, Lab, SkippedError
from trtkit.log import logger

__all__ = ["Finding", "check_gpu_host"]

Status: TypeAlias = Literal["ok", "info", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one item showed; ``info`` when this machine cannot show it."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def check_gpu_host(*, torch_device: str = "auto", only: Sequence[str] = ()) -> tuple[Finding, ...]:
    """Run the checklist on this machine. Item 1 is the machine; without it nothing else is tried.

    ``only`` names items to run. Never raises for what an experiment does: the finding is the result.
    """
    machine, gpu, devices = _machine()
    if machine.status == "fail":
        return (machine,)
    checks = [machine]
    scratch = Path(tempfile.mkdtemp(prefix="trtkit-gpu-check-"))
    try:
        lab = Lab(scratch, gpu, devices, torch_device=torch_device)
        for number, (name, experiment) in enumerate(ITEMS, start=2):
            if only and name not in only:
                continue
            logger.info("gpu check %d: %s", number, name)
            checks.append(_run(f"{number} {name}", experiment, lab))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return tuple(checks)


def _machine() -> tuple[Finding, str, int]:
    wrong, hints, profile = [], [], None
    try:
        version = require_tensorrt_llm()
    except TrtkitError as problem:
        wrong.append(problem.message)
        hints.append(problem.hint or "")
        version = ""
    found = cuda_device()
    if found is None:
        wrong.append("no CUDA GPU")
        hints.append("run this on the GPU host")
    else:
        try:
            profile = detect()
        except TrtkitError as problem:
            wrong.append(problem.message)
            hints.append("add the GPU to trtkit/gpu.py")
    name = "1 the machine"
    if wrong or profile is None or found is None:
        return Finding(name=name, status="fail", detail="; ".join(wrong), hint="; ".join(hints)), "", 0
    detail = f"TensorRT-LLM {version} on {profile.count}x {found[0]} ({capability_text(found[1])})"
    return Finding(name=name, status="ok", detail=detail), profile.kind, profile.count


def _run(name: str, experiment: Callable[[Lab], str], lab: Lab) -> Finding:
    began = time.monotonic()
    status: Status = "fail"
    hint = ""
    try:
        status, detail = "ok", experiment(lab)
    except SkippedError as reason:
        status, detail = "info", f"not shown: {reason}"
    except FailedError as reason:
        status, detail = "fail", str(reason)
    except TrtkitError as problem:
        status, detail, hint = "fail", "; ".join([problem.message, *problem.offenders]), problem.hint or ""
    except Exception as problem:  # whatever TensorRT-LLM throws is a finding too
        where = traceback.extract_tb(problem.__traceback__)[-1]
        status, detail = "fail", f"{type(problem).__name__}: {problem} ({Path(where.filename).name}:{where.lineno})"
    return Finding(name=name, status=status, detail=f"{detail} [{time.monotonic() - began:.0f} s]", hint=hint)
