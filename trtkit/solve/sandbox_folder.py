"""``clear_folder``: what code has left behind, removed."""

from __future__ import annotations

import contextlib
import os
import secrets

__all__ = ["clear_folder"]


def clear_folder(folder: str) -> None:
    """Remove ``folder`` with all that is in it, as far as that can be done.

    However deep it is: code may nest folders beyond any path, on which ``shutil.rmtree`` fails. So each is moved up to
    the top first.
    """
    left = [folder]
    while left:
        path = left.pop()
        entries: list[os.DirEntry[str]] = []
        with contextlib.suppress(OSError), os.scandir(path) as found:
            entries += found
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    higher = os.path.join(folder, secrets.token_hex(16))
                    os.rename(entry.path, higher)
                    left.append(higher)
                else:
                    os.unlink(entry.path)
        if path != folder:
            _remove(path)
    _remove(folder)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)
