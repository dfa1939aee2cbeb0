"""Where the measured cost of draft trees is kept between runs: one small file per engine and machine.

A wrong or damaged file costs nothing but a few looks at slower trees, so nothing here is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from trtkit.errors import InputError, OutputError
from trtkit.files import cache_home, read_json, write_json
from trtkit.log import logger
from trtkit.runtime.tree_choice import TreeChooser

__all__ = ["memory_file", "recall", "remember"]


def memory_file(engine_digest: str, device: torch.device, details: str) -> Path:
    """The file for this engine on this machine: ``$XDG_CACHE_HOME/trtkit/trees/`` (``~/.cache`` by default).

    ``details`` names whatever else changes the cost of a step, such as how the draft head is run.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = json.dumps([engine_digest, name, torch.get_num_threads(), os.cpu_count(), torch.__version__, details])
    return cache_home() / "trtkit" / "trees" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def recall(path: Path, chooser: TreeChooser) -> None:
    """Hand the chooser what an earlier run learned, if it left anything."""
    try:
        # In a home of somebody else's even the question whether there is a file is refused.
        if path.is_file():
            chooser.recall(read_json(path, InputError))
    except (OSError, InputError, KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as problem:
        logger.debug("%s: not used: %s", path, problem)


def remember(path: Path, chooser: TreeChooser) -> None:
    """Keep what this run learned for the next one."""
    learned = chooser.learned()
    if learned["seconds"]:
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, learned)
