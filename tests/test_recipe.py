"""The output layer in recipes and manifests: what ``auto`` stands for, and what files from before the choice mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from tests.engines import tiny_engine_dir
from trtkit.errors import ConfigError, EngineError, UsageError
from trtkit.recipe import Recipe, output_layer_of, read_manifest, read_recipe, settled, write_recipe

AUTO = {
    ("bf16", "torch"): "model", ("fp8", "torch"): "model",
    ("int8", "torch"): "int8", ("int8-sq", "torch"): "int8", ("int4", "torch"): "int8",
    ("bf16", "tensorrt-llm"): "model", ("fp8", "tensorrt-llm"): "model",
    ("int8", "tensorrt-llm"): "model", ("int8-sq", "tensorrt-llm"): "model", ("int4", "tensorrt-llm"): "model",
}  # fmt: skip


def without_the_field(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["recipe"]["output_layer"]
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(("precision", "backend"), AUTO)
def test_auto_is_settled_by_precision_and_backend(precision: str, backend: Any) -> None:
    recipe = Recipe(model="practice", precision=precision, backend=backend)
    assert output_layer_of(recipe) == AUTO[precision, backend]
    assert settled(recipe).output_layer == AUTO[precision, backend]


@pytest.mark.parametrize("asked", ["model", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_stated_output_layer_is_kept(precision: str, asked: Any) -> None:
    recipe = Recipe(model="practice", precision=precision, output_layer=asked)
    assert output_layer_of(recipe) == asked
    assert settled(recipe) == recipe


def test_a_compiled_engine_cannot_have_it_in_int8() -> None:
    recipe = Recipe(model="practice", precision="int4", backend="tensorrt-llm", output_layer="int8")
    with pytest.raises(UsageError, match="16 bits") as caught:
        settled(recipe)
    assert "--backend torch" in str(caught.value)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_older_engine_keeps_the_models_dtype(tmp_path: Path, precision: str) -> None:
    directory = tiny_engine_dir(tmp_path, recipe={"precision": precision})
    without_the_field(directory / "engine.json")
    assert read_manifest(directory).recipe.output_layer == "model"


def test_an_unknown_one_is_refused(tmp_path: Path) -> None:
    directory = tiny_engine_dir(tmp_path)
    path = directory / "engine.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"auto"', '"int3"'), encoding="utf-8")
    with pytest.raises(EngineError) as caught:
        read_manifest(directory)
    assert caught.value.offenders == ("recipe.output_layer: 'int3' is not one of 'auto', 'model', 'int8'",)


def test_a_recipe_file_without_it_leaves_the_choice_to_the_build(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    write_recipe(path, Recipe(model="practice", precision="int4"))
    text = path.read_text(encoding="utf-8")
    assert 'output_layer = "auto"\n' in text
    path.write_text(text.replace('output_layer = "auto"\n', ""), encoding="utf-8")
    assert read_recipe(path) == Recipe(model="practice", precision="int4")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"version": 1}', '{"version": 1, "recipe": 3}'])
def test_a_damaged_manifest_says_what_to_do(tmp_path: Path, damage: str) -> None:
    directory = tiny_engine_dir(tmp_path)
    (directory / "engine.json").write_text(damage, encoding="utf-8")
    with pytest.raises(EngineError) as caught:
        read_manifest(directory)
    assert "trtkit build" in (caught.value.hint or "")
    assert str(caught.value.where).startswith(str(directory / "engine.json"))


def test_a_draft_tree_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    write_recipe(path, Recipe(model="practice", precision="int8", tree=TreeShape(beams=1, length=3)))
    path.write_text(path.read_text(encoding="utf-8").replace("beams = 1", "beams = 0"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert caught.value.offenders == ("tree: a draft tree needs at least one beam and one token, not 0x3",)
