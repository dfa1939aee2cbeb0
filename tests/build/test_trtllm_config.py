"""Recipe and model -> what TensorRT-LLM is asked to build, against a golden table and the contract's own rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from trtkit.build.trtllm_config import BuildPlan, build_flags, check_gpu, command_line, container_line, plan_build
from trtkit.errors import UnsupportedError
from trtkit.gpu import profile_named
from trtkit.known_models import known_model
from trtkit.recipe import Limits, Recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "trtllm_builds.json"


def recipe(gpu: str, precision: str, **more: Any) -> Recipe:
    tree = more.pop("tree", None)
    shape = None if tree is None else TreeShape(beams=tree[0], length=tree[1])
    limits = more.pop("limits", Limits(batch=32, prompt_tokens=2048, total_tokens=16384))
    return Recipe(
        model="RabotniKuma/Fast-Math-R1-14B", gpu=gpu, precision=precision, backend="tensorrt-llm", limits=limits,
        tensor_parallel=profile_named(gpu).count, tree=shape, **more,
    )  # fmt: skip


def plan(gpu: str, precision: str, *, model: str = "fast-math-r1-14b", **more: Any) -> BuildPlan:
    spec = known_model(model)
    assert spec is not None
    return plan_build(recipe(gpu, precision, **more), spec)


CASES: dict[str, dict[str, Any]] = {
    "bf16 on 4xL4": {"gpu": "l4x4", "precision": "bf16"},
    "int8 on L4": {"gpu": "l4", "precision": "int8"},
    "int8-sq on L4": {"gpu": "l4", "precision": "int8-sq"},
    "int4 on 4xL4": {"gpu": "l4x4", "precision": "int4"},
    "fp8 on 4xL4": {"gpu": "l4x4", "precision": "fp8"},
    "fp8 on H100": {"gpu": "h100", "precision": "fp8"},
    "fp8 on H100, fp8 KV": {"gpu": "h100", "precision": "fp8", "kv_dtype": "fp8"},
    "bf16 on H100, fp8 KV": {"gpu": "h100", "precision": "bf16", "kv_dtype": "fp8"},
    "int8 on L4, int8 KV": {"gpu": "l4", "precision": "int8", "kv_dtype": "int8"},
    "fp8 on 4xL4, 1x3": {"gpu": "l4x4", "precision": "fp8", "tree": (1, 3)},
    "fp8 on H100, 4x4": {"gpu": "h100", "precision": "fp8", "tree": (4, 4)},
    "bf16 on 2xH100, 5x5, many rows": {
        "gpu": "h100x2", "precision": "bf16", "tree": (5, 5),
        "limits": Limits(batch=512, prompt_tokens=1024, total_tokens=4096),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert build_flags(plan(**CASES[name])) == golden[name]
    assert golden.keys() == CASES.keys()


def test_the_budget_holds_every_row_with_its_whole_tree() -> None:
    # The builder's own rule: max_batch_size x (beams x length + 1).
    made = plan("h100x2", "bf16", tree=(5, 5), limits=Limits(batch=512, prompt_tokens=1024, total_tokens=4096))
    assert (made.max_draft_len, made.max_num_tokens) == (25, 512 * 26)


def test_the_public_fp8_redrafter_recipe() -> None:
    """NVIDIA's competition build: everything 32000, batch 32, 1x3, fp8 GEMMs, paged context FMHA."""
    flags = build_flags(plan("h100x2", "fp8", tree=(1, 3), limits=Limits(batch=32, total_tokens=32000)))
    published = {
        "gemm_plugin": "fp8", "use_paged_context_fmha": "enable", "max_batch_size": "32", "max_input_len": "32000",
        "max_seq_len": "32000", "max_num_tokens": "32000", "speculative_decoding_mode": "explicit_draft_tokens",
        "max_beam_width": "1", "kv_cache_type": "paged",
    }  # fmt: skip
    assert {name: flags[name] for name in published} == published


@pytest.mark.parametrize("gpu", ["l4", "l40s", "a100", "h100", "h200", "b200"])
def test_the_fused_swiglu_is_for_hopper_alone(gpu: str) -> None:
    for precision in ("bf16", "fp8"):
        wanted = "fp8" if precision == "fp8" and gpu in ("h100", "h200") else None
        assert plan(gpu, precision).plugins.gemm_swiglu_plugin == wanted


@pytest.mark.parametrize("gpu", ["l4", "h100"])
@pytest.mark.parametrize("kv_dtype", ["model", "fp8", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-sq", "fp8", "int4"])
def test_fmha_is_what_the_builder_would_leave(precision: str, kv_dtype: str, gpu: str) -> None:
    plugins = plan(gpu, precision, kv_dtype=kv_dtype).plugins
    if kv_dtype == "int8" or (kv_dtype == "fp8" and precision != "fp8"):
        assert not plugins.use_paged_context_fmha
    assert plugins.use_fp8_context_fmha == (precision == "fp8" and kv_dtype == "fp8")
    assert plugins.use_fused_mlp == (precision in ("bf16", "fp8"))


def test_prompts_that_cannot_be_chunked_fit_whole() -> None:
    limits = Limits(batch=8, prompt_tokens=2048, total_tokens=16384)
    assert plan("l4", "int8", limits=limits).max_num_tokens == 8192
    assert plan("l4", "int8", limits=limits, kv_dtype="int8").max_num_tokens == 16384
    assert plan("l4", "int8", limits=limits, tree=(1, 3)).max_num_tokens == 16384


def test_no_more_tokens_than_all_rows_can_have() -> None:
    """Asked for more, the builder cuts it down with a warning: ``check_max_num_tokens`` in tensorrt_llm/_common.py."""
    assert plan("l4", "int8", limits=Limits(batch=1, prompt_tokens=512, total_tokens=4096)).max_num_tokens == 4096
    assert plan("l4", "int8", limits=Limits(batch=2, prompt_tokens=512, total_tokens=4096)).max_num_tokens == 8192


def test_no_longer_than_the_model() -> None:
    made = plan("h100", "fp8", model="fast-math-qwen3-14b", limits=Limits(total_tokens=100000))
    assert (made.max_seq_len, made.max_input_len) == (40960, 40960)
    made = plan("h100", "fp8", model="fast-math-qwen3-14b", limits=Limits(total_tokens=100000), tree=(2, 3))
    assert made.max_seq_len + 3 == 40960, "the last step's drafted tokens have positions, too"


def test_command_line() -> None:
    line = command_line(plan("l4x4", "fp8", tree=(1, 3)), checkpoint="my bundle/checkpoint", out="out")
    assert line.startswith("trtllm-build --checkpoint_dir 'my bundle/checkpoint' --output_dir out --max_batch_size 32 ")
    assert line.endswith(" --workers 4")
    assert "--max_draft_len" not in line
    assert "--workers" not in command_line(plan("h100", "fp8"), checkpoint="a", out="b")
    assert "nvcr.io/nvidia/tensorrt-llm/release:1.0.0" in container_line("trtkit compile x")


@pytest.mark.parametrize(
    ("gpu", "precision", "more", "said"),
    [
        ("cpu", "int8", {}, "none was named"),
        ("a100", "fp8", {}, "fp8 needs compute capability 8.9"),
        ("a100", "bf16", {"kv_dtype": "fp8"}, "fp8 KV cache needs compute capability 8.9"),
        ("t4", "int8", {"tree": (1, 3)}, "ReDrafter needs compute capability 8.0"),
        ("b200", "int4", {}, "refuses int4 weights"),
        ("b200", "int8-sq", {}, "refuses int8-sq weights"),
        ("b200", "fp8", {"kv_dtype": "int8"}, "refuses an int8 KV cache"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(gpu: str, precision: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_gpu(recipe(gpu, precision, **more))
    assert said in str(caught.value)
    assert caught.value.hint


def test_what_a_gpu_can_do_is_not() -> None:
    for gpu, precision in (("l4", "fp8"), ("h100", "int4"), ("a100", "int8-sq"), ("b200", "fp8")):
        check_gpu(recipe(gpu, precision, tree=(4, 4)))
