"""The export for the PyTorch backend: the same function as the native checkpoint, in the form its loader reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.conftest import Native
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.checkpoint.unified_export import write_unified_hf
from trtkit.cli.app import run
from trtkit.decoder import rms_norm
from trtkit.errors import CheckpointError, UnsupportedError
from trtkit.quant.tensor import linear_reference

NORM_OF = {"qkv": "input", "gate_up": "post"}


def behind_norm(checkpoint: UnifiedCheckpoint, product: str, hidden: torch.Tensor) -> torch.Tensor:
    """Norm and product together: what folding must keep."""
    norms = checkpoint.norms(0)
    normed = rms_norm(hidden, getattr(norms, NORM_OF[product]), checkpoint.spec.norm_eps)
    return linear_reference(normed, checkpoint.linear(0, product))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int4", torch.bfloat16), ("int4-rtn", torch.bfloat16), ("int4-rtn", torch.float16)]
)
def test_int4_pre_scales_are_where_the_loader_looks(
    native: Native, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    write_unified_hf(native("qwen2", kind, dtype=dtype), tmp_path / "out")
    ours, theirs = open_unified(native("qwen2", kind, dtype=dtype)), open_unified(tmp_path / "out")
    with_scale = {name for name in theirs.shards.entries if name.endswith("pre_quant_scale")}
    prefix = "model.layers.0."
    assert with_scale == {f"{prefix}self_attn.o_proj.pre_quant_scale", f"{prefix}mlp.down_proj.pre_quant_scale"}
    hidden = torch.randn(40, 512)
    for product in NORM_OF:
        wanted, made = behind_norm(ours, product, hidden), behind_norm(theirs, product, hidden)
        # The product of norm and scale is rounded to bf16, once.
        assert float((made - wanted).norm() / wanted.norm()) < 0.004
    scale = theirs.shards.tensor(f"{prefix}self_attn.o_proj.pre_quant_scale")
    if kind == "int4-rtn":
        assert bool((scale == 1).all())
    else:
        assert torch.equal(scale, ours.shards.tensor(f"{prefix}self_attn.o_proj.pre_quant_scale"))
    quant = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert quant["pre_quant_scale"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["pre_quant_scale"] is True


@pytest.mark.parametrize(
    ("part", "factor", "said"),
    [
        ("mlp.up_proj", 2, "different pre_quant_scales"), ("self_attn.v_proj", 2, "different pre_quant_scales"),
        ("mlp.down_proj", 0, "no kernel can use"),
    ],
)  # fmt: skip
def test_scales_that_no_norm_can_take_up_are_refused(
    native: Native, tmp_path: Path, part: str, factor: int, said: str
) -> None:
    directory = shutil.copytree(native("qwen2", "int4"), tmp_path / "engine")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.0.{part}.pre_quant_scale"] *= factor
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        write_unified_hf(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "kind"), [("qwen2", "bf16"), ("qwen2", "fp8+fp8"), ("qwen3", "int8")])
def test_other_formats_are_the_native_tensors(native: Native, tmp_path: Path, family: str, kind: str) -> None:
    directory = native(family, kind)
    digests = write_unified_hf(directory, tmp_path / "out")
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "out").iterdir())
    ours, theirs = open_unified(directory), open_unified(tmp_path / "out")
    assert theirs.spec == ours.spec
    assert theirs.scheme == ours.scheme
    assert theirs.shards.entries.keys() == ours.shards.entries.keys()
    for name, entry in ours.shards.entries.items():
        assert theirs.shards.entries[name].dtype == entry.dtype
        assert torch.equal(theirs.shards.tensor(name).float(), ours.shards.tensor(name).float())
    assert (tmp_path / "out" / "hf_quant_config.json").is_file() == (kind != "bf16")


def test_floats_of_another_width_become_those_of_the_layout(native: Native, tmp_path: Path) -> None:
    """Other writers keep scales in 16 bits, or norms in 32; nothing of their values is lost or added."""
    directory = shutil.copytree(native("qwen2", "fp8"), tmp_path / "engine")
    tensors = load_file(directory / "model.safetensors")
    norm, scale = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight_scale"
    tensors[norm], tensors[scale] = tensors[norm].float(), tensors[scale].bfloat16()
    save_file(tensors, directory / "model.safetensors")
    write_unified_hf(directory, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert (made[norm].dtype, made[scale].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(made[norm].float(), tensors[norm])
    assert torch.equal(made[scale], tensors[scale].float())


def quantization_as_read(directory: Path) -> tuple[str, str | None] | None:
    """(weights, KV cache) by the rules of TensorRT-LLM's loader; None is a checkpoint that is not quantized.

    ``_update_from_hf_quant_config`` in llmapi/llm_utils.py raises for a quantization file without ``quant_algo``; newer
    releases compare it with config.json, read in the flat form (``_read_flat`` in quantization/modelopt_config.py).
    """
    inline = json.loads((directory / "config.json").read_text()).get("quantization_config")
    if not (directory / "hf_quant_config.json").is_file():
        assert inline is None
        return None
    nested = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    assert nested["quant_algo"] is not None, "the loader raises"
    scheme = inline.get("kv_cache_scheme", {})
    assert nested["quant_algo"] == inline["quant_algo"]
    assert nested.get("group_size") == inline.get("group_size")
    assert nested["exclude_modules"] == inline["ignore"]
    assert nested["kv_cache_quant_algo"] == (
        "FP8" if (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) else None
    )
    return nested["quant_algo"], nested["kv_cache_quant_algo"]


@pytest.mark.parametrize(
    ("family", "kind", "read"),
    [
        ("qwen2", "fp8", ("FP8", None)), ("qwen2", "fp8+fp8", ("FP8", "FP8")),
        ("qwen2", "int4+fp8", ("W4A16_AWQ", "FP8")),
        ("qwen3", "int8", ("W8A16", None)), ("qwen2", "bf16", None), ("qwen2", "bf16+fp8", None),
    ],
)  # fmt: skip
def test_the_loader_understands_the_quantization(
    native: Native, tmp_path: Path, family: str, kind: str, read: tuple[str, str | None] | None
) -> None:
    write_unified_hf(native(family, kind), tmp_path / "out")
    assert quantization_as_read(tmp_path / "out") == read
    made = open_unified(tmp_path / "out")
    with_scales = any(name.endswith(("k_scale", "v_scale")) for name in made.shards.entries)
    assert with_scales == (read is not None and read[1] is not None)


@pytest.mark.parametrize(("kind", "said"), [("fp8", ""), ("fp8+fp8", "scale 1"), ("bf16+fp8", "{dtype: fp8}")])
def test_what_is_different_about_an_fp8_cache_is_said(
    native: Native, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str
) -> None:
    source, out = str(native("qwen2", kind)), str(tmp_path / "out")
    assert run(["export", source, "--format", "unified-hf", "--out", out, "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    notes = json.loads(shown[-1])["notes"]
    assert len(notes) == (1 if said else 0)
    assert all(said in note and f"note: {note}" in shown for note in notes)


def test_nothing_of_trtkits_own_goes_along(native: Native, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    (engine / "drafter").mkdir(parents=True)
    for path in native("qwen2", "bf16").iterdir():
        (engine / path.name).symlink_to(path)
    for name in ("engine.json", "calibration.jsonl", "drafter/config.json", "tokenizer.json", "chat_template.jinja"):
        (engine / name).write_text("{}")
    write_unified_hf(engine, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [
        ("qwen2", "int8", "leaves the bias out"),
        ("qwen2", "int8-sq", "no such linear"),
        ("qwen2", "fp8+int8", "int8 KV cache"),
    ],
)
def test_what_that_backend_cannot_run(native: Native, tmp_path: Path, family: str, kind: str, said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        write_unified_hf(native(family, kind), tmp_path / "out")
    assert said in caught.value.offenders[0]
    assert not (tmp_path / "out").exists()
