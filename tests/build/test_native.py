"""A build that must not be trusted leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chat_files import save_chat_files
from tests.tiny import save_tiny
from trtkit.build import native
from trtkit.errors import CheckpointError
from trtkit.recipe import Limits, Recipe


def test_a_checkpoint_that_changes_under_the_build_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    real = native.convert

    def replaced_meanwhile(*arguments: object, **more: object) -> dict[str, str]:
        digests = real(*arguments, **more)  # type: ignore[arg-type]
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
