"""Code in the documentation that readers paste, run as it stands but for paths and sizes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trtkit.bundled import practice_dir
from trtkit.cli.app import run

DOCS = Path(__file__).resolve().parents[1] / "docs"


class _Column(list[Any]):
    def item(self, index: int) -> Any:
        return self[index]


def test_the_kaggle_cell_answers_what_the_contests_server_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the contest's module and for polars."""
    (cell,) = re.findall(r"```python\n(.*?)```", (DOCS / "kaggle.md").read_text(encoding="utf-8"), re.DOTALL)
    assert run(["--quiet", "build", "--precision", "bf16", "--out", str(tmp_path / "engine")]) == 0
    for said, here in (
        ("/kaggle/input/r1-fp8", str(tmp_path / "engine")), ("/kaggle/working/run", str(tmp_path / "run")),
        ("samples=32", "samples=4"),
    ):  # fmt: skip
        assert cell.count(said) == 1
        cell = cell.replace(said, here)
    rows = [json.loads(line) for line in (practice_dir() / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    answered: list[Any] = []

    class Server:
        def __init__(self, predict: Any) -> None:
            self._predict = predict

        def run_local_gateway(self, paths: tuple[str]) -> None:
            assert paths[0].endswith(".csv")
            answered.extend(self._predict(_Column([row["id"]]), _Column([row["problem"]])) for row in rows[:2])

    contest = ModuleType("kaggle_evaluation.aimo_3_inference_server")
    monkeypatch.setattr(contest, "AIMO3InferenceServer", Server, raising=False)
    package = SimpleNamespace(aimo_3_inference_server=contest)
    polars = SimpleNamespace(Series=_Column, DataFrame=dict)
    for name, module in (("kaggle_evaluation", package), (contest.__name__, contest), ("polars", polars)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
    namespace: dict[str, Any] = {}
    exec(compile(cell, "kaggle.md", "exec"), namespace)
    session = namespace["session"]
    session.close()
    voted = [solution.answer for solution in session.solutions.values()]
    assert [row["id"] for row in answered] == [["practice-001"], ["practice-002"]]
    assert [str(row["answer"]) for row in answered] == ["0" if vote is None else vote.key for vote in voted]
    assert (tmp_path / "run" / "summary.json").is_file()
