"""Put the double where ``import tensorrt_llm`` finds it, as if a wheel of some release were installed on a GPU host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SITE = Path(__file__).parent / "site"


def forget_double() -> None:
    """Drop the double's modules, so that the next import starts afresh."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def install_double(
    patch: pytest.MonkeyPatch, scratch: Path, *, version: str = "1.0.0", capability: tuple[int, int] = (8, 9)
) -> None:
    """Install ``version`` on a machine whose GPU has ``capability``. ``scratch`` holds the distribution's metadata."""
    metadata = scratch / f"tensorrt_llm-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
    patch.syspath_prepend(str(scratch))
    patch.syspath_prepend(str(SITE))
    patch.setenv("TRTLLM_DOUBLE_VERSION", version)
    patch.setenv("TRTLLM_DOUBLE_SM", f"{capability[0]}{capability[1]}")
    install_gpu(patch, capability)
    forget_double()


def install_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Let trtkit see a GPU (torch still sees none, so everything computes on the CPU)."""
    found = None if capability is None else ("a pretended GPU", capability)
    for module in ("trtkit.build.trtllm", "trtkit.runtime.trtllm_facts"):
        patch.setattr(f"{module}.cuda_device", lambda: found)
