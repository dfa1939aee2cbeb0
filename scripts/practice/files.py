"""The problem files: held-out, demo, calibration, and any number of training problems."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from random import Random

from practice.problems import PracticeProblem, balanced, stream

HELDOUT_COUNT, DEMO_COUNT, CALIBRATION_COUNT = 200, 24, 128
FILES_SEED = 7


def problem_rows(problems: Iterable[PracticeProblem], prefix: str) -> list[dict[str, str]]:
    """Rows with an id, as `trtkit solve` reads them."""
    return [
        {
            "id": f"{prefix}-{number:03d}",
            "problem": item.text,
            "answer": str(item.answer),
            "family": item.family,
        }
        for number, item in enumerate(problems, start=1)
    ]


def solution_rows(problems: Iterable[PracticeProblem]) -> list[dict[str, str]]:
    """Rows with a worked solution, in OpenMathReasoning's schema."""
    return [
        {
            "problem": item.text,
            "generated_solution": item.generated_solution,
            "expected_answer": str(item.answer),
            "problem_type": "has_answer_extracted",
            "family": item.family,
        }
        for item in problems
    ]


def write_rows(rows: Iterable[Mapping[str, str]], path: Path) -> None:
    """JSONL, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    if not path.exists():
        raise SystemExit(f"no {path}\nhint: run `train_practice.py problems` first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_bundled(folder: Path) -> None:
    """problems.jsonl, demo.jsonl and calibration.jsonl of the checkpoint."""
    write_rows(problem_rows(balanced(FILES_SEED, "heldout", HELDOUT_COUNT), "practice"), folder / "problems.jsonl")
    write_rows(problem_rows(balanced(FILES_SEED, "demo", DEMO_COUNT), "demo"), folder / "demo.jsonl")
    write_rows(solution_rows(balanced(FILES_SEED, "train", CALIBRATION_COUNT)), folder / "calibration.jsonl")


def write_drawn(path: Path, *, split: str, count: int, seed: int, solutions: bool) -> None:
    """`count` problems of a split, drawn like the training text (late mix, all families)."""
    drawn = list(islice(stream(Random(f"drawn-{split}-{seed}"), split), count))
    write_rows(solution_rows(drawn) if solutions else problem_rows(drawn, f"{split}-{seed}"), path)
