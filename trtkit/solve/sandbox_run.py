"""One call of code, from the fork to its end: the keeper, the jailed process, and the code itself.

    keeper    enters the namespaces, waits for the jailed process, sees to it that nothing of it is left, reports
    jailed    first process of its process space: builds the file system, locks itself up, runs the code, exits

The report is a pipe that the code never holds: ``{"locked": true}`` before the first block, the exit code at the end.
Into a second pipe goes a byte when the block in question starts, then it is closed; blocks that are run again before it
could do that too, which only starts their own clock. What the code prints goes into two more pipes.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import os
import random
import signal
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from trtkit.solve import sandbox_jail
from trtkit.solve.sandbox_jail import Jail

__all__ = ["ENDED", "FAILED", "Pipes", "keep"]

_FILE, _EARLIER = "<code>", "<earlier>"
_GO = 3
"""Number of the ``go`` pipe in the jailed process."""
ENDED, FAILED = 86, 87
"""Exit codes of a block that came to its end, or to an exception. Any other means that the code ended the interpreter
itself (``os._exit``), and would do so again before every later block of its sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipes:
    """Writing ends: what the code prints, what it prints as errors, the sign that it starts, and the report."""

    output: int
    errors: int
    go: int
    report: int


def keep(jail: Jail, folder: str, blocks: list[str], pipes: Pipes, server: int) -> NoReturn:
    """The keeper's life. ``blocks`` are the earlier blocks of the sample, run again in silence, and the one to run.

    ``server`` is the process that forked it. ``folder`` is an empty directory: the place of the new root, or the code's
    own folder without that layer.
    """
    # A selector or a pipe of the server that is garbage must not be collected here: it would close a file number that
    # now is another file.
    gc.freeze()
    child = 0

    def stop(number: int, frame: FrameType | None) -> None:
        _kill_all(child)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    report: dict[str, Any] = {}
    try:
        os.setsid()
        sandbox_jail.die_with_parent(server)
        sandbox_jail.adopt_orphans()
        if "namespaces" in jail.layers:
            sandbox_jail.enter_namespaces()
        keeper = os.getpid()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _jailed(jail, folder, blocks, pipes, keeper)
        for pipe in (pipes.output, pipes.errors, pipes.go):
            os.close(pipe)
        _, status, usage = os.wait4(child, 0)
        child = 0  # its number may be somebody else's from here on
        report = {"exit": os.waitstatus_to_exitcode(status), "cpu_seconds": usage.ru_utime + usage.ru_stime}
    except BaseException as problem:
        report = {"broken": f"{type(problem).__name__}: {problem}"}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _kill_all(child)
    _tell(pipes.report, json.dumps(report))
    os._exit(0)


def _kill_all(child: int) -> None:
    """Kill the jailed process and whatever it left behind.

    In a process space of its own everything dies with the first process. Otherwise what it left was handed to this
    process, its subreaper, in which case there may be some more rounds.
    """
    for _ in range(1000):
        for process in {child, *_children()} - {0}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Processes whose parent is this one, by /proc."""
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{int(entry)}/stat").read_text(errors="replace")
            if int(status.rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry))
    return found


def _jailed(jail: Jail, folder: str, blocks: list[str], pipes: Pipes, keeper: int) -> NoReturn:
    try:
        sandbox_jail.die_with_parent(keeper)
        os.setpgid(0, 0)
        os.nice(19)
        with contextlib.suppress(OSError):  # where memory is short anyway, this goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
        report = _only_these_files(pipes)
        if "root" in jail.layers:
            sandbox_jail.only_folder(jail, folder)
        else:
            os.chdir(folder)
        sandbox_jail.die_with_parent(keeper)  # again: a change of privileges may have undone it
        sandbox_jail.lock(jail, os.getcwd())
        _tell(report, json.dumps({"locked": True}))
        os.close(report)
    except BaseException as problem:
        with contextlib.suppress(OSError, NameError):
            _tell(report, json.dumps({"broken": f"{type(problem).__name__}: {problem}"}))
        os._exit(1)
    _run(blocks)


def _only_these_files(pipes: Pipes) -> int:
    """Nothing to read, two pipes to print into, the ``go`` pipe, the report (returned), and no other file open."""
    given = [os.open(os.devnull, os.O_RDONLY), pipes.output, pipes.errors, pipes.go, pipes.report]
    copies = [os.dup(each) for each in given]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    last = len(given) - 1
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else range(4096):
        if int(entry) > last:
            with contextlib.suppress(OSError):
                os.close(int(entry))
    return last


def _run(blocks: list[str]) -> NoReturn:
    """Run the blocks in one namespace, as a notebook would, and exit: ``ENDED``, or ``FAILED`` after an exception."""
    module = types.ModuleType("__main__")
    server, sys.modules["__main__"] = sys.modules["__main__"], module  # the old one must live on: it is running
    _settle()
    code = ENDED
    try:
        with _Silence():
            for block in blocks[:-1]:
                with contextlib.suppress(SystemExit):  # a block that said exit() ended itself, not those after it
                    _execute(block, module.__dict__, _EARLIER)
        with contextlib.suppress(OSError):
            os.write(_GO, b"1")
            os.close(_GO)
        _execute(blocks[-1], module.__dict__, _FILE)
    except SystemExit as ending:
        code = FAILED if ending.code else ENDED
        if isinstance(ending.code, str):
            _complain(ending.code)
    except BaseException as problem:
        code = FAILED
        _explain(problem, blocks[-1])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    assert server is not module
    os._exit(code)


def _settle() -> None:
    """The same world for every call: standard streams, folder, random seeds."""
    os.environ.clear()
    os.environ.update({"HOME": os.getcwd(), "TMPDIR": os.getcwd(), "PYTHONHASHSEED": "0"})
    sys.argv[:] = [""]
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115  (lives as long as the process)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
    warnings.simplefilter("ignore")
    random.seed(0)
    for name in ("numpy.random", "sympy.core.random"):
        if name in sys.modules:
            sys.modules[name].seed(0)


class _Silence:
    """Nothing that is printed inside is seen."""

    def __enter__(self) -> None:
        self._kept = [os.dup(1), os.dup(2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *ignored: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed or replaced by the code
                stream.flush()
        for number, kept in enumerate(self._kept, start=1):
            os.dup2(kept, number)
            os.close(kept)


def _execute(block: str, names: dict[str, Any], file: str) -> None:
    """Run a block; the value of a last line that is an expression is printed, as in a notebook."""
    tree = ast.parse(block, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    # Without this file's own __future__ imports, which compile would hand down.
    exec(compile(tree, file, "exec", dont_inherit=True), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), file, "eval", dont_inherit=True), names)
        if value is not None:
            print(repr(value))  # noqa: T201  (the product of this process)


def _explain(problem: BaseException, block: str) -> None:
    """``ZeroDivisionError: division by zero`` and the line: what counts comes before the cut."""
    try:
        lines = [frame.lineno for frame in _frames(problem)]
        line = problem.lineno if isinstance(problem, SyntaxError) else lines[-1] if lines else None
        words = problem.msg if isinstance(problem, SyntaxError) else str(problem)
        text = f"{type(problem).__name__}: {words}" if words else type(problem).__name__
        source = block.splitlines()
        if line is not None and 0 < line <= len(source):
            text += f"\n  line {line}: {source[line - 1].strip()}"
    except BaseException:  # no memory left, or an exception whose text raises one
        text = type(problem).__name__
    _complain(text)


def _frames(problem: BaseException) -> list[Any]:
    import traceback

    return [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == _FILE]


def _complain(text: str) -> None:
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(BaseException):
        os.write(2, (text + "\n").encode("utf-8", "replace"))


def _tell(report: int, line: str) -> None:
    os.write(report, (line + "\n").encode())
