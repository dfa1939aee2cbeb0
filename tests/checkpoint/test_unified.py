"""The unified layout: names, dtypes and shapes (golden), and the round trip through the reader."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant.test_calibrate import ROWS
from tests.tiny import save_tiny
from trtkit.checkpoint.convert import check_alignment, convert
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, open_source
from trtkit.checkpoint.quality import measure_quality
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.checkpoint.verify import relative_error
from trtkit.decoder import LINEAR_PARTS, LinearName
from trtkit.errors import CheckpointError, UnsupportedError
from trtkit.quant.calibrate import CalibrationOptions, DataFree, LayerwiseCalibrator
from trtkit.quant.group import effective_weight
from trtkit.quant.tensor import dequantize
from trtkit.scheme import SCHEMES

GOLDEN = Path(__file__).parents[1] / "golden" / "unified_tensors.json"
ERRORS = {"bf16": 0.0, "int8": 0.02, "int8-sq": 0.05, "fp8": 0.04, "fp8+kv": 0.04, "int4": 0.25, "int4-rtn": 0.15}
"""Kind of checkpoint -> largest relative weight error on random normal weights."""
KINDS = list(ERRORS)


def built(source: HfCheckpoint, out: Path, kind: str) -> UnifiedCheckpoint:
    """Convert ``source`` the way ``kind`` says."""
    name = kind.split("+")[0].removesuffix("-rtn")
    scheme = dataclasses.replace(SCHEMES[name], kv_dtype="fp8" if kind.endswith("+kv") else "model")
    calibrator = (
        LayerwiseCalibrator(source.spec, scheme, ROWS, source.shards.tensor(EMBEDDING), options=CalibrationOptions())
        if kind in ("int8-sq", "fp8", "fp8+kv", "int4")
        else DataFree()
    )
    out.mkdir(parents=True)
    convert(source, out, scheme, calibrator, pre_scale=kind in ("int8-sq", "int4"))
    return open_unified(out)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_match_the_golden_list(tmp_path: Path, kind: str) -> None:
    # To renew after a wanted change of the format: delete the file, run the test twice, read the diff.
    source = open_source(save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16, num_hidden_layers=1))
    checkpoint = built(source, tmp_path / "out", kind)
    found = {
        name: [str(entry.dtype).removeprefix("torch."), list(entry.shape)]
        for name, entry in sorted(checkpoint.shards.entries.items())
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if kind not in golden:
        lines = [f'"{key}": {json.dumps(golden.get(key, found if key == kind else None))}' for key in KINDS
                 if key in golden or key == kind]  # fmt: skip
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        pytest.fail("the golden list was missing and has been written")
    assert found == golden[kind]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_error_bounds(tmp_path: Path, family: str, kind: str) -> None:
    source = open_source(
        save_tiny(tmp_path / "source", family, dtype=torch.bfloat16, tie_word_embeddings=family == "qwen3")
    )
    checkpoint = built(source, tmp_path / "out", kind)
    assert checkpoint.spec == source.spec
    assert checkpoint.scheme.name == kind.split("+")[0].removesuffix("-rtn")
    assert checkpoint.kv_scales(0) == ((1.0, 1.0) if kind == "fp8+kv" else None)
    for layer, part in itertools.product(range(source.spec.layers), source.spec.linear_shapes):
        linear = checkpoint.part(layer, part)
        rounded = effective_weight(linear, dequantize(linear.weight))
        assert relative_error(source.part(layer, part).weight.data, rounded) <= ERRORS[kind]
    name: LinearName
    for name, parts in LINEAR_PARTS.items():
        fused = checkpoint.linear(1, name)
        singles = [dequantize(checkpoint.part(1, part).weight) for part in parts]
        assert torch.equal(dequantize(fused.weight), torch.cat(singles))
        assert (fused.bias is not None) == (name == "qkv" and family == "qwen2")
    assert torch.equal(checkpoint.embedding(), source.shards.tensor(EMBEDDING))
    assert checkpoint.lm_head().shape == (320, 256)
    assert (checkpoint.norms(0).q is not None) == (family == "qwen3")


def test_quality_tells_the_formats_apart(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source", "qwen3", dtype=torch.bfloat16))
    kl = {}
    for kind in KINDS:
        quality = measure_quality(source, built(source, tmp_path / kind, kind), ROWS)
        kl[kind] = quality.kl_mean
        assert quality.tokens == sum(len(row.tokens) - 1 for row in ROWS)
        assert 0 <= quality.top1_agreement <= 1
        assert list(quality.worst_tensors) == sorted(quality.worst_tensors, key=lambda pair: -pair[1])
    assert kl["bf16"] < 1e-6
    assert kl["bf16"] < kl["int8"] < kl["fp8"] < kl["int4-rtn"]


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    source = open_source(save_tiny(tmp_path / "source", "qwen2"))
    quality = measure_quality(source, built(source, tmp_path / "out", "bf16"), ROWS)
    model, losses = tiny_model("qwen2"), []
    with torch.no_grad():
        for row in ROWS:
            tokens = torch.tensor([row.tokens])
            losses.append(
                torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
            )
    assert quality.perplexity_bf16 == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert quality.perplexity == pytest.approx(quality.perplexity_bf16, rel=1e-5)


def test_the_quality_is_that_of_the_output_layer_that_will_run(tmp_path: Path) -> None:
    """Nothing but lm_head differs here: transformers with the rounded matrix in its place says what it costs."""
    from tests.reference.quantizers import int8_rows
    from tests.tiny import tiny_model

    source = open_source(save_tiny(tmp_path / "source", "qwen2"))
    checkpoint = built(source, tmp_path / "out", "bf16")
    quality = measure_quality(source, checkpoint, ROWS, output_layer="int8")
    model = tiny_model("qwen2")
    weight = model.lm_head.weight.detach().clone()
    codes, scales = int8_rows(weight.tolist(), 128)
    rounded = torch.tensor(codes).float() * torch.tensor(scales)[:, None]
    kl, losses = [], []
    with torch.no_grad():
        for row in ROWS:
            hidden = model.model(torch.tensor([row.tokens])).last_hidden_state[0, :-1].double()
            expected, found = ((hidden @ head.double().T).log_softmax(1) for head in (weight, rounded))
            kl.append((expected.exp() * (expected - found)).sum(1))
            losses.append(torch.nn.functional.nll_loss(found, torch.tensor(row.tokens[1:]), reduction="none"))
    assert float(torch.cat(kl).mean()) > 1e-6
    assert quality.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=0.02)
    assert quality.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    error = float((weight - rounded).norm() / weight.norm())
    assert quality.worst_tensors[0] == ("lm_head", pytest.approx(error, rel=1e-4))
    plain = measure_quality(source, checkpoint, ROWS)
    assert plain.kl_mean < 1e-6
    assert "lm_head" not in dict(plain.worst_tensors)


def test_config_keeps_what_the_source_said_and_names_the_quantization(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "my_key": 7}))
    built(open_source(tmp_path / "source"), tmp_path / "out", "int4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["my_key"] == 7
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["quantization_config"]["quant_method"] == "modelopt"
    quant = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert quant["producer"]["name"] == "trtkit"
    assert quant["quantization"] == {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False,
        "pre_quant_scale": True, "exclude_modules": ["lm_head", "model.embed_tokens"],
    }  # fmt: skip
    (tmp_path / "out" / "hf_quant_config.json").unlink()
    assert open_unified(tmp_path / "out").scheme.name == "int4", "config.json alone says it too"


def test_damaged_quantized_checkpoint(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16))
    built(source, tmp_path / "out", "fp8")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj"
    del tensors[f"{name}.input_scale"]
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        open_unified(tmp_path / "out")
    assert caught.value.offenders == (
        f"{name}.weight: dtype float32, expected float8_e4m3fn", f"{name}.input_scale: missing",
    )  # fmt: skip


@pytest.mark.parametrize("unequal", [("weight_scale", "input_scale"), ("weight_scale",), ("input_scale",)])
def test_unequal_fp8_scales_of_others_are_united(tmp_path: Path, unequal: tuple[str, ...]) -> None:
    source = open_source(save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16))
    built(source, tmp_path / "out", "fp8")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.k_proj"
    for scale in unequal:
        tensors[f"{name}.{scale}"] *= {"weight_scale": 0.5, "input_scale": 2}[scale]
    save_file(tensors, path)
    checkpoint = open_unified(tmp_path / "out")
    fused = checkpoint.linear(0, "qkv")
    apart = torch.cat([dequantize(checkpoint.part(0, part).weight) for part in LINEAR_PARTS["qkv"]])
    assert (dequantize(fused.weight) - apart).norm() / apart.norm() < 0.04
    assert fused.input_scale == tensors[f"{name}.input_scale"]


def test_products_whose_parts_disagree_are_refused(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source", "qwen2", dtype=torch.bfloat16))
    built(source, tmp_path / "out", "int4")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.pre_quant_scale"] *= 2
    del tensors["model.layers.0.self_attn.q_proj.pre_quant_scale"]
    del tensors["model.layers.1.self_attn.k_proj.pre_quant_scale"]
    save_file(tensors, path)
    checkpoint = open_unified(tmp_path / "out")
    wrong: tuple[tuple[int, LinearName], ...] = ((0, "gate_up"), (0, "qkv"), (1, "qkv"))
    for layer, product in wrong:
        with pytest.raises(CheckpointError, match="different pre_quant_scales"):
            checkpoint.linear(layer, product)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"group_size": 64}, "groups of 128"),
        ({"has_zero_point": True}, "groups of 128"),
        ({"kv_cache_quant_algo": "NF4"}, "NF4"),
        ({"quant_algo": ["FP8"], "kv_cache_quant_algo": {}}, r"quant_algo \['FP8'\]"),
    ],
)
def test_unknown_quantizations_are_refused_by_name(tmp_path: Path, change: dict[str, object], message: str) -> None:
    built(open_source(save_tiny(tmp_path / "source", "qwen2")), tmp_path / "out", "int4-rtn")
    path = tmp_path / "out" / "hf_quant_config.json"
    data = json.loads(path.read_text())
    data["quantization"] |= change
    path.write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match=message):
        open_unified(tmp_path / "out")


def test_int4_alignment_lists_every_linear(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path, hidden_size=192, intermediate_size=320))
    with pytest.raises(UnsupportedError) as caught:
        check_alignment(source.spec, SCHEMES["int4"])
    assert len(caught.value.offenders) == 6  # all but o_proj, whose inputs are 4 heads x 64
    check_alignment(source.spec, SCHEMES["int8"])
