"""A build that must not be trusted leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.chat_files import save_chat_files, save_problems
from tests.tiny import save_tiny
from trtkit.build import native
from trtkit.errors import CheckpointError, QualityError
from trtkit.quant.calibrate import DataFree
from trtkit.recipe import Limits, Quality, Recipe
from trtkit.scheme import QuantScheme


def test_a_checkpoint_that_changes_under_the_build_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    real = native.convert

    def replaced_meanwhile(*arguments: object, **more: object) -> dict[str, str]:
        digests = real(*arguments, **more)
        weights = source / "model.safetensors"
        aside = source / "new.safetensors.part"
        aside.write_bytes(weights.read_bytes())
        aside.replace(weights)
        return digests

    recipe = Recipe(
        model=str(source), precision="int8", limits=Limits(batch=2, prompt_tokens=64, total_tokens=128)
    )  # fmt: skip
    native.build_native(recipe, tmp_path / "quiet", device="cpu")
    monkeypatch.setattr(native, "convert", replaced_meanwhile)
    with pytest.raises(CheckpointError, match="changed while it was read") as caught:
        native.build_native(recipe, tmp_path / "engine", device="cpu")
    assert caught.value.offenders == ("model.safetensors",)
    assert not (tmp_path / "engine").exists()


def test_a_link_to_nowhere_is_named_only_where_its_file_is_needed(tmp_path: Path) -> None:
    """A pruned or unfinished download has such links."""
    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    recipe = Recipe(model=str(source), precision="int8", limits=Limits(batch=2, prompt_tokens=64, total_tokens=128))
    (source / "trainer_state.json").symlink_to(tmp_path / "nowhere")
    native.build_native(recipe, tmp_path / "engine", device="cpu")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no weights found"):
        native.build_native(recipe, tmp_path / "other", device="cpu")


def test_weights_that_are_not_finite_are_found_before_minutes_of_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    weights = load_file(source / "model.safetensors")
    bad = ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")
    for name in bad:
        weights[name].reshape(-1)[-1] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(native, "_calibrator", no_calibrator)
    text = tmp_path / "text.jsonl"
    text.write_text('{"problem": "1 + 1?", "generated_solution": "two"}\n' * 16)
    for precision, calibration in (("int8", None), ("fp8", text)):
        recipe = Recipe(
            model=str(source), precision=precision, limits=Limits(batch=2, prompt_tokens=64, total_tokens=128)
        )
        with pytest.raises(CheckpointError, match="not finite") as caught:
            native.build_native(recipe, tmp_path / "engine", calibration=calibration, device="cpu")
        assert caught.value.offenders == tuple(f"{name}: 1 value(s) are NaN or Inf" for name in bad)
        assert not (tmp_path / "engine").exists()


def test_a_quality_that_is_no_number_misses_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    save_problems(source / "calibration.jsonl")
    real = native.measure_quality

    def broken(*arguments: object, **more: object) -> Quality:
        return dataclasses.replace(real(*arguments, **more), kl_mean=float("nan"))

    monkeypatch.setattr(native, "measure_quality", broken)
    recipe = Recipe(model=str(source), precision="int8", limits=Limits(batch=2, prompt_tokens=64, total_tokens=128))
    with pytest.raises(QualityError, match="mean KL nan"):
        native.build_native(recipe, tmp_path / "engine", max_kl=1e9, device="cpu")
    assert not (tmp_path / "engine").exists()


def no_calibrator(recipe: Recipe, scheme: QuantScheme, *_: object) -> DataFree:
    """The one that needs no data; none other may be asked for."""
    assert not scheme.calibrated
    return DataFree()
