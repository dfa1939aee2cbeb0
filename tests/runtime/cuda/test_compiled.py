"""The attention and pointwise kernels as Triton's compiler and ptxas make them for GPUs that are not there.

Compiled in a process of its own: in this one the kernels are the interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from trtkit.runtime.cuda.attention import split_shape

ROOT = Path(__file__).resolve().parents[3]
SHARED = {89: 100 * 1024, 90: 228 * 1024}
"""Bytes of shared memory of a multiprocessor."""
FLOATS = dict.fromkeys(("sums", "tops", "norms"), "*fp32")
SIZES = dict.fromkeys(
    ("q_stride", "k_stride", "v_stride", "pool_stride", "table_width", "mask_row", "mask_node", "nodes", "splits",
     "m_tiles"), "i32",
)  # fmt: skip
SCALES = dict.fromkeys(("key_scale", "value_scale", "softmax_scale"), "fp32")


def attention(
    stored: str, tile_m: int, head_dim: int = 128, computed: str = "*bf16"
) -> tuple[str, dict[str, str], dict[str, Any], int]:
    """The shapes of Qwen2.5-14B; ``head_dim`` 64 is that of 0.5B."""
    types = {
        **dict.fromkeys(("q", "k", "v"), computed), **FLOATS, **SIZES, **SCALES, "key_pool": stored,
        "value_pool": stored, "table": "*i64", "cached": "*i64", "mask": "*i32", "slots": "*i64",
    }  # fmt: skip
    constants = {
        "group": 5, "head_dim": head_dim, "block_size": 16, "tile_m": tile_m, "tile_s": 32, "tile_d": head_dim,
        "split": 256 if tile_m <= 32 else 512,
    }  # fmt: skip
    return "attention.attend_split", types, constants, 4


COMBINE = (
    "attention.combine_splits",
    {**FLOATS, "out": "*bf16", "cached": "*i64", "nodes": "i32", "splits": "i32", "value_scale": "fp32"},
    {"group": 5, "head_dim": 128, "tile_d": 128, "split": 256, "chunk": 32},
    4,
)
POINTWISE = (
    (
        "pointwise.add_norm",
        {"out": "*bf16", "hidden": "*bf16", "delta": "*bf16", "weight": "*fp32", "out_stride": "i32",
         "hidden_stride": "i32", "delta_stride": "i32", "eps": "fp32"},
        {"width": 5120, "tile": 8192, "adds": True}, 8,
    ),
    (
        "pointwise.rotate",
        {"qkv": "*bf16", "cos": "*bf16", "sin": "*bf16", "q_weight": "*fp32", "k_weight": "*fp32", "stride": "i32",
         "eps": "fp32"},
        {"heads": 40, "head_dim": 128, "tile": 64, "norms": True}, 1,
    ),
    (
        "pointwise.gated", {"out": "*bf16", "gate_up": "*bf16", "stride": "i32"}, {"width": 13824, "tile": 1024}, 4,
    ),
)  # fmt: skip
SCRIPT = """
import importlib, json, re, sys
from tests.runtime.cuda.compiling import compile_for
for name, types, constants, warps in json.load(sys.stdin):
    module, kernel = name.split(".")
    kernel = getattr(importlib.import_module("trtkit.runtime.cuda." + module), kernel)
    start = {"early": sys.argv[1] == "90"}
    made = compile_for(int(sys.argv[1]), kernel, types, constants | start, warps=warps, stages=5)
    products = [line for line in made.ttgir.splitlines() if " tt.dot " in line or " ttng.warp_group_dot " in line]
    print(json.dumps([name, constants, {
        "registers": made.registers, "spilled": made.spilled_bytes, "shared": made.shared_bytes,
        "products": [re.findall(r"opIdx = ([01]),.*?kWidth = ([0-9]+)", line) for line in products],
        "async_copies": "cp.async" in made.ptx,
        "touched_before": re.findall(
            r"(?:ld|st|atom|red)\\.global|cp\\.async", made.ptx.split("griddepcontrol.wait")[0]
        ),
    }]), flush=True)
"""


def compiled(capability: int, kernels: list[Any]) -> list[Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability)], input=json.dumps(kernels), env=environment, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [89, 90])
def test_attention_leaves_room_for_a_second_program(capability: int) -> None:
    """Two programs a multiprocessor keep reading while one waits: half of its shared memory each, 255 registers of 128
    threads. An L4, which needs 3 KB on the way at a time, may do with one of 64 query rows; with spills."""
    wanted = [attention(stored, tile_m) for stored in ("*bf16", "*fp8e4nv", "*i8") for tile_m in (16, 32, 64)]
    made = compiled(capability, [*wanted, attention("*bf16", 16, 64), COMBINE])
    assert len(made) == 11
    for name, constants, facts in made:
        programs = 1 if capability == 89 and constants.get("tile_m") == 64 else 2
        assert facts["shared"] * programs <= SHARED[capability], (name, constants, facts)
        assert facts["spilled"] <= (256 if constants.get("tile_m") == 64 else 64), (name, constants, facts)
        assert facts["async_copies"] or name != "attention.attend_split"
        assert not facts["touched_before"] or capability < 90, name


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [89, 90])
def test_attention_in_float32_fits(capability: int) -> None:
    """Of a checkpoint in float32, and of the widest tree: it need not be fast, but it has to run."""
    tile_m, _ = split_shape(17 * 5, torch.float32)
    for _, constants, facts in compiled(
        capability, [attention(kind, tile_m, 128, "*fp32") for kind in ("*fp32", "*i8")]
    ):
        assert facts["shared"] <= SHARED[capability] - 1024, (constants, facts)
        assert facts["spilled"] <= 1024, (constants, facts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [89, 90])
def test_a_cached_key_and_a_node_are_summed_in_the_same_order(capability: int) -> None:
    """Both loops of the kernel lay the numbers out alike for the tensor cores; else a chain that is verified would not
    give the bits of plain decoding."""
    for _, constants, facts in compiled(capability, [attention(kind, 16) for kind in ("*bf16", "*fp8e4nv")]):
        scores, values, node_scores, node_values = facts["products"]
        assert scores == node_scores, (constants, facts)
        assert values == node_values, (constants, facts)
        assert len(values) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_pointwise_kernels_compile_without_spills(capability: int) -> None:
    for name, _, facts in compiled(capability, list(POINTWISE)):
        assert facts["spilled"] == 0, (name, facts)
        assert not facts["touched_before"] or capability < 90, name
