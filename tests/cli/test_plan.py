from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny
from trtkit.cli.app import run
from trtkit.recipe import read_recipe


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


def test_a_terminal_that_knows_no_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "čísla"
    save_tiny(model)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(["plan", "--model", str(model), "--gpu", "cpu", "--json"]) == 0
    lines = written.getvalue().decode("ascii").splitlines()
    assert lines[0].endswith(r"/\u010d\xedsla on CPU (nominal)")
    assert json.loads(lines[-1])["model"] == str(model)


def test_a_computer_s_memory_is_told_for_all_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--gpu", "cpu", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    usable = [row["memory"]["usable_bytes"] / 1e9 for row in json.loads(lines[-1])["rows"]]
    [memory] = [line for line in lines if line.split()[:1] == ["memory"]]
    assert f"{min(usable):.2f} GB to {max(usable):.2f} GB usable" in memory


def test_more_devices_than_a_model_can_be_split_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `--gpu auto` finds on a machine with three or five cards: the next line plans for fewer, as it was asked."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["plan", "--gpu", "l4x3", "--length", "8192", "--batch", "4", "--kv-dtype", "fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("40 attention heads cannot be split over 3 devices" in line for line in lines)
    assert lines[-1].endswith("--gpu l4x2 --length 8192 --batch 4 --kv-dtype fp8")
    assert run(shlex.split(lines[-1].removeprefix("next: trtkit "))) == 0
    assert "--gpu l4x2 --backend tensorrt-llm --kv-dtype fp8" in capsys.readouterr().out.splitlines()[-1]
    # int4 takes four of eight, where other precisions take all.
    assert run(["plan", "--gpu", "l4x8", "-p", "int4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: trtkit plan --model fast-math-r1-14b --gpu l4x4"
    # Two cards would hold int4 at that length, but it was not asked for.
    assert run(["plan", "--gpu", "l4x3", "-p", "bf16", "--length", "131072"]) == 0
    assert "larger GPU" in capsys.readouterr().out.splitlines()[-1]


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", str(save_tiny(tmp_path)), "--gpu", "cpu", "--length", "512", "--json"]) == 0
    assert all(row["fits"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])


def test_auto_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--length", "1024"]) == 0
    assert "next: " in capsys.readouterr().out


def test_the_whole_table_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "fast-math-qwen3-14b", "--gpu", "l4x4"]) == 0
    text = capsys.readouterr().out
    assert "rows at 16,384" in text
    lines = [line for line in text.splitlines() if line.startswith("int4 ")]
    assert len(lines) == 2
    assert all("accuracy" in line for line in lines)
    assert "lower end" not in text


def test_hbm_estimates_say_that_they_are_low(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--gpu", "h100", "-p", "fp8", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("lower end" in line for line in lines)
    assert [(row["precision"], row["drafter"]) for row in json.loads(lines[-1])["rows"]] == [
        ("fp8", None), ("fp8", "1x3"),
    ]  # fmt: skip


def test_a_recipe_for_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.toml"
    asked = ["plan", "--gpu", "l4x4", "--length", "8192", "--batch", "16", "-p", "fp8", "--write-recipe", str(path)]
    assert run([*asked, "--drafter"]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].split()
    recipe = read_recipe(path)
    assert (recipe.model, recipe.precision, recipe.gpu, str(recipe.tree)) == (
        "RabotniKuma/Fast-Math-R1-14B", "fp8", "l4x4", "1x3",
    )  # fmt: skip
    assert (recipe.limits.batch, recipe.limits.total_tokens) == (16, 8192)
    assert advice[:3] == ["next:", "trtkit", "build"]
    given = dict(zip(advice[3::2], advice[4::2], strict=True))
    assert given["--max-total-tokens"] == "8192"
    assert (given["--batch"], given["--tree"]) == ("16", "1x3")
    assert run(["build", "--help"]) == 0
    known = capsys.readouterr().out
    assert [flag for flag in given if flag not in known] == []
    assert run(asked) == 0
    assert read_recipe(path).tree is None


def test_no_recipe_for_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made.toml"
    assert run(["plan", "--gpu", "l4", "-p", "bf16", "--write-recipe", str(path)]) != 0
    assert "bf16 does not fit L4" in capsys.readouterr().err
    assert run(["plan", "--gpu", "l4", "--write-recipe", str(path)]) != 0
    assert "--precision" in capsys.readouterr().err
    assert not path.exists()


def test_published_speeds_beside_the_planners(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--published", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert [item["published"] for item in figures if item["gpu"] == "l4x4"] == [210, 315, 436, 310, 554]
    assert all(abs(item["error"]) <= 0.2 for item in figures)


def test_a_catalogue_that_cannot_be_written_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["plan", "--catalogue", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_catalogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--catalogue", str(tmp_path / "recipes"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {path.name for path in (tmp_path / "recipes").glob("*.toml")} == set(document["written"])
    assert len(document["written"]) + len(document["refused"]) == 72


def test_the_next_line_is_the_build_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--gpu", "l4x4", "--kv-dtype", "fp8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next: trtkit build --precision fp8 --model RabotniKuma/Fast-Math-R1-14B --gpu l4x4 --backend tensorrt-llm "
        "--kv-dtype fp8 --batch 12 --calibration FILE.jsonl"
    )
    assert run(["plan", "--model", "practice", "--gpu", "l4"]) == 0  # no --length: as long as the model goes
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: trtkit "))
    assert run([*words, "--print-command"]) == 0
    assert "--max_batch_size 12 " in capsys.readouterr().out


def test_a_short_name_leads_to_its_hub_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", "--model", "fast-math-r1-14b", "--out", "nowhere"]) == 1
    assert "hint:  pass RabotniKuma/Fast-Math-R1-14B" in capsys.readouterr().err
