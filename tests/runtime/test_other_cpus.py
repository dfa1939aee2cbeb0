"""The kernels of other kinds of CPU than this one: their tests pass on a build for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.native_here import need_kernels
from tests.runtime.other_cpu import KINDS
from trtkit.runtime.native import loader

FILES = (
    "test_native.py",
    "test_native_linear.py",
    "test_native_layers.py",
    "test_native_prefill.py",
    "test_native_steps.py",
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_kernels_of_another_cpu_pass_their_tests(name: str) -> None:
    need_kernels()
    if lacking := KINDS[name][0] - loader._cpu_flags():
        pytest.skip(f"a CPU without {', '.join(sorted(lacking))}")
    here = Path(__file__).parent
    options = ["-p", "tests.runtime.other_cpu", "-p", "no:cacheprovider", "-n", "0", "--timeout", "1200"]
    command = [sys.executable, "-m", "pytest", *options, *(str(here / file) for file in FILES)]
    environment = {**os.environ, "TRTKIT_TEST_CPU": name}
    done = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
