"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trtkit.errors import OutputError
from trtkit.files import writing
from trtkit.interrupts import sigterm_as_interrupt
from trtkit.locks import lock_directory
from trtkit.log import logger

__all__ = ["staged_dir"]

_TRIES = 5


@contextlib.contextmanager
def staged_dir(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh directory beside ``target`` that becomes ``target`` when the block ends well, and vanishes when it fails.

    It vanishes at a SIGTERM or SIGHUP, too, and after a SIGKILL when the same target is written again. A symbolic link
    stays, and what it points to becomes the directory. Raises :class:`OutputError` when ``target`` is no directory or
    one that cannot give way, or has content (before the block or after it) and ``replace`` is false, when the place
    cannot be written, or when the disk fills up inside the block.
    """
    # "." and "a/.." have a parent only when they are resolved.
    target = target.resolve() if target.is_symlink() or target.name in ("", "..") else target
    if target.exists() and not target.is_dir():
        raise OutputError("is a file, not a directory", where=str(target), hint="choose another --out")
    with writing(target):
        _clear_leftovers(target)
    _refuse_content(target, replace, "already exists")
    _refuse_place(target)
    with sigterm_as_interrupt(), _stage_beside(target) as stage:
        try:
            with writing(target):
                yield stage
                stage.chmod(0o755)
                _refuse_content(target, replace, "was written by another process in the meantime")
                _move_in(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _stage_beside(target: Path) -> Iterator[Path]:
    """A new directory, locked for as long as somebody works in it."""
    handle = None
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
            try:
                handle = lock_directory(stage)
            except (BlockingIOError, FileNotFoundError):
                continue  # before it was locked, another process took it for a leftover
            except OSError:
                logger.debug("%s: locks do not work here", stage)
            break
    try:
        yield stage
    finally:
        if handle is not None:
            os.close(handle)


def _clear_leftovers(target: Path) -> None:
    """Remove the stages of processes that were killed: nobody holds them. Where locks do not work they stay."""
    name = re.compile(re.escape(f".{target.name}.") + r"[a-z0-9_]{8}\.tmp(\.old)?")
    found = [path for path in target.parent.glob(".*.tmp*") if name.fullmatch(path.name) and path.is_dir()]
    for stage in sorted({path.with_name(path.name.removesuffix(".old")) for path in found}):
        retired = _retired(stage)
        with contextlib.ExitStack() as held:
            if stage.exists():
                try:
                    held.callback(os.close, lock_directory(stage))
                except OSError:
                    continue
                if retired.is_dir() and not target.exists():
                    retired.rename(target)  # killed when the old one had gone and the new one had not come
            for path in (stage, retired):
                shutil.rmtree(path, ignore_errors=True)
            logger.info("%s: left by a process that was killed, removed", stage)


def _refuse_content(target: Path, replace: bool, complaint: str) -> None:
    if target.is_dir() and not replace and any(target.iterdir()):
        raise OutputError(complaint, where=str(target), hint="choose another --out, or pass --force to replace it")


def _refuse_place(target: Path) -> None:
    """Directories that another one cannot be renamed over: now, not when the work is done."""
    place = target.resolve()
    here = None
    with contextlib.suppress(OSError):  # it is gone already
        here = Path.cwd()
    if here is not None and here.is_relative_to(place):
        why = "is where this command runs, and the shell would be left in a directory that is gone"
    elif os.path.ismount(place):
        why = "is a mount point, which cannot be replaced as a whole"
    else:
        return
    raise OutputError(
        why, where=str(target), hint=f"choose a new directory in it, e.g. --out {shlex.quote(str(target / 'new'))}"
    )


def _move_in(stage: Path, target: Path) -> None:
    """Put ``stage`` in the place of ``target``; what was there goes last, and comes back when that is interrupted."""
    retired = _retired(stage)
    try:
        if target.is_dir():
            target.rename(retired)
        stage.rename(target)
    finally:
        if retired.is_dir() and not target.exists():
            retired.rename(target)
        shutil.rmtree(retired, ignore_errors=True)


def _retired(stage: Path) -> Path:
    """Where that which ``stage`` replaces waits for its end."""
    return stage.with_name(stage.name + ".old")
