"""Run directories written by hand, so that a test knows what must come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["attempt", "solution", "write_run"]


def attempt(problem: str, index: int, box: str | None, tokens: int = 10, **more: Any) -> dict[str, Any]:
    row = {"kind": "attempt", "problem": problem, "index": index, "variant": "solve", "tokens": tokens}
    return {**row, "finish": "stop", "box": box, "seconds": 1.0, "clock": 1.0, **more}


def solution(problem: str, answer: str | None, tokens: int = 10, **more: Any) -> dict[str, Any]:
    row = {"kind": "solution", "problem": problem, "answer": answer, "votes": [], "tokens": tokens, "seconds": 1.0}
    return {**row, "stopped_early": None, "error": None, "clock": 1.0, **more}


def write_run(
    directory: Path,
    problems: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    **arguments: Any,
) -> Path:
    """A run directory. The problems file lies beside it, so that runs of one test share it."""
    directory.mkdir(parents=True)
    path = directory.parent / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in problems), "utf-8")
    journal = [{"kind": "session", "started": "2026-01-01T00:00:00+00:00"}, *rows]
    (directory / "journal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in journal), "utf-8")
    run = {
        "version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"trtkit": "0.1.0"},
        "problems": {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "engine": {"path": "engine", "sha256": "0"},
        "arguments": {"samples": 4, "max_tokens": 100, "mode": {"kind": "auto", "modulus": None}, **arguments},
    }
    (directory / "run.json").write_text(json.dumps(run), "utf-8")
    return directory
