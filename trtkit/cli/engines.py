"""Which engine a verb means when the user names none, and what ``--force`` may replace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from trtkit.bundled import PRACTICE
from trtkit.errors import EngineError, OutputError
from trtkit.recipe import BUNDLE_FILE, ENGINE_FILE
from trtkit.scheme import scheme_named

__all__ = [
    "BUILT",
    "DEFAULT_PRECISION",
    "calibration_words",
    "check_replaced",
    "chosen_engine",
    "default_engine",
    "stem",
]

BUILT = Path("engines") / "built"
"""Where builds go by default, below the current directory."""
DEFAULT_PRECISION = "fp8"
"""Of ``trtkit build``."""
_WORK = ("run.json", "journal.jsonl", ENGINE_FILE, BUNDLE_FILE)
"""What tells a run, an engine or a bundle."""


def chosen_engine(engine: Path | None) -> Path:
    """``engine``, or else the most recently built one. Raises :class:`EngineError` when there is none."""
    if engine is not None:
        return engine
    found = [path for path in BUILT.glob(f"*/{ENGINE_FILE}") if not path.parent.name.startswith(".")]
    if not found:
        raise EngineError(
            "no engine was built here yet",
            where=str(BUILT),
            hint="build one with `trtkit build --precision fp8`, or name one with --engine DIR",
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, str(path))).parent


def check_replaced(out: Path, *, force: bool, marks: Sequence[str] = (ENGINE_FILE, BUNDLE_FILE)) -> None:
    """``--force`` replaces what its verb once wrote, which one of the files ``marks`` tells, never another directory,
    nor one in which runs or engines lie.

    Raises :class:`OutputError`: a checkpoint, a trained head or a home directory would be gone for good.
    """
    if not force or not out.is_dir():
        return
    if any(out.iterdir()) and not any((out / name).is_file() for name in marks):
        raise OutputError(
            f"holds something else (no {' or '.join(marks)}), which --force does not replace",
            where=str(out),
            hint="choose another --out, or remove the directory yourself",
        )
    inside = {str(path.parent) for path in out.rglob("*.json*") if path.name in _WORK and path.parent != out}
    if inside:
        raise OutputError(
            "--force would remove what lies in it",
            where=str(out),
            offenders=sorted(inside),
            hint="move that elsewhere, or choose another --out",
        )


def default_engine(model: str, precision: str) -> Path:
    """Where ``trtkit build`` writes without ``--out``."""
    return BUILT / f"{stem(model)}-{precision}"


def stem(model: str) -> str:
    """``RabotniKuma/Fast-Math-R1-14B`` -> ``fast-math-r1-14b``."""
    name = Path(model).name or Path(model).resolve().name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def calibration_words(model: str, *, precision: str = DEFAULT_PRECISION, kv_dtype: str = "model") -> str:
    """What a ``trtkit build`` line for a real model has to say beside it, with a blank in front: the practice model
    alone comes with text to calibrate by."""
    if model == PRACTICE or not (scheme_named(precision).calibrated or kv_dtype == "int8"):
        return ""
    if Path(model).is_dir():
        from trtkit.build.calibration import CALIBRATION_FILE

        if (Path(model) / CALIBRATION_FILE).is_file():
            return ""
    return " --calibration FILE.jsonl"
