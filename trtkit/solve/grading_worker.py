"""The process that runs math-verify: ``python -m trtkit.solve.grading_worker SECONDS``.

One JSON object ``{"gold", "answer"}`` per line in, ``{"equal"}`` out, after one line ``{"ready": true}``.
It is a process of its own so that it can be killed: some answers (``10^{10^{10}}``) keep sympy busy for
ever, in C code that no Python exception reaches.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from typing import Any

__all__ = ["main"]

_MEMORY_BYTES = 4 << 30


def main() -> None:
    """Answer questions on stdin until it closes."""
    limit_seconds = float(sys.argv[1])
    # Whatever a library writes to stdout must not end up between our answers.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)

    def reply(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    try:
        from math_verify import parse, verify
    except Exception as problem:  # a broken install can fail in any way; the parent makes it a message
        reply({"error": f"{type(problem).__name__}: {problem}"})
        return
    _limit_memory()
    verify(parse("$\\sqrt{12}$", parsing_timeout=None), parse("$2x$", parsing_timeout=None), timeout_seconds=None)
    # Only now: the first question of a process builds tables, which is not the answer's fault.
    reply({"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        equal = False
        _alarm(limit_seconds)
        with contextlib.suppress(Exception, RecursionError, MemoryError):
            gold, answer = (
                parse(f"${question[name]}$", parsing_timeout=None, fallback_mode="no_fallback")
                for name in ("gold", "answer")
            )
            equal = bool(gold and answer and verify(gold, answer, timeout_seconds=None))
        _alarm(0)
        reply({"equal": equal})


def _alarm(seconds: float) -> None:
    # The default action of the signal ends the process inside the kernel, whatever it is computing, even when the
    # parent is gone and nobody is left to kill it. Processor time, not wall time: whether two answers are equal
    # must not depend on how busy the machine is.
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))


if __name__ == "__main__":
    main()
