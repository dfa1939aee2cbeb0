"""Where the files that come with the project are: in a checkout under ``engines/``, in a wheel inside the package."""

from __future__ import annotations

from pathlib import Path

from trtkit.errors import ConfigError

__all__ = ["PRACTICE", "drafter_named", "practice_dir"]

PRACTICE = "practice"
"""The name that stands for the bundled checkpoint wherever a model is asked for."""


def practice_dir() -> Path:
    """The bundled practice checkpoint. Raises :class:`ConfigError` when this installation lacks it."""
    package = Path(__file__).resolve().parent
    candidates = (package / "_engines" / PRACTICE, package.parent / "engines" / PRACTICE)
    for directory in candidates:
        if (directory / "config.json").is_file():
            return directory
    raise ConfigError(
        "the practice checkpoint is not part of this installation",
        where=str(candidates[-1]),
        hint="install trtkit from a complete checkout or wheel, or make it with scripts/train_practice.py",
    )


def drafter_named(name: Path | None) -> Path | None:
    """The directory of a draft head; ``practice`` stands for the bundled one unless there is such a directory here."""
    if name is not None and str(name) == PRACTICE and not name.is_dir():
        return practice_dir() / "drafter"
    return name
