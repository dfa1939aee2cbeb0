"""Sandboxes for tests: the sets of walls, and how code is run in them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from trtkit.solve.sandbox import Call, CallResult, Sandbox, SandboxOptions
from trtkit.solve.sandbox_jail import LAYERS

WALLS = {
    "all": LAYERS,
    # What is left in a container that does not allow user namespaces.
    "no namespaces": ("landlock", "seccomp"),
    # A processor whose system calls are not known here, and an old kernel.
    "namespaces only": ("namespaces", "root"),
}
LONG, SHORT = SandboxOptions(seconds=30, unsafe=True), SandboxOptions(seconds=0.5, unsafe=True)
HELP = """
import ctypes, mmap, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def attempt(action):
    try:
        action()
    except BaseException:
        return
    print("ESCAPED", end=" ")
"""


def run(sandbox: Sandbox, code: str, earlier: Sequence[str] = ()) -> CallResult:
    sandbox.submit(Call(id="x", code=code, earlier=tuple(earlier)))
    return wait(sandbox)[0]


def wait(sandbox: Sandbox) -> list[CallResult]:
    found: list[CallResult] = []
    while sandbox.pending:
        found += sandbox.ready(30)
    return found


def lives(sandbox: Sandbox) -> bool:
    """It still runs code; half a second may be too short for that where the machine is busy."""
    return any(run(sandbox, "print(6 * 7)").output == "42\n" for _ in range(20))


def open_sandbox(layers: Sequence[str], options: SandboxOptions = LONG) -> Sandbox:
    sandbox = Sandbox(options, workers=2, layers=layers)
    if sandbox.strength.layers != tuple(layers):
        sandbox.close()
        pytest.skip(f"not on this machine: {sandbox.strength.missing}")
    return sandbox
