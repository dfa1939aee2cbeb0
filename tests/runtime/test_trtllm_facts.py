"""What a compiled engine says of itself, and that it is the one its manifest speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from trtkit.errors import EngineError
from trtkit.files import write_json
from trtkit.recipe import EngineManifest, Limits, Recipe
from trtkit.runtime.trtllm_facts import eos_ids, read_facts


def manifest(*, tree: TreeShape | None = None, ranks: int = 1, total: int = 4096) -> EngineManifest:
    recipe = Recipe(
        model="tiny", precision="bf16", backend="tensorrt-llm", gpu="l4" if ranks == 1 else f"l4x{ranks}",
        tensor_parallel=ranks, tree=tree, limits=Limits(batch=8, prompt_tokens=128, total_tokens=total),
    )  # fmt: skip
    return EngineManifest(
        recipe=recipe, backend="tensorrt-llm", versions={}, checkpoint_digest={}, quality=None,
        created="2026-01-01T00:00:00Z",
    )  # fmt: skip


def compiled(directory: Path, *, sequence: int, draft: int = 0, ranks: int = 1, **build: Any) -> Path:
    """``config.json`` as TensorRT-LLM writes it: ``max_seq_len`` includes the draft tokens that the builder added."""
    model: dict[str, Any] = {"architecture": "Qwen2ForCausalLM", "vocab_size": 320, "mapping": {"tp_size": ranks}}
    if draft:
        model |= {"architecture": "ReDrafterForQWenLM", "redrafter_greedy_search": True}
    plugins = {"use_paged_context_fmha": True}
    built = {"max_batch_size": 8, "max_seq_len": sequence, "max_draft_len": draft, "plugin_config": plugins, **build}
    write_json(directory / "compiled" / "config.json", {"pretrained_config": model, "build_config": built})
    return directory


@pytest.mark.parametrize(
    ("sequence", "draft", "total", "longest"), [(4096, 0, 4096, 4096), (4102, 6, 9999, 4096), (4102, 6, 1000, 1000)]
)
def test_the_longest_request_is_without_the_draft_tokens(
    tmp_path: Path, sequence: int, draft: int, total: int, longest: int
) -> None:
    tree = TreeShape(beams=2, length=3) if draft else None
    facts = read_facts(compiled(tmp_path, sequence=sequence, draft=draft), manifest(tree=tree, total=total))
    assert facts.total_tokens == longest
    assert (facts.kind.redrafter, facts.kind.greedy) == (bool(draft), bool(draft))


@pytest.mark.parametrize(
    ("built", "told", "said"),
    [
        ({"ranks": 2}, {}, "tp_size 2: the recipe says 1"),
        ({"draft": 3}, {}, "architecture ReDrafterForQWenLM"),
        ({}, {"tree": TreeShape(beams=1, length=3)}, "architecture Qwen2ForCausalLM"),
        ({"max_batch_size": "8"}, {}, "max_batch_size: '8' is no int"),
        ({"plugin_config": {}}, {}, "use_paged_context_fmha: None is no bool"),
    ],
)
def test_an_engine_that_is_not_the_manifests_is_refused(
    tmp_path: Path, built: dict[str, Any], told: dict[str, Any], said: str
) -> None:
    compiled(tmp_path, sequence=4096, **built)
    with pytest.raises(EngineError, match="not the engine") as caught:
        read_facts(tmp_path, manifest(**told))
    (offender,) = caught.value.offenders
    assert said in offender


def test_a_section_that_is_missing_is_named(tmp_path: Path) -> None:
    compiled(tmp_path, sequence=4096, plugin_config=None)
    with pytest.raises(EngineError, match="no section 'plugin_config'"):
        read_facts(tmp_path, manifest())


def test_what_ends_a_turn_is_in_either_file(tmp_path: Path) -> None:
    assert eos_ids(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert eos_ids(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert eos_ids(tmp_path) == {3, 5, 7}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert eos_ids(tmp_path) == {5, 7}
