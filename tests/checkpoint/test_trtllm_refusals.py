"""What TensorRT-LLM cannot hold is refused before anything is written, every reason at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.checkpoint.conftest import Native
from tests.checkpoint.test_trtllm import options
from tests.trtllm_double.loader import LoadError, load_checkpoint
from trtkit.checkpoint.trtllm import TrtllmOptions, check_trtllm, trtllm_notes, write_trtllm_checkpoint
from trtkit.checkpoint.trtllm_check import refuse_algo
from trtkit.errors import CheckpointError, UnsupportedError, UsageError
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.scheme import SCHEMES

QWEN25_14B = ModelSpec(
    family="qwen2", layers=48, hidden=5120, heads=40, kv_heads=8, head_dim=128, intermediate=13824, vocab=152064,
    rope=RopeSpec(theta=1e6), norm_eps=1e-6, qkv_bias=True, qk_norm=False, tied=False, max_positions=32768,
    dtype="bfloat16",
)  # fmt: skip
QWEN3_14B = dataclasses.replace(
    QWEN25_14B, family="qwen3", layers=40, intermediate=17408, vocab=151936, qkv_bias=False, qk_norm=True
)
QWEN25_1_5B = dataclasses.replace(
    QWEN25_14B, layers=28, hidden=1536, heads=12, kv_heads=2, intermediate=8960, vocab=151936, tied=True
)


def reasons(spec: ModelSpec, precision: str, choice: TrtllmOptions) -> str:
    """All reasons, one per line; empty when it is accepted."""
    try:
        check_trtllm(spec, SCHEMES[precision], choice)
    except UnsupportedError as problem:
        return "\n".join(problem.offenders)
    return ""


@pytest.mark.parametrize("spec", [QWEN25_14B, QWEN3_14B], ids=["qwen2.5-14b", "qwen3-14b"])
@pytest.mark.parametrize("precision", list(SCHEMES))
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_models_that_this_is_for_fit(spec: ModelSpec, precision: str, tp: int) -> None:
    found = reasons(spec, precision, TrtllmOptions(tensor_parallel=tp))
    if precision == "int4" and tp == 8 and spec is QWEN25_14B:
        assert found.count("13824") == 3, "fc, gate and proj: no multiple of 128 * 8"
    else:
        assert found == ""


@pytest.mark.parametrize(
    ("spec", "precision", "change", "said"),
    [
        (QWEN25_14B, "bf16", {"tensor_parallel": 16}, "40 attention heads do not divide by tensor parallel 16"),
        (QWEN25_14B, "bf16", {"tensor_parallel": 5}, "8 KV heads can neither be split nor repeated over 5"),
        (QWEN25_14B, "bf16", {"pipeline_parallel": 5}, "48 layers do not divide by pipeline parallel 5"),
        (QWEN25_1_5B, "int4", {"tensor_parallel": 4}, "8960 outputs are no multiple of 512"),
        (QWEN25_1_5B, "int8", {"tensor_parallel": 4}, ""),
        (dataclasses.replace(QWEN25_14B, intermediate=13856), "int8", {}, "13856 outputs are no multiple of 64"),
        (dataclasses.replace(QWEN25_14B, intermediate=13832), "fp8", {}, "13832 inputs per rank are no multiple of 16"),
        (dataclasses.replace(QWEN25_14B, intermediate=13832), "bf16", {}, ""),
        (dataclasses.replace(QWEN25_14B, intermediate=13826), "bf16", {"tensor_parallel": 4}, "size 13826 does"),
        (
            dataclasses.replace(QWEN25_14B, rope=RopeSpec(theta=1e6, kind="yarn", factor=4, attention_factor=1.5)),
            "bf16", {}, "attention_factor",
        ),
        (
            dataclasses.replace(QWEN25_14B, rope=RopeSpec(theta=1e6, kind="yarn", factor=4, truncate=False)),
            "bf16", {}, "truncate",
        ),
        (
            dataclasses.replace(QWEN25_14B, rope=RopeSpec(theta=1e6, kind="llama3", factor=8)),
            "bf16", {}, "",
        ),
    ],
)  # fmt: skip
def test_shapes(spec: ModelSpec, precision: str, change: dict[str, int], said: str) -> None:
    found = reasons(spec, precision, TrtllmOptions(**change))
    assert said in found
    assert bool(found) == bool(said)


def test_drafter_reasons_come_together(tmp_path: Path) -> None:
    head = DrafterConfig(hidden_size=66, vocab_size=334, exit_dim=130, num_draft_layers=1)
    save_drafter(Drafter(head), tmp_path, dtype=torch.bfloat16)
    spec = dataclasses.replace(QWEN25_14B, hidden=66, heads=4, kv_heads=4, head_dim=16, intermediate=64, vocab=333,
                               layers=4)  # fmt: skip
    choice = TrtllmOptions(
        tensor_parallel=4, pipeline_parallel=2, drafter=tmp_path, tree=TreeShape(beams=1, length=3)
    )  # fmt: skip
    found = reasons(spec, "bf16", choice).splitlines()
    assert len(found) == 5
    for text, line in zip(
        ("vocabulary is 334, the model's 333", "pipeline parallel 2 with a draft head", "vocabulary 333 does not",
         "exit_dim 130 does not", "hidden size 66 does not"), found, strict=True,
    ):  # fmt: skip
        assert text in line


def test_no_head_in_the_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_trtllm(QWEN25_14B, SCHEMES["bf16"], options(1, head=tmp_path))


def test_a_damaged_head_is_refused_by_tensor(native: Native, head_dirs: dict[str, Path], tmp_path: Path) -> None:
    head = shutil.copytree(head_dirs["rnn"], tmp_path / "head")
    tensors = load_file(head / "model.safetensors")
    tensors["rnn_u.bias"] = tensors["rnn_u.bias"][:100]
    tensors["rnn_w.weight"] = tensors["rnn_w.weight"].to(torch.int8)
    tensors["input_proj.bias"] = tensors.pop("lm_head.1.linear.bias")
    save_file(tensors, head / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        write_trtllm_checkpoint(native("qwen2", "bf16"), tmp_path / "out", options(1, head=head))
    assert caught.value.offenders == (
        "input_proj.bias: not part of such a head",
        "lm_head.1.linear.bias: missing",
        "rnn_u.bias: shape [100], config.json implies [512]",
        "rnn_w.weight: dtype int8, expected a 16- or 32-bit float",
    )


def test_a_head_needs_its_tree() -> None:
    with pytest.raises(UsageError) as caught:
        TrtllmOptions(drafter=Path("head"), tensor_parallel=0)
    assert len(caught.value.offenders) == 2


@pytest.mark.parametrize("algo", ["FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_TENSOR_PLUGIN"])
def test_qwen3_trap_is_named(algo: str) -> None:
    assert "no q/k norm" in refuse_algo(algo, "qwen3")
    assert "not a precision" in refuse_algo(algo, "qwen2")
    assert refuse_algo("W8A8_SQ_PER_CHANNEL", "qwen3") == "", "swaps linears only"


def test_refused_before_anything_is_written(native: Native, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="tensor parallel 16"):
        write_trtllm_checkpoint(native("qwen2", "bf16"), tmp_path / "out", options(16))
    assert list(tmp_path.iterdir()) == []


def test_notes_say_what_differs(tmp_path: Path) -> None:
    fp8_keys = dataclasses.replace(SCHEMES["int8"], kv_dtype="fp8")
    notes = trtllm_notes(QWEN25_14B, fp8_keys, TrtllmOptions(tensor_parallel=2))
    said = " ".join(notes)
    for text in ("each rank's share of o_proj and down_proj anew", "one cache scale per layer", "qkv bias"):
        assert text in said
    assert "qkv bias" not in " ".join(trtllm_notes(QWEN3_14B, fp8_keys, TrtllmOptions()))
    float16 = trtllm_notes(QWEN25_14B, SCHEMES["fp8"], TrtllmOptions(dtype="float16"))
    assert float16 == ("bfloat16 tensors are written as float16",)
    drafting = TrtllmOptions(drafter=tmp_path, tree=TreeShape(beams=1, length=3))
    assert "upstream has never shipped it" in trtllm_notes(QWEN3_14B, SCHEMES["fp8"], drafting)[0]
    assert trtllm_notes(QWEN25_14B, SCHEMES["fp8"], drafting) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_length": ...}, "seq_length: missing"),
        ({"qwen_type": ...}, "qwen_type: missing"),
        ({"use_fused_mlp": True}, "use_fused_mlp: unknown key"),
        ({"attn_bias": False}, "attn_bias"),
        ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "mamba": 1}}, "mamba: unknown key"),
        ({"quantization": {"quant_algo": "W8A16", "kv_cache_quant_algo": None, "exclude_modules": []}}, "exclude_mod"),
    ],
)
def test_the_double_is_strict(native: Native, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write_trtllm_checkpoint(native("qwen2", "bf16"), tmp_path / "out", options(1))
    path = tmp_path / "out" / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}, default=str))
    with pytest.raises(LoadError, match=said):
        load_checkpoint(tmp_path / "out")


def test_the_double_is_strict_about_tensors(native: Native, tmp_path: Path) -> None:
    write_trtllm_checkpoint(native("qwen2", "int4"), tmp_path / "out", options(2))
    path = tmp_path / "out" / "rank1.safetensors"
    tensors = load_file(path)
    prefix = "transformer.layers.0"
    tensors[f"{prefix}.mlp.fc.weight"] = tensors[f"{prefix}.mlp.fc.weight"].view(torch.uint8)
    scale = f"{prefix}.attention.dense.weights_scaling_factor"
    tensors[scale] = tensors[scale].T.contiguous()
    prequant = f"{prefix}.mlp.gate.prequant_scaling_factor"
    tensors[prequant] = tensors[prequant].float()
    tensors["transformer.layers.0.mlp.router.weight"] = torch.zeros(1)
    del tensors["lm_head.weight"]
    tensors["transformer.ln_f.weight"][3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(LoadError) as caught:
        load_checkpoint(tmp_path / "out")
    assert len(caught.value.problems) == 6
