"""What ``scripts/gpu_bench`` runs as processes of their own, under a time limit: the peer, the GPU tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["ENDING_SECONDS", "gpu_tests", "peer_figures"]

_ROOT = Path(__file__).resolve().parents[2]
_LAST_WORDS_SECONDS = 10.0
ENDING_SECONDS = _LAST_WORDS_SECONDS + 3.0
"""What a process may take beyond its limit."""


def _run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit code, output); the code is None when the time was up. It is interrupted first: pytest then says what failed
    so far."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_LAST_WORDS_SECONDS)
        finally:
            if process.poll() is None:  # also when the stage's own time is up: it must not run beside the next one
                process.kill()
                process.wait()
        out.seek(0)
        return code, out.read()


def peer_figures(
    shape: str, device: torch.device, context: int, new_tokens: int, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Speeds of ``trtkit.bench.gpu_peer``, as many as came within the limit."""
    arguments = [shape, str(device), str(context), str(new_tokens)]
    code, output = _run([sys.executable, "-m", "trtkit.bench.gpu_peer", *arguments], seconds)
    figures = [json.loads(line) for line in output.splitlines() if line.startswith('{"compiled"')]
    result: dict[str, Any] = {"figures": figures, "limit_seconds": seconds}
    if code != 0:
        result["ended"] = "time was up" if code is None else output[-2000:]
    return result


def gpu_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked ``gpu``, several at a time where pytest can: compiling is most of it, and the figures of
    speed are the benchmark's. Without the project's own pytest settings: its plugins may not be there."""
    if importlib.util.find_spec("pytest") is None or not torch.cuda.is_available():
        return {"summary": "GPU tests: not run, they need pytest and a CUDA device", "code": None}
    files = sorted(
        (str(path) for path in (_ROOT / "tests").rglob("test_*.py") if _for_a_gpu(path.read_text(encoding="utf-8"))),
        key=lambda path: ("linear" in path, path),  # the longest last
    )
    with tempfile.TemporaryDirectory() as directory:
        settings = Path(directory) / "pytest.ini"
        settings.write_text(
            f"[pytest]\nmarkers =\n    gpu\n    slow\n    trtllm\n    network\ncache_dir = {directory}\n"
        )
        command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(_ROOT), "-q", "-m", "gpu"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "4", "-k", "not come_near_the_memory"]
        # A file that cannot be loaded there does not take the others along.
        code, output = _run([*command, "--tb=short", "--continue-on-collection-errors", *files], seconds)
    last = output.strip().splitlines()[-1:] or ["no output"]
    summary = f"GPU tests: {last[0].strip('= ')}{'; time was up' if code is None else ''}"
    return {"summary": summary, "code": code, "output": output[-12000:]}


def _for_a_gpu(text: str) -> bool:
    """Whether a file has such tests: marked so, or marked by their ``device`` where there is a GPU."""
    return "mark.gpu" in text or "device: torch.device)" in text
