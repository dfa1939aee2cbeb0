from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import tiny_engine_dir
from tests.trtllm_double.loader import load_checkpoint
from trtkit.bundled import practice_dir
from trtkit.cli.app import run


def engine(directory: Path, *, head: bool = False) -> Path:
    """A bf16 engine of the tiny model, with a draft head or without."""
    recipe = {"tree": TreeShape(beams=1, length=3)} if head else None
    tiny_engine_dir(directory, dtype=torch.bfloat16, recipe=recipe)
    if head:
        (directory / "drafter").mkdir()
        config = DrafterConfig(hidden_size=256, vocab_size=320, exit_dim=256)
        save_drafter(Drafter(config), directory / "drafter", dtype=torch.bfloat16)
    return directory


def test_trtllm_with_the_engines_own_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(engine(tmp_path / "engine", head=True))
    out = tmp_path / "out"
    assert run(["export", source, "--format", "trtllm", "--out", str(out), "--tp", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"next: on the GPU host: trtllm-build --checkpoint_dir {out}")
    document = json.loads(lines[-1])
    assert (document["precision"], document["ranks"], document["tree"]) == ("bf16", 2, "1x3")
    loaded = load_checkpoint(out)
    assert loaded.config["redrafter_draft_len_per_beam"] == 3
    assert run(["inspect", str(out), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "TensorRT-LLM checkpoint" in shown
    assert "ReDrafter, tree 1x3" in shown

    assert run(["export", str(out), "--format", "trtllm", "--out", str(tmp_path / "again")]) == 2
    assert "TensorRT-LLM's layout already" in capsys.readouterr().err
    (tmp_path / "compiled" / "compiled").mkdir(parents=True)
    assert run(["export", str(tmp_path / "compiled"), "--format", "trtllm", "--out", str(tmp_path / "again")]) == 2
    assert "it holds no weights" in capsys.readouterr().err
    assert run(["export", source, "--format", "trtllm", "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert run(["export", source, "--format", "trtllm", "--out", str(out), "--drafter", "none", "--force"]) == 0
    assert not load_checkpoint(out).redrafter


def test_unified_hf_says_how_that_backend_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = engine(tmp_path / "engine", head=True)
    assert run(["export", str(source), "--format", "unified-hf", "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr().out
    assert "Eagle3" in shown
    assert "no ReDrafter" in shown
    assert "ReDrafter head stays behind" in shown
    assert json.loads(shown.splitlines()[-1])["speculative_modes"][0] == "MTP"
    assert not (tmp_path / "out" / "engine.json").exists()
    assert not (tmp_path / "out" / "drafter").exists()


@pytest.mark.parametrize("layout", ["trtllm", "unified-hf"])
@pytest.mark.parametrize("head", ["int8", "model"])
def test_what_the_other_runtime_does_with_the_output_layer_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str, layout: str
) -> None:
    source = tiny_engine_dir(tmp_path / "engine", dtype=torch.bfloat16, recipe={"output_layer": head})
    assert run(["export", str(source), "--format", layout, "--out", str(tmp_path / "out")]) == 0
    assert ("this engine runs it in int8" in capsys.readouterr().out) == (head == "int8")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--format", "trtlm"], 2, "did you mean 'trtllm'"),
        (["--format", "hf"], 2, "unknown --format 'hf'"),
        (["--format", "unified-hf", "--tp", "2", "--greedy"], 2, "- --greedy"),
        (["--format", "trtllm", "--tree", "1x3"], 2, "need a draft head"),
        (["--format", "trtllm", "--dtype", "fp16"], 2, "one of: bfloat16, float16"),
        (["--format", "trtllm", "--tp", "8"], 1, "4 attention heads do not divide by tensor parallel 8"),
        (["--format", "trtllm", "--drafter", "no-such-head", "--tree", "1x3"], 1, "cannot be read"),
    ],
)
def test_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    source = engine(tmp_path / "engine")
    assert run(["export", str(source), "--out", str(tmp_path / "out"), *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert "hint:" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_force_replaces_exports_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(engine(tmp_path / "engine"))
    other = engine(tmp_path / "other")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(practice_dir(), checkpoint)  # with a draft head in it
    for place in (other, tmp_path, checkpoint, checkpoint / "drafter"):
        for layout in ("unified-hf", "trtllm"):
            assert run(["export", source, "--format", layout, "--out", str(place), "--force"]) == 1
            assert "not an export" in capsys.readouterr().err
    assert (other / "engine.json").is_file()
    assert (checkpoint / "drafter" / "model.safetensors").is_file()


def test_force_replaces_a_quantized_export(tmp_path: Path) -> None:
    arguments = ["--quiet", "build", "--precision", "int4", "--int4-method", "rtn", "--out", str(tmp_path / "engine")]
    assert run(arguments) == 0
    for layout in ("unified-hf", "trtllm", "unified-hf"):
        out = ["--out", str(tmp_path / "out"), "--force"]
        assert run(["--quiet", "export", str(tmp_path / "engine"), "--format", layout, *out]) == 0
    assert (tmp_path / "out" / "hf_quant_config.json").is_file()


def test_the_practice_head_goes_by_its_name(tmp_path: Path) -> None:
    assert run(["--quiet", "build", "--precision", "bf16", "--out", str(tmp_path / "engine")]) == 0
    head = ["--drafter", "practice", "--tree", "2x3", "--out", str(tmp_path / "out")]
    assert run(["--quiet", "export", str(tmp_path / "engine"), "--format", "trtllm", *head]) == 0
    assert load_checkpoint(tmp_path / "out").config["redrafter_num_beams"] == 2
