"""``Sandbox``: runs code that a model wrote, so that it can do nothing but compute, and never makes the caller wait.

The solver's side. What runs on the other side of the pipes: sandbox_child.py (the fork server), sandbox_run.py (one
call), sandbox_jail.py and sandbox_seccomp.py (the walls), sandbox_probe.py (whether they hold).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from trtkit.closing import Closing
from trtkit.errors import UnsupportedError, UsageError
from trtkit.log import logger
from trtkit.solve.sandbox_jail import LAYERS
from trtkit.solve.sandbox_link import Link, open_link

__all__ = ["Call", "CallResult", "Sandbox", "SandboxOptions", "Status", "Strength", "open_sandbox", "sandbox_strength"]

Status: TypeAlias = Literal["ok", "error", "timeout", "cut", "killed", "broken", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOptions:
    """What code may use. The defaults for calls, seconds and characters are those of the winning AIMO-2 system
    (arXiv 2504.16891, section 6)."""

    calls: int = 6
    """Calls per sample."""
    seconds: float = 2.0
    """Wall time and processor time of one call; starting it does not count."""
    memory_bytes: int = 512 << 20
    """Address space on top of what Python with numpy and sympy takes."""
    output_characters: int = 200
    """Kept of what is printed, and of an error message; the rest is cut."""
    unsafe: bool = False
    """Run code even where it cannot be kept away from the network and from files."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)}: must be at least {least}"
            for name, least in (("calls", 1), ("seconds", 0.1), ("memory_bytes", 16 << 20), ("output_characters", 1))
            if getattr(self, name) < least
        ]
        if wrong:
            raise UsageError("limits for code that make no sense", offenders=wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A code block to run."""

    id: str
    code: str
    earlier: tuple[str, ...] = ()
    """Blocks of the same sample that ended well. They are run again first, unseen, so that their names are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """How a call ended.

    ``ok``; ``error`` (an exception, described in ``errors``); ``timeout``; ``cut`` (it printed more than is kept, and
    was stopped); ``killed`` (a crash, or it ended the interpreter); ``broken`` (the sandbox could not run it);
    ``dropped``.
    """

    id: str
    status: Status
    output: str = ""
    errors: str = ""
    reason: str = ""
    seconds: float = 0.0
    """Of the block itself."""
    started: bool = True
    """False when it ended in an earlier block, before this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """What the sandbox can hold on this machine, found by trying to break out of it."""

    layers: tuple[str, ...]
    missing: dict[str, str]
    """Layer to the reason why it is not there."""
    held: tuple[str, ...]
    """Of ``network``, ``files`` and ``processes``, those that code inside cannot reach."""
    reason: str = ""

    @property
    def sufficient(self) -> bool:
        """No network, and no files outside its own folder."""
        return {"network", "files"} <= set(self.held)

    @property
    def text(self) -> str:
        """One line for people."""
        line = f"holds {', '.join(self.held) or 'nothing'}; layers: {', '.join(self.layers) or 'none'}"
        lacking = [f"{layer} ({reason})" for layer, reason in self.missing.items()]
        return line + (f"; without {', '.join(lacking)}" if lacking else "")


class Sandbox(Closing):
    """Runs calls in processes of their own. ``submit`` and ``ready`` return at once.

    >>> with Sandbox() as sandbox:
    ...     sandbox.submit(Call(id="p1/0", code="print(1 + 1)"))
    ...     while sandbox.pending:
    ...         for result in sandbox.ready():   # between two steps of the engine
    ...             print(result.output)

    Up to ``workers`` calls run at a time, the others wait. Raises :class:`UnsupportedError` when this machine cannot
    keep code away from the network and from files, unless the options say ``unsafe``. ``layers`` leaves out walls, for
    tests.
    """

    def __init__(
        self,
        options: SandboxOptions | None = None,
        *,
        workers: int | None = None,
        layers: Sequence[str] = LAYERS,
    ) -> None:
        self.options = options or SandboxOptions()
        self._workers = workers or max(1, min(8, (os.cpu_count() or 1) - 1))
        self._layers = tuple(layers)
        self._pending: set[str] = set()
        self._lost: list[CallResult] = []
        self._link: Link | None = self._start()
        found = self._link.greeting
        self.strength = Strength(
            layers=tuple(found["layers"]), missing=found["missing"], held=tuple(found["held"]), reason=found["reason"]
        )
        if not (self.strength.sufficient or self.options.unsafe):
            self.close()
            raise UnsupportedError(
                "code cannot be kept away from the network and from files on this machine",
                offenders=[f"{layer}: {why}" for layer, why in self.strength.missing.items()]
                + ([self.strength.reason] if self.strength.reason else []),
                hint="it takes Linux with seccomp and Landlock (6.2 or newer), or with user namespaces. "
                "--tools-unsafe runs the code anyway",
            )

    @property
    def pending(self) -> int:
        """Calls whose result :meth:`ready` has not returned yet."""
        return len(self._lost) + len(self._pending)

    def submit(self, call: Call) -> None:
        """Have ``call`` run. Its id must not be under way."""
        assert call.id not in self._pending, f"{call.id} is running"
        if self._link is not None and not self._link.alive:
            self._lose()
        if self._link is None:
            self._link = self._start()
        self._pending.add(call.id)
        self._link.send({"call": call.id, "blocks": [*call.earlier, call.code]})

    def drop(self, call_id: str) -> None:
        """Stop a call whose result nobody wants any more: :meth:`ready` will not return it."""
        self._lost = [result for result in self._lost if result.id != call_id]
        if self._link is not None and call_id in self._pending:
            self._pending.remove(call_id)
            self._link.send({"drop": call_id})

    def ready(self, seconds: float = 0.0) -> list[CallResult]:
        """The calls that ended since the last time, in that order. Waits up to ``seconds`` for the first."""
        deadline = time.monotonic() + seconds
        while True:
            results, self._lost = self._lost, []
            if self._link is None or not self._pending:
                return results
            left = deadline - time.monotonic()
            rows, more = self._link.receive(0.0 if results else left)
            for row in rows:
                if row["call"] in self._pending:
                    self._pending.remove(row["call"])
                    results.append(_result(row))
            if not more:
                self._lose()
            if results or left <= 0:
                return results

    def close(self) -> None:
        """End all calls and the processes behind them. Closing twice is fine."""
        link, self._link = self._link, None
        self._pending.clear()
        if link is not None:
            link.end()

    def _start(self) -> Link:
        if not sys.platform.startswith("linux"):
            raise UnsupportedError("code can be run on Linux only", hint="solve without --tools")
        return open_link(
            {
                "seconds": self.options.seconds,
                "output_bytes": 4 * self.options.output_characters + 64,
                "memory_bytes": self.options.memory_bytes,
                "workers": self._workers,
                "layers": self._layers,
                "temporary": tempfile.gettempdir(),
            }
        )

    def _lose(self) -> None:
        """The process is gone, by the kernel's hand if memory ran out. The next call starts another one."""
        why = "the process that runs code ended unexpectedly"
        logger.warning("%s; %d call(s) lost", why, len(self._pending))
        lost = [CallResult(id=name, status="broken", reason=why) for name in sorted(self._pending)]
        self.close()
        self._lost += lost


def open_sandbox(options: SandboxOptions | None) -> AbstractContextManager[Sandbox | None]:
    """A sandbox for ``options``, its strength told in the log; nothing for None."""
    if options is None:
        return nullcontext()
    sandbox = Sandbox(options)
    if sandbox.strength.sufficient:
        logger.info("code runs in a sandbox: %s", sandbox.strength.text)
    else:
        logger.warning("code runs WITHOUT a sufficient sandbox: %s", sandbox.strength.text)
    return sandbox


def sandbox_strength() -> Strength:
    """Which walls this machine has, found by trying. Takes a second or two."""
    with Sandbox(SandboxOptions(unsafe=True)) as sandbox:
        return sandbox.strength


def _result(row: Mapping[str, Any]) -> CallResult:
    return CallResult(
        id=row["call"],
        status=row["status"],
        output=row["output"],
        errors=row["errors"],
        reason=row["reason"],
        seconds=row["seconds"],
        started=row["started"],
    )
