"""Compile a kernel for a GPU that is not there: Triton's compiler to PTX, the wheel's ptxas for the resources."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SHARED_LIMIT = {89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one program takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    ttgir: str
    """Triton's own code for GPUs, the layouts of the products included."""


def compile_for(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], *,
    warps: int = 4, stages: int = 2, aligned: bool = True,
) -> Resources:  # fmt: skip
    """``types``: Triton's name of each runtime argument's type ("*bf16", "i32"); pointers, and integers where
    ``aligned``, are taken to be multiples of 16, as a launch would find them to be."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    loose = {param.name for param in kernel.params if param.do_not_specialize or param.do_not_specialize_on_alignment}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in types and name not in loose and (types[name][0] == "*" or (aligned and types[name][0] == "i"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _assembled(compiled.asm["ptx"], get_ptxas(capability).path)
    return Resources(
        registers=registers, spilled_bytes=spilled, shared_bytes=compiled.metadata.shared, ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
    )  # fmt: skip


def _assembled(ptx: str, assembler: str) -> tuple[int, int]:
    """Registers a thread and spilled bytes, from ptxas's own report."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [
            assembler, "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path) + ".cubin",
        ]  # fmt: skip
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert registers is not None
    return int(registers[1]), sum(spills)
