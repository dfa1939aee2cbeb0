from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import save_tiny
from trtkit.cli.app import run


def test_table_then_next_then_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "nemotron-14b", "--gpu", "l4x4", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("next: trtkit build --precision")
    document = json.loads(lines[-1])
    assert len(document["rows"]) == 10
    for row in document["rows"]:
        assert {"precision", "drafter", "fits", "reason", "max_rows", "tokens_per_second"} <= row.keys()
    assert any(line.split()[:2] == ["fp8", "1x3"] for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--gpu", "t4", "--length", "131072", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(row["fits"] for row in json.loads(lines[-1])["rows"])
    assert "larger GPU" in lines[-2]


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", str(save_tiny(tmp_path)), "--gpu", "cpu", "--length", "512", "--json"]) == 0
    assert all(row["fits"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])


def test_auto_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--length", "1024"]) == 0
    assert "next: " in capsys.readouterr().out
