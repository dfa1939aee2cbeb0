"""Compile the C++ sources of this folder once per machine and load them; without a compiler nothing happens.

The library lies in the folder that torch keeps for compiled extensions, under a name made of the sources, the flags,
the CPU and the torch version. The compiler is called directly, for all sources at the same time: a handful of files
needs no ninja, and one process compiles while the others wait.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from trtkit.locks import in_turn
from trtkit.log import logger

__all__ = [
    "COMPILE_SECONDS",
    "SWITCH",
    "WORTHWHILE_PARAMETERS",
    "compiler_path",
    "kept_nowhere",
    "kernels_here",
    "library_path",
    "load",
    "wanted",
]

SWITCH = "TRTKIT_NATIVE"
"""Environment variable: 0 never compiles or loads, 1 does so for the smallest model."""
_PLACE = "TORCH_EXTENSIONS_DIR"
"""Environment variable of torch: the folder that compiled extensions are kept in."""
WORTHWHILE_PARAMETERS = 3_000_000
"""Below, a model runs in pure torch: a first run would compile for longer than it computes. The practice model, at
4.2M, decodes 2.5 times as fast with the kernels."""
COMPILE_SECONDS = 45
"""What the compiler takes on two free cores, for the log; torch's headers are most of it."""

_FOLDER = Path(__file__).parent
# No link to an OpenMP library: the symbols are those of the one that torch has loaded, and so are the threads.
_FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-std=c++20", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-DAT_PARALLEL_OPENMP=1",
)  # fmt: skip
# Fused multiply-adds would change the bits of the sampling weights.
_OF_ONE_SOURCE = {"sampling.cpp": ("-ffp-contract=off",)}
_LINK = ("-lc10", "-ltorch_cpu")
_TIMEOUT_SECONDS = 600
_BF16_DOTS = {"avx512_bf16", "avx512_vnni", "avx512vbmi", "avx512_vbmi2"}
_MATRIX_UNITS = {*_BF16_DOTS, "amx_tile", "amx_bf16", "amx_int8"}
"""What ``lines.h`` asks for."""


def wanted(parameters: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model of that size on that device should run on the kernels."""
    switch = os.environ.get(SWITCH, "")
    if switch == "0" or device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    return switch == "1" or parameters >= WORTHWHILE_PARAMETERS


@functools.cache
def load() -> bool:
    """Compile if need be, and register ``torch.ops.trtkit_cpu``. False where that cannot be: with a debug log, but with
    a warning where nothing is missing but a place for the library."""
    if (why := kept_nowhere()) is not None:
        logger.warning("no CPU kernels, so that decoding is slow: %s; name a folder in %s", why, _PLACE)
        return False
    try:
        torch.ops.load_library(_library())  # type: ignore[no-untyped-call]
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        logger.debug("no CPU kernels: %s", str(error.__cause__ or error).strip()[:2000])
        return False
    return True


def compiler_path() -> str | None:
    """The C++ compiler: what CXX names, else g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def library_path() -> Path:
    """Where the library lies once it is compiled. Raises :class:`RuntimeError` on a CPU without wide vectors, and for a
    user without a home."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise RuntimeError("the CPU has neither AVX2 nor AVX512")
    files = (f"{path.name} {path.read_text(encoding='utf-8')}" for path in (*_sources(), *sorted(_FOLDER.glob("*.h"))))
    identity = (*files, *_FLAGS, str(_OF_ONE_SOURCE), *_LINK, torch.__version__, _cpu())
    name = f"trtkit_cpu_{hashlib.sha256(' '.join(identity).encode()).hexdigest()[:16]}"
    root = Path(os.environ.get(_PLACE) or Path.home() / ".cache" / "torch_extensions")
    return root / name / f"{name}.so"


def kept_nowhere() -> str | None:
    """Why the library can be neither read nor written where it belongs, as in a container with a read-only home; None
    when it can be, or is not wanted on this CPU."""
    if compiler_path() is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    place = Path()
    try:
        path = library_path()
        for place in () if path.is_file() else path.parents:
            if place.exists():
                with tempfile.TemporaryFile(dir=place):
                    break
    except RuntimeError as problem:  # no home
        return str(problem)
    except OSError as problem:
        return f"{place}: {problem.strerror}"
    return None


def kernels_here() -> str | None:
    """In words, what bfloat16 engines run on this CPU, without compiling it; None where that is plain torch."""
    flags, vectors = _cpu_flags(), torch.backends.cpu.get_cpu_capability()
    if compiler_path() is None or vectors not in ("AVX2", "AVX512"):
        return None
    if flags >= _MATRIX_UNITS:
        return "C++ kernels on matrix units (AMX)"
    dots = " with BF16" if flags >= _BF16_DOTS else " with VNNI" if "avx512_vnni" in flags else ""
    return f"C++ kernels ({vectors}{dots})"


def _sources() -> list[Path]:
    return sorted(_FOLDER.glob("*.cpp"))


def _library() -> Path:
    target = library_path()
    if not target.is_file():
        compiler = compiler_path()
        if compiler is None:
            raise RuntimeError("no C++ compiler (g++ or clang++; CXX names another)")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes of one engine or training want it at once; a killed one gives its turn back.
        with in_turn(target.with_suffix(".lock")):
            if not target.is_file():
                _compile(compiler, target)
    return target


def _cpu() -> str:
    """What ``-march=native`` looks at: a home directory may serve several machines."""
    return "\n".join(sorted(_cpu_lines())) or platform.platform()


def _cpu_flags() -> set[str]:
    return {word for line in _cpu_lines() if line.startswith("flags") for word in line.split()}


def _cpu_lines() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line for line in lines if line.startswith(("model name", "flags"))}


def _compile(compiler: str, target: Path) -> None:
    headers, libraries = (Path(torch.__file__).parent / part for part in ("include", "lib"))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = (f"-I{headers}", f"-I{headers / 'torch' / 'csrc' / 'api' / 'include'}")
    logger.info("compiling CPU kernels, once, about %d s", COMPILE_SECONDS)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Compiled and linked apart: -fopenmp at the link would bring a second OpenMP library.
        codes = [str(Path(folder, f"{source.stem}.o")) for source in _sources()]
        commands = [
            [compiler, *_FLAGS, *_OF_ONE_SOURCE.get(source.name, ()), abi, *includes, "-c", str(source), "-o", code]
            for source, code in zip(_sources(), codes, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = Path(folder, target.name)
        _run([compiler, "-shared", *codes, f"-L{libraries}", *_LINK, "-o", str(library)])
        library.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
