"""What a narrower dtype cannot hold is refused, wherever weights change theirs: never Inf without a word."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from drafter.checkpoint import DrafterError, load_drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.model import Drafter
from tests.checkpoint.conftest import Native
from tests.engines import tiny_engine_dir
from tests.quant.test_calibrate import ROWS
from tests.tiny import save_tiny
from trtkit.checkpoint.convert import convert
from trtkit.checkpoint.hf import EMBEDDING, check_finite, narrow, open_source
from trtkit.checkpoint.shards import Shards, open_shards
from trtkit.checkpoint.trtllm import write_trtllm_checkpoint
from trtkit.checkpoint.trtllm_config import TrtllmOptions
from trtkit.checkpoint.unified import open_unified
from trtkit.checkpoint.unified_export import write_unified_hf
from trtkit.errors import CheckpointError
from trtkit.quant.calibrate import CalibrationOptions, Calibrator, DataFree, LayerwiseCalibrator
from trtkit.quant.tensor import quantize_int4, quantize_int8
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.model import DecoderModel
from trtkit.scheme import SCHEMES
from trtkit.staging import staged_dir

UP = "model.layers.0.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
NORM = "model.layers.0.input_layernorm.weight"


def overwrite(directory: Path, value: float, *names: str) -> Path:
    """The last value of each of these tensors becomes ``value``."""
    shards: Shards = open_shards(directory)[0]
    for name in names:
        entry = shards.entries[name]
        with entry.path.open("r+b") as stream:
            stream.seek(entry.offset + entry.nbytes - entry.dtype.itemsize)
            stream.write(torch.tensor([value], dtype=entry.dtype).view(torch.uint8).numpy().tobytes())
    return directory


def said_to_be(directory: Path, dtype: str) -> Path:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "dtype": dtype}
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_wider_files_than_the_config_says(tmp_path: Path, precision: str) -> None:
    directory = said_to_be(save_tiny(tmp_path / "source"), "float16")
    overwrite(directory, 65504.0, EMBEDDING, UP)
    check_finite(open_source(directory))
    overwrite(directory, -7e4, EMBEDDING, UP, BIAS)
    with pytest.raises(CheckpointError, match="not finite") as caught, staged_dir(tmp_path / "out") as stage:
        convert(open_source(directory), stage, SCHEMES[precision], DataFree(), pre_scale=False)
    assert caught.value.offenders == tuple(
        f"{name}: 1 value(s) are NaN or Inf in float16, the dtype of config.json; the file has float32"
        for name in (EMBEDDING, BIAS, UP)
    )
    assert not (tmp_path / "out").exists()
    check_finite(open_source(said_to_be(directory, "bfloat16")))


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float32", False)])
def test_rounding_to_the_dtype_of_the_config_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, told: bool
) -> None:
    directory = said_to_be(save_tiny(tmp_path / "source"), dtype)
    with caplog.at_level(logging.WARNING, "trtkit"), staged_dir(tmp_path / "out") as stage:
        convert(open_source(directory), stage, SCHEMES["bf16"], DataFree(), pre_scale=False)
    assert ("tensors are stored in float32 and rounded to bfloat16" in caplog.text) == told
    assert ("rounded" in caplog.text) == told


@pytest.mark.parametrize("precision", ["int8", "int8-sq", "int4"])
def test_codes_of_wider_files_belong_to_the_scales_as_they_are_stored(tmp_path: Path, precision: str) -> None:
    """The scales were rounded to the dtype of config.json only after the weights had been divided by them."""
    directory = said_to_be(save_tiny(tmp_path / "source"), "bfloat16")
    source, scheme = open_source(directory), SCHEMES[precision]
    calibrated = precision != "int8"
    calibrator: Calibrator = DataFree()
    if calibrated:
        options = CalibrationOptions(int4_clip=False)
        calibrator = LayerwiseCalibrator(source.spec, scheme, ROWS, source.shards.tensor(EMBEDDING), options=options)
    with staged_dir(tmp_path / "out") as stage:
        convert(source, stage, scheme, calibrator, pre_scale=calibrated)
    weight, built = source.shards.tensor(UP), open_unified(tmp_path / "out").part(0, "mlp.up_proj")
    if built.pre_scale is not None:
        assert built.pre_scale.dtype == torch.bfloat16
        weight = weight / built.pre_scale.float()
    wanted = quantize_int4(weight) if precision == "int4" else quantize_int8(weight, steps=127 if calibrated else 128)
    assert torch.equal(built.weight.data, wanted.data)
    assert built.weight.scale is not None
    assert wanted.scale is not None
    kept = wanted.scale if calibrated else wanted.scale.bfloat16().float()
    assert torch.equal(built.weight.scale, kept)


def test_what_float16_ends_at() -> None:
    held = torch.tensor([65504.0, -65519.0, 1e-9])
    assert narrow(held, torch.float16, "w").tolist() == [65504.0, -65504.0, 0.0]
    for wrong, said in ((65520.0, "float16 cannot represent"), (float("nan"), "NaN or Inf")):
        with pytest.raises(CheckpointError, match=said):
            narrow(torch.tensor([1.0, wrong]), torch.float16, "w")
    with pytest.raises(CheckpointError, match="bfloat16 cannot represent"):
        narrow(torch.tensor([3.4e38]), torch.bfloat16, "w")
    assert narrow(torch.empty(0), torch.float16, "w").shape == (0,)


def test_a_norm_that_takes_up_a_scale_beyond_float16_is_refused(native: Native, tmp_path: Path) -> None:
    directory = tmp_path / "engine"
    shutil.copytree(native("qwen2", "int4", dtype=torch.float16), directory)
    overwrite(directory, 6e4, NORM)
    scales = [f"model.layers.0.self_attn.{part}_proj.pre_quant_scale" for part in "qkv"]
    overwrite(directory, 2.0, *scales)
    with pytest.raises(CheckpointError, match="float16 cannot represent") as caught:
        write_unified_hf(directory, tmp_path / "out")
    assert NORM in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_export_in_float16(native: Native, tmp_path: Path, value: float) -> None:
    directory = tmp_path / "engine"
    shutil.copytree(native("qwen2", "bf16"), directory)
    overwrite(directory, value, NORM)
    with pytest.raises(CheckpointError, match="NaN or Inf" if value != value else "float16 cannot represent"):
        write_trtllm_checkpoint(directory, tmp_path / "out", TrtllmOptions(dtype="float16"))
    if value == value:
        write_trtllm_checkpoint(directory, tmp_path / "out", TrtllmOptions())
        return
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        write_trtllm_checkpoint(directory, tmp_path / "out", TrtllmOptions())


@pytest.mark.parametrize("name", [EMBEDDING, UP, BIAS, "lm_head.weight"])
def test_an_engine_that_float16_cannot_run(tmp_path: Path, name: str) -> None:
    directory = overwrite(tiny_engine_dir(tmp_path, dtype=torch.bfloat16), 1e5, name)
    open_engine(directory, OpenOptions(device="cpu")).close()
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        open_engine(directory, OpenOptions(device="cpu", dtype="float16"))


def test_int4_codes_whose_product_with_their_scale_float16_cannot_hold(native: Native, tmp_path: Path) -> None:
    directory = tmp_path / "engine"
    shutil.copytree(native("qwen2", "int4-rtn"), directory)
    overwrite(directory, 6e4, UP + "_scale")
    DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.bfloat16, max_tokens=8)
    with pytest.raises(CheckpointError, match="float16 cannot represent"):
        DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float16, max_tokens=8)


def test_a_draft_head_that_float16_cannot_run(tmp_path: Path) -> None:
    head = Drafter(DrafterConfig(hidden_size=8, vocab_size=16, exit_dim=16))
    with torch.no_grad():
        next(head.parameters()).fill_(1e5)
    save_drafter(head, tmp_path, dtype=torch.float32)
    load_drafter(tmp_path, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.raises(DrafterError, match="not finite in float16"):
        load_drafter(tmp_path, dtype=torch.float16, device=torch.device("cpu"))
