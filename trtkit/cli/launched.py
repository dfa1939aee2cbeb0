"""One voice for the processes that ``torchrun`` starts: each of them runs the same command line on the same files.

Nearly everything that one of them refuses, the others refuse too, or they fail because it ended. So the first one on a
machine speaks at once, and another only where that one stays silent: when one has ended, the launcher ends the others.
"""

from __future__ import annotations

import os
import time

__all__ = ["is_first", "let_the_first_speak"]

_PATIENCE_SECONDS = 20.0


def is_first() -> bool:
    """Whether this process speaks for its machine: the first that torchrun started there, or one that runs alone."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return not launched or os.environ.get("LOCAL_RANK", "0") == "0"


def let_the_first_speak() -> str:
    """Wait until the first process would have spoken, and with it this one have been ended; then this one's name."""
    if is_first():
        return ""
    time.sleep(_PATIENCE_SECONDS)
    return f"process {os.environ.get('RANK', '?')}: "
