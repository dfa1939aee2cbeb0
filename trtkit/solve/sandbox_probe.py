"""Whether the walls hold: each layer is tried, then code that wants out is run inside all of them together.

What counts is what that code achieves, not what the kernel claims to support.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Findings", "probe"]

Attempt = Callable[[tuple[str, ...], str], tuple[str, str]]
"""Run a block inside the given layers: its status, and what it printed or why it could not run."""

_ESCAPE = """
import os, signal, socket
def attempt(name, action):
    try:
        action()
    except BaseException:
        return
    print(name)
def udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {udp}))
attempt("network", lambda: socket.create_connection(("127.0.0.1", {tcp}), 5))
attempt("network", udp)
attempt("files", lambda: open({secret!r}).read())
attempt("files", lambda: open("/etc/passwd").read())
attempt("files", lambda: open("/proc/{server}/environ").read())
attempt("files", lambda: open({secret!r} + ".written", "w"))
attempt("files", lambda: os.chmod({secret!r}, 0))
attempt("processes", lambda: os.kill({server}, 0))
{fork}
"""
_FORK = """
def fork():
    if os.fork() == 0:
        os._exit(0)
attempt("processes", fork)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found. ``held`` names the walls that stood: network, files, processes."""

    layers: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    """Layer to the reason that it cannot be had."""
    held: tuple[str, ...] = ()
    reason: str = ""
    """Why the code that wants out could not run at all."""


def probe(wanted: Sequence[str], home: str, attempt: Attempt) -> Findings:
    """Find the ``wanted`` layers that work on this machine and what they hold together.

    ``home`` is a directory outside the sandbox.
    """
    layers: list[str] = []
    missing: dict[str, str] = {}
    for layer in wanted:
        if layer == "root" and "namespaces" not in layers:
            missing[layer] = "needs namespaces"
            continue
        status, words = attempt((*layers, layer), "pass")
        if status == "ok":
            layers.append(layer)
        else:
            missing[layer] = words or status
    with _targets(home) as (tcp, udp, secret):
        # In a process space of its own a child of the code is harmless: it dies with the code.
        fork = "" if "namespaces" in layers else _FORK
        block = _ESCAPE.format(tcp=tcp, udp=udp, secret=secret, server=os.getpid(), fork=fork)
        status, words = attempt(tuple(layers), block)
    fallen = set(words.split()) if status == "ok" else {"network", "files", "processes"}
    held = tuple(wall for wall in ("network", "files", "processes") if wall not in fallen)
    return Findings(layers=tuple(layers), missing=missing, held=held, reason="" if status == "ok" else words or status)


@contextlib.contextmanager
def _targets(home: str) -> Iterator[tuple[int, int, str]]:
    """Something to reach: a port that listens, one that receives, a file."""
    secret = Path(home) / "secret"
    secret.write_text("secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        yield tcp.getsockname()[1], udp.getsockname()[1], str(secret)
    for path in (secret, Path(f"{secret}.written")):
        path.unlink(missing_ok=True)
