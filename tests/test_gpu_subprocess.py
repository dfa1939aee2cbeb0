"""What the GPU benchmark runs in processes of their own: the GPU tests, and the peer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from trtkit.bench import gpu_stages, gpu_subprocess
from trtkit.bench.gpu import GpuBench, GpuBenchOptions
from trtkit.bench.gpu_machine import time_limit
from trtkit.bench.gpu_stages import STAGES
from trtkit.bench.gpu_subprocess import gpu_tests, peer_figures

ROOT = Path(__file__).resolve().parents[1]


def test_what_a_process_that_fails_has_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho noise\necho \'{"compiled": false, "tokens_per_second": 5.5}\'\necho "$@"\nexit 3\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr("trtkit.bench.gpu_subprocess.sys.executable", str(python))
    monkeypatch.setattr(gpu_subprocess, "_LAST_WORDS_SECONDS", 0.5)
    found = peer_figures("tiny", torch.device("cpu"), 64, 8, 60.0)
    assert found["figures"] == [{"compiled": False, "tokens_per_second": 5.5}]
    assert found["ended"].endswith("-m trtkit.bench.gpu_peer tiny cpu 64 8\n")


def test_a_process_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr("trtkit.bench.gpu_subprocess.sys.executable", str(python))
    monkeypatch.setattr(gpu_subprocess, "_LAST_WORDS_SECONDS", 0.5)
    found = peer_figures("tiny", torch.device("cpu"), 64, 8, 0.1)
    assert found == {"figures": [], "limit_seconds": 0.1, "ended": "time was up"}


@pytest.mark.parametrize(
    ("ended", "summary"),
    [
        ((0, "..\n==== 2 passed in 3.00s ====\n"), "2 passed in 3.00s"),
        ((None, "..\n! 2 passed !\n"), "! 2 passed !; time was up"),
        ((4, ""), "no output"),
    ],
)
def test_the_gpu_tests_are_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, ended: tuple[int | None, str], summary: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    commands: list[list[str]] = []
    monkeypatch.setattr(
        "trtkit.bench.gpu_subprocess._run", lambda command, seconds: (commands.append(command), ended)[1]
    )
    assert gpu_tests(60.0) == {"summary": f"GPU tests: {summary}", "code": ended[0], "output": ended[1]}
    assert "--continue-on-collection-errors" in commands[0]
    files = [Path(part) for part in commands[0] if part.endswith(".py")]
    assert ROOT / "tests/runtime/cuda/test_linear_gpu.py" in files
    marks = ("mark." + "gpu", "device: " + "torch.device)")  # in one piece this file would be among them
    assert all(any(mark in path.read_text("utf-8") for mark in marks) for path in files)
    assert Path(__file__) not in files


@pytest.mark.slow
def test_the_gpu_tests_do_without_hypothesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare GPU machine may have pytest and nothing else of what the other tests take."""
    (tmp_path / "hypothesis.py").write_text("raise ModuleNotFoundError('hypothesis')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    run, found_only = gpu_subprocess._run, ["--collect-only", "-p", "no:hypothesispytest", "-p", "no:timeout"]
    monkeypatch.setattr(gpu_subprocess, "_run", lambda command, seconds: run([*command, *found_only], seconds))
    found = gpu_tests(60.0)
    assert found["code"] == 0, found["output"]
    assert "test_a_replay_is_the_plain_step" in found["output"]


def test_what_runs_beside_may_have_last_words() -> None:
    """When its time is up: an interrupted pytest still says what failed."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('1 failed')"
    ended, output = gpu_subprocess._run([sys.executable, "-I", "-S", "-c", code], 2.0)
    assert (ended, output) == (None, "1 failed\n")


def test_what_runs_beside_ends_with_its_stage(tmp_path: Path) -> None:
    """Else it would go on on the same GPU, beside what is measured next."""
    place = tmp_path / "pid"
    code = f"import os, time\nopen({str(place)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    with pytest.raises(TimeoutError), time_limit(1.5):
        gpu_subprocess._run([sys.executable, "-I", "-S", "-c", code], 30.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)


@pytest.mark.parametrize("left", [30.0, 100.0, 155.0, 400.0])
@pytest.mark.parametrize(("stage", "runs"), [("tests", "gpu_tests"), ("peer", "peer_figures")])
def test_what_runs_beside_is_heard_before_the_time_of_its_stage_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: float, stage: str, runs: str
) -> None:
    given: list[float] = []
    found = {"summary": "", "figures": []}
    monkeypatch.setattr(gpu_stages, runs, lambda *arguments: (given.append(arguments[-1]), found)[1])
    bench = GpuBench(
        options=GpuBenchOptions(device=torch.device("cpu"), out=tmp_path / "bench.json", budget_seconds=left),
        say=lambda _line: None,
    )
    STAGES[stage].work(bench)
    assert 15 < given[0] <= min(left, STAGES[stage].most_seconds) - gpu_subprocess._LAST_WORDS_SECONDS - 1
