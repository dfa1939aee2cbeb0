"""One process at a time in a directory that several could write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trtkit.errors import OutputError
from trtkit.log import logger

__all__ = ["exclusive", "in_turn", "lock_directory"]


def exclusive(path: Path, doing: str) -> IO[str]:
    """Hold the lock file ``path`` until what is returned is closed; the system gives it back however the process ends.

    Raises :class:`OutputError` when another process has it (``doing`` says at what: "this run") or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w", encoding="utf-8")
    except OSError as problem:
        raise OutputError(
            f"cannot be written: {problem.strerror or problem}",
            where=str(path.parent),
            hint="check free space and permissions, or choose another place with --out",
        ) from None
    try:
        import fcntl
    except ImportError:  # Windows: no lock there
        return stream
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise OutputError(
            f"{doing} is being worked on already",
            where=str(path.parent),
            hint="wait for the other process, close the other session, or choose another place with --out",
        ) from None
    except OSError as problem:
        logger.warning(
            "%s: locks do not work here (%s); start nothing twice in this place", path, problem.strerror or problem
        )
    return stream


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait while another process is inside with the same lock file, however long. Where locks do not work nobody waits.

    Raises :class:`OSError` when the file cannot be made.
    """
    with path.open("w", encoding="utf-8") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, some network file systems
            logger.debug("%s: locks do not work here", path)
        yield


def lock_directory(path: Path) -> int:
    """Hold the directory ``path`` until the descriptor that is returned is closed, under whatever name it has by then.

    Raises :class:`BlockingIOError` when somebody has it, :class:`FileNotFoundError` when it is gone, and another
    :class:`OSError` where locks do not work.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError("no locks on this system") from None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.stat()  # gone: removed by the one who had it before
    except BaseException:
        os.close(handle)
        raise
    return handle
