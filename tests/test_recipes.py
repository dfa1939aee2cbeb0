from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trtkit.errors import UnsupportedError
from trtkit.gpu import profile_named
from trtkit.known_models import KNOWN_MODELS, known_hub_id, known_model
from trtkit.plan import Workload, default_draft, plan_rows
from trtkit.plan.recipes import catalogue, recipe_of, write_catalogue
from trtkit.recipe import read_recipe

RECIPES = Path(__file__).parents[1] / "engines" / "recipes"


def test_the_bundled_recipes_are_what_the_planner_writes(tmp_path: Path) -> None:
    """After a change of the planner: `trtkit plan --catalogue engines/recipes`."""
    write_catalogue(tmp_path)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    bundled = {path.name: path.read_text(encoding="utf-8") for path in RECIPES.iterdir()}
    assert bundled.keys() == made.keys()
    assert [name for name in made if made[name] != bundled[name]] == []


def test_every_combination_is_there_or_refused_with_a_reason() -> None:
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    models = ("fast-math-r1-14b", "fast-openmath-nemotron-14b", "fast-math-qwen3-14b")
    for gpu in ("l4", "l4x4", "h100", "h100x2"):
        for model in models:
            for precision in ("int8", "fp8", "int4"):
                for ending in ("", "-drafter-1x3"):
                    name = f"{gpu}-{model}-{precision}{ending}"
                    listed = f"| {name} | needs " in readme.split("## What does not fit")[1]
                    assert (RECIPES / f"{name}.toml").is_file() != listed, name
    assert len(list(RECIPES.glob("*.toml"))) + readme.count("| needs ") == 72


def test_a_recipe_says_what_its_name_says_and_fits() -> None:
    for path in sorted(RECIPES.glob("*.toml")):
        recipe = read_recipe(path)
        stem, _, tree = path.stem.partition("-drafter-")
        gpu, _, rest = stem.partition("-")
        model, _, precision = rest.rpartition("-")
        assert (recipe.gpu, recipe.precision) == (gpu, precision)
        assert recipe.model.lower().endswith(f"/{model}")
        assert recipe.model in {hub_id for hub_id, _ in KNOWN_MODELS.values()}
        assert str(recipe.tree or "") == tree
        profile = profile_named(gpu)
        assert recipe.tensor_parallel == profile.count
        assert recipe.backend == "tensorrt-llm"
        assert 1 <= recipe.limits.batch <= 12
        # Independent of the planner: weights, one 16-bit cache per row and the head lie below the cards' memory.
        spec = known_model(recipe.model)
        assert spec is not None
        bits = {"int8": 8, "fp8": 8, "int4": 4.125}[precision]
        outside = 2 * 2 * spec.vocab * spec.hidden
        weights = (spec.parameters - 2 * spec.vocab * spec.hidden) * bits / 8 + outside
        cache = recipe.limits.batch * recipe.limits.total_tokens * spec.layers * 2 * 8 * 128 * 2
        head = 2 * default_draft(spec).head.parameters if recipe.tree else 0
        assert weights + cache + head < profile.memory_bytes * profile.count, path.name


def test_a_line_that_does_not_fit_gives_no_recipe() -> None:
    spec, gpu, work = KNOWN_MODELS["fast-math-r1-14b"][1], profile_named("l4"), Workload()
    draft = default_draft(spec)
    row = next(r for r in plan_rows(spec, gpu, work, draft) if (r.precision, r.drafter) == ("fp8", "1x3"))
    with pytest.raises(UnsupportedError, match="fp8 with drafter 1x3 does not fit L4: needs"):
        recipe_of("some/model", gpu, work, row, draft)


def test_limits_follow_the_question() -> None:
    spec, gpu = KNOWN_MODELS["fast-math-r1-14b"][1], profile_named("l4x4")
    draft = default_draft(spec)
    for work in (Workload(batch=4, length=1024), Workload(batch=64, length=32768, kv_dtype="fp8")):
        row = next(r for r in plan_rows(spec, gpu, work, draft) if (r.precision, r.drafter) == ("fp8", "1x3"))
        recipe = recipe_of("some/model", gpu, work, row, draft)
        assert recipe.limits.total_tokens == work.length
        assert recipe.limits.batch == min(work.batch, row.max_rows)
        assert recipe.limits.prompt_tokens <= work.length
        assert recipe.kv_dtype == work.kv_dtype
        assert recipe == replace(recipe, tree=draft.tree, tensor_parallel=4)


def test_writing_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("version = 1\n", encoding="utf-8")
    write_catalogue(tmp_path)
    assert (tmp_path / "mine.toml").is_file()
    assert len(catalogue()) == 72


def test_hub_ids_by_every_name() -> None:
    assert known_hub_id("fast-math-qwen3-14b") == known_hub_id("rabotnikuma/fast-math-qwen3-14b")
    assert known_hub_id("gpt-2") is None
