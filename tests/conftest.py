"""Test-wide settings: one thread (timings and results do not depend on the machine's load), offline."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile

# What runs leave in the user's cache must not decide what a test sees.
_CACHE = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="trtkit-test-cache-")
os.environ.setdefault("TRTKIT_NATIVE", "0")  # tests of the kernels ask for them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # For tests/runtime/cuda: read when triton is loaded, which other tests' imports may do.
    os.environ["TRITON_INTERPRET"] = "1"
with contextlib.suppress(ImportError):  # the tests of a GPU do without, and run where little is installed
    from hypothesis import settings

    settings.register_profile("trtkit", deadline=None, max_examples=50, derandomize=True)
    settings.load_profile("trtkit")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(_CACHE, ignore_errors=True)
