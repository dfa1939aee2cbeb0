"""The export that vLLM and transformers read, held against compressed-tensors' own code and a plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint.conftest import Native
from trtkit.checkpoint.compressed_export import _packed, write_compressed
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.cli.app import run
from trtkit.errors import CheckpointError, UnsupportedError
from trtkit.quant.tensor import dequantize

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip
TOKENS = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(5))


def plain_model(native: UnifiedCheckpoint) -> Any:
    """A model of transformers with the matrices that the native checkpoint stands for, input scales multiplied in."""
    config = AutoConfig.from_pretrained(native.directory)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: native.shards.tensor(name).float() for name in native.shards.entries if name in model.state_dict()}
    for layer in range(native.spec.layers):
        for part in PARTS:
            linear = native.part(layer, part)
            scale = 1.0 if linear.pre_scale is None else linear.pre_scale.float()
            weights[f"model.layers.{layer}.{part}.weight"] = dequantize(linear.weight) * scale
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert [name for name in missing if not (native.spec.tied and name == "lm_head.weight")] == []
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "kind", "tolerance"),
    [
        ("qwen2", "int8", 1e-5),
        ("qwen3", "int8", 1e-5),
        ("qwen2", "int4-rtn", 0.015),  # scales in bf16
        ("qwen2", "int4", 0.02),  # and norms, and o_proj in 8 bits
        ("qwen3", "int4", 0.02),
    ],
)
def test_transformers_computes_what_the_engine_stands_for(
    native: Native, tmp_path: Path, family: str, kind: str, tolerance: float
) -> None:
    """Loaded by its own reader of this format."""
    directory = native(family, kind, num_hidden_layers=2)
    write_compressed(directory, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        made, wanted = loaded(TOKENS).logits, plain_model(open_unified(directory))(TOKENS).logits
    error = float((made - wanted).norm() / wanted.norm())
    assert error < tolerance


@pytest.mark.filterwarnings("ignore")
def test_smoothquant_weights_and_activations(native: Native, tmp_path: Path) -> None:
    """The weights alone are close; transformers, which rounds activations to 8 bits, too, is not far."""
    directory = native("qwen2", "int8-sq", num_hidden_layers=2)
    write_compressed(directory, tmp_path / "out")
    with torch.no_grad():
        model = plain_model(open_unified(directory))
        wanted = model(TOKENS).logits
        stored = {name: value.float() for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
        scales = {name.removesuffix("_scale"): value for name, value in stored.items() if name.endswith("weight_scale")}
        dense = {name: value * scales.get(name, 1.0) for name, value in stored.items() if name in model.state_dict()}
        model.load_state_dict(dense, strict=False)
        weights_alone = model(TOKENS).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        rounded = loaded(TOKENS).logits
    assert float((weights_alone - wanted).norm() / wanted.norm()) < 0.02
    assert 0.005 < float((rounded - weights_alone).norm() / wanted.norm()) < 0.1, "activations are rounded there"


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_their_library_packs_them(bits: int) -> None:
    least = -(1 << (bits - 1))
    codes = torch.randint(least, -least, (6, 64), dtype=torch.int8)
    codes[0, :2] = torch.tensor([least, -least - 1])
    assert torch.equal(_packed(codes, bits), pack_to_int32(codes, bits))


def test_what_is_written(native: Native, tmp_path: Path) -> None:
    """Names, dtypes and shapes; no scale is lost, and nothing of trtkit's own goes along."""
    directory = native("qwen2", "int4")
    digests = write_compressed(directory, tmp_path / "out")
    assert sorted(digests) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    made = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0."
    told = {name.removeprefix(prefix): (entry.dtype, tuple(entry.shape)) for name, entry in made.items()}
    assert told["mlp.up_proj.weight_packed"] == (torch.int32, (1024, 64))
    assert told["mlp.up_proj.weight_scale"] == (torch.bfloat16, (1024, 4))
    assert told["self_attn.o_proj.weight_packed"] == (torch.int32, (512, 128)), "8 bits: its scale is rounded in"
    assert told["self_attn.o_proj.weight_scale"] == (torch.bfloat16, (512, 1))
    assert made[f"{prefix}mlp.down_proj.weight_shape"].tolist() == [512, 1024]
    assert not [name for name in made if "pre_quant_scale" in name or "input_scale" in name]
    assert torch.equal(made[f"{prefix}self_attn.q_proj.bias"], open_unified(directory).part(0, PARTS[0]).bias)
    codes = unpack_from_int32(made[f"{prefix}mlp.down_proj.weight_packed"], 4, torch.Size((512, 1024)))
    linear = open_unified(directory).part(0, "mlp.down_proj")
    assert linear.weight.scale is not None
    scales = linear.weight.scale.repeat_interleave(128, dim=1)
    assert torch.equal(codes.float() * scales, dequantize(linear.weight)), "down_proj keeps its codes"


@pytest.mark.parametrize(
    ("kind", "groups", "token"),
    [
        ("int8", {"Linear": (8, "channel")}, False),
        ("int8-sq", {"Linear": (8, "channel")}, True),
        ("int4-rtn", {"Linear": (4, "group")}, False),
        ("int4", {"Linear": (4, "group"), "re:.*o_proj$": (8, "channel")}, False),
    ],
)
def test_the_config_says_how(
    native: Native, tmp_path: Path, kind: str, groups: dict[str, tuple[int, str]], token: bool
) -> None:
    write_compressed(native("qwen2", kind), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == ("int-quantized" if token else "pack-quantized")
    found = {group["targets"][0]: group for group in config["config_groups"].values()}
    assert {name: (it["weights"]["num_bits"], it["weights"]["strategy"]) for name, it in found.items()} == groups
    activations = found["Linear"]["input_activations"]
    assert (activations is not None and activations["strategy"] == "token" and activations["dynamic"]) == token


@pytest.mark.parametrize(
    ("part", "factor", "said"), [("mlp.up_proj", 2, "different"), ("mlp.down_proj", 0, "no kernel")]
)
def test_scales_that_cannot_be_folded_are_refused(
    native: Native, tmp_path: Path, part: str, factor: int, said: str
) -> None:
    directory = shutil.copytree(native("qwen2", "int8-sq"), tmp_path / "engine")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"model.layers.0.{part}.pre_quant_scale"] *= factor
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        write_compressed(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_what_servers_read_as_it_is_needs_no_export(native: Native, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedError, match="need no such export") as caught:
        write_compressed(native("qwen2", kind), tmp_path / "out")
    assert "as it is" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("int8", ()),
        ("int4", ("o_proj is rounded once more",)),
        ("int8-sq", ("o_proj is rounded once more", "per token")),
        ("int4-rtn+fp8", ("--kv-cache-dtype fp8",)),
    ],
)
def test_the_command_says_what_is_not_as_in_the_engine(
    native: Native, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, notes: tuple[str, ...]
) -> None:
    source, out = str(native("qwen2", kind)), str(tmp_path / "out")
    command = ["export", source, "--format", "compressed-tensors", "--out", out, "--json"]
    assert run(command) == 0
    shown = capsys.readouterr().out.splitlines()
    document = json.loads(shown[-1])
    assert shown[-2] == f"next: on the GPU host: vllm serve {out}"
    assert len(document["notes"]) == len(notes)
    assert all(said in note for said, note in zip(notes, document["notes"], strict=True))
    assert run(command) == 1, "it is there already"
    assert run([*command, "--force"]) == 0, "an export may be replaced"
    capsys.readouterr()


def test_force_replaces_no_checkpoint_of_somebody_else(
    native: Native, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    write_compressed(native("qwen2", "int8"), other)
    config = json.loads((other / "config.json").read_text())
    del config["exported_by"]
    (other / "config.json").write_text(json.dumps(config))
    source = str(native("qwen2", "int8"))
    assert run(["export", source, "--format", "compressed-tensors", "--out", str(other), "--force"]) == 1
    assert "is not an export" in capsys.readouterr().err
    assert (other / "model.safetensors").is_file()


def test_it_is_no_engine_any_more(native: Native, tmp_path: Path) -> None:
    write_compressed(native("qwen2", "int8"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="'compressed-tensors' are not read"):
        open_unified(tmp_path / "out")
