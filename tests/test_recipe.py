"""The output layer in recipes and manifests: what ``auto`` stands for, and what files from before the choice mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from tests.engines import tiny_engine_dir
from trtkit.errors import ConfigError, EngineError, UsageError
from trtkit.recipe import (
    EngineManifest,
    Limits,
    Quality,
    Recipe,
    output_layer_of,
    read_manifest,
    read_recipe,
    settled,
    write_manifest,
    write_recipe,
)
from trtkit.scheme import scheme_named

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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp"}, "precision 'fp'; did you mean 'fp8'?"), ({"tensor_parallel": 0}, "tensor_parallel 0"),
        ({"smooth_alpha": 1.01}, "smooth_alpha 1.01"), ({"smooth_alpha": -0.01}, "smooth_alpha -0.01"),
        ({"smooth_alpha": float("nan")}, "smooth_alpha nan"), ({"calibration_rows": 0}, "calibration_rows"),
        ({"calibration_tokens": 0}, "calibration_tokens"), ({"limits": Limits(batch=0)}, "limits.batch"),
        ({"limits": Limits(prompt_tokens=0)}, "limits.prompt_tokens"),
        ({"limits": Limits(prompt_tokens=9, total_tokens=8)}, "limits.prompt_tokens exceeds limits.total_tokens"),
    ],
)  # fmt: skip
def test_what_no_build_could_do_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**{"model": "practice", "precision": "fp8", **changes})
    (offender,) = caught.value.offenders
    assert said in offender
    Recipe(model="practice", precision="fp8", smooth_alpha=1, limits=Limits(prompt_tokens=8, total_tokens=8))


def test_everything_wrong_with_a_recipe_is_said_at_once_and_where(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'version = 1\nprecison = "fp8"\ngreedy = 1\ntensor_parallel = true\nsmooth_alpha = "x"\nbackend = "onnx"\n'
        "tree = 3\n[limits]\nbatch = 1.5\nrows = 2\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert caught.value.where == str(path)
    assert sorted(caught.value.offenders) == [
        "backend: 'onnx' is not one of 'torch', 'tensorrt-llm'",
        "greedy: expected bool, found 1",
        "limits.batch: expected int, found 1.5",
        "limits.rows: unknown key",
        "model: missing",
        "precision: missing",
        "precison: unknown key; did you mean 'precision'?",
        "smooth_alpha: expected float, found 'x'",
        "tensor_parallel: expected int, found True",
        "tree: expected a table, found int",
    ]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2", "newer than this trtkit"),
        ("0", "no usable"),
        ("'1'", "no usable"),
        ("true", "no usable"),
        ("", "no usable"),
    ],
)
def test_a_version_that_cannot_be_read(tmp_path: Path, version: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text((f"version = {version}\n" if version else "") + 'model = "practice"\nprecision = "int8"\n')
    with pytest.raises(ConfigError, match=said):
        read_recipe(path)


def test_files_are_read_back_equal(tmp_path: Path) -> None:
    recipe = Recipe(
        model='C:\\models\\a "b"\n', precision="int8-sq", gpu="l4x3", kv_dtype="int8", backend="tensorrt-llm",
        tensor_parallel=3, limits=Limits(batch=1, prompt_tokens=2, total_tokens=3), tree=TreeShape(beams=2, length=4),
        greedy=True, int4_method="rtn", output_layer="model", smooth_alpha=1, calibrator="modelopt",
        calibration_rows=7, calibration_tokens=9,
    )  # fmt: skip
    write_recipe(tmp_path / "recipe.toml", recipe)
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    quality = Quality(tokens=3, kl_mean=1e-9, top1_agreement=1, perplexity=2.5, perplexity_bf16=2.25,
                      worst_tensors=(("layers.0.mlp.up_proj", 0.5), ("lm_head", 0.25)))  # fmt: skip
    for judged, flags in ((quality, {"--max_batch_size": "1"}), (None, None)):
        manifest = EngineManifest(recipe=recipe, backend="torch", versions={"torch": "2"}, quality=judged, flags=flags,
                                  checkpoint_digest={"a": "b"}, created="2026-01-01T00:00:00Z")  # fmt: skip
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest
    data = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**data, "quality": None, "flags": None}))
    assert read_manifest(tmp_path) == manifest, "as other writers leave a field empty"


@pytest.mark.parametrize(
    ("field", "value", "offender"),
    [
        ("versions", [], "versions: expected a table"),
        ("versions", {"torch": 2}, "versions.torch: expected str, found 2"),
        ("worst_tensors", {}, "quality.worst_tensors: expected a list"),
        ("worst_tensors", [["lm_head"]], "quality.worst_tensors: expected 2 values, found 1"),
        ("worst_tensors", [["lm_head", 0.5, 1]], "quality.worst_tensors: expected 2 values, found 3"),
        ("worst_tensors", [[0.5, "lm_head"]], "quality.worst_tensors: expected str, found 0.5"),
    ],
)
def test_a_manifest_of_wrong_types_says_where(tmp_path: Path, field: str, value: Any, offender: str) -> None:
    directory = tiny_engine_dir(tmp_path)
    data = json.loads((directory / "engine.json").read_text())
    quality = {"tokens": 1, "kl_mean": 0, "top1_agreement": 1, "perplexity": 1, "perplexity_bf16": 1}
    data["quality"] = {**quality, "worst_tensors": []}
    (data if field in data else data["quality"])[field] = value
    (directory / "engine.json").write_text(json.dumps(data))
    with pytest.raises(EngineError) as caught:
        read_manifest(directory)
    assert caught.value.offenders[0] == offender


def test_a_draft_tree_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    write_recipe(path, Recipe(model="practice", precision="int8", tree=TreeShape(beams=1, length=3)))
    path.write_text(path.read_text(encoding="utf-8").replace("beams = 1", "beams = 0"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path)
    assert caught.value.offenders == ("tree: a draft tree needs at least one beam and one token, not 0x3",)


def test_a_scheme_is_told_without_a_name_that_it_has_not() -> None:
    assert scheme_named("bf16").told == "bf16, KV cache model"
    assert scheme_named("int4").told == "int4 (W4A16_AWQ), KV cache model"
