"""Drafts counted on saved samples, beside an engine that decodes just these."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lookup_acceptance
import pytest

from trtkit.bundled import practice_dir


def test_tokens_per_step_of_saved_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples that say the same, token by token; one that repeats itself; one that never came to its end."""
    same = "So 1 + 1 is 2, then 3 * 4 is 12, and 12 - 2 is 10."
    rows = [
        {"problem": "a", "text": f"{same}</think>never read"},
        {"problem": "a", "text": f"{same}</think>"},
        {"problem": "b", "text": "7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7 7</think>"},
        {"problem": "b", "text": "7 7 7 7"},
    ]
    traces = tmp_path / "traces.jsonl"
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = {}
    for alone in ([], ["--alone"]):
        monkeypatch.setattr(sys, "argv", ["", str(traces), "--tokenizer", str(practice_dir()), *alone])
        lookup_acceptance.main()
        first, *lines = capsys.readouterr().out.splitlines()
        assert first.startswith("3 samples of 2 problems")
        said[bool(alone)] = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert said[True].keys() == {"1x2", "1x3", "1x4", "1x8", "2x4", "4x4"}
    assert all(1 < said[True][tree] <= rate for tree, rate in said[False].items())
    assert said[False]["1x8"] > said[False]["1x2"]


def test_every_token_is_emitted_once() -> None:
    sample = [1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 1, 2, 5]
    accepted = list(lookup_acceptance._decoded([9, 1, 2], [sample], lookup_acceptance.TreeShape(beams=1, length=3)))
    assert sum(accepted) + len(accepted) == len(sample)
    assert max(accepted) == 3
