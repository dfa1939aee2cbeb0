from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig
from drafter.model import Drafter
from tests.engines import tiny_engine_dir
from tests.tiny import save_tiny
from trtkit.checkpoint.convert import convert
from trtkit.checkpoint.hf import open_source
from trtkit.describe import BUNDLE, CHECKPOINT, DIFFICULTY, DRAFTER, ENGINE, FOREIGN, QUANTIZED, RUN, describe
from trtkit.errors import CheckpointError, InputError, TrtkitError, UsageError
from trtkit.files import digest_file, read_json, write_json
from trtkit.quant.calibrate import DataFree
from trtkit.recipe import BUNDLE_FILE, ENGINE_FILE
from trtkit.scheme import SCHEMES
from trtkit.staging import staged_dir


def test_a_checkpoint(tmp_path: Path) -> None:
    found = describe(save_tiny(tmp_path, "qwen3"), verify=True)
    assert found.kind == CHECKPOINT
    assert "qwen3" in found.facts["architecture"]
    assert found.data["weights"]["tensors"] > 10
    assert found.verified is True
    assert found.offenders == ()


def test_an_engine_and_its_digests(tmp_path: Path) -> None:
    directory = tiny_engine_dir(tmp_path)
    manifest = read_json(directory / ENGINE_FILE)
    manifest["checkpoint_digest"] = {"model.safetensors": digest_file(directory / "model.safetensors")}
    write_json(directory / ENGINE_FILE, manifest)
    assert describe(directory, verify=True).verified is True
    weights = directory / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    found = describe(directory, verify=True)
    assert found.kind == ENGINE
    assert found.verified is False
    assert "model.safetensors" in found.offenders[0]


def test_a_quantized_checkpoint_whose_config_alone_says_so(tmp_path: Path) -> None:
    """Called a checkpoint, it was led to a build that refuses it."""
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    with staged_dir(tmp_path / "made") as stage:
        convert(source, stage, SCHEMES["int8"], DataFree(), pre_scale=False)
        (stage / "hf_quant_config.json").unlink()
    found = describe(tmp_path / "made", verify=True)
    assert (found.kind, found.verified, found.facts["precision"]) == (QUANTIZED, True, "quant_algo W8A16")


@pytest.mark.parametrize("section", ["awq", ["awq"], {}, {"bits": 4}])
def test_a_quantization_that_says_little_is_no_checkpoint_to_build_from(tmp_path: Path, section: object) -> None:
    config = read_json(save_tiny(tmp_path) / "config.json")
    write_json(tmp_path / "config.json", {**config, "quantization_config": section})
    assert describe(tmp_path).kind == FOREIGN


@pytest.mark.parametrize(("field", "said"), [("int8", "int8"), ("model", "model"), (None, "model")])
def test_an_engine_says_its_output_layer(tmp_path: Path, field: str | None, said: str) -> None:
    directory = tiny_engine_dir(tmp_path, recipe={"precision": "int4"})
    manifest = read_json(directory / ENGINE_FILE)
    del manifest["recipe"]["output_layer"]
    manifest["recipe"] |= {} if field is None else {"output_layer": field}
    write_json(directory / ENGINE_FILE, manifest)
    assert describe(directory).facts["precision"] == f"int4, KV cache model, output layer {said}"


@pytest.mark.parametrize(("positions", "said"), [(512, False), (256, False), (128, True)])
def test_an_engine_with_limits_beyond_the_models_positions_says_so(tmp_path: Path, positions: int, said: bool) -> None:
    found = describe(tiny_engine_dir(tmp_path, max_position_embeddings=positions))  # limits: 256 tokens in all
    assert (f"the model has {positions} positions" in found.facts["limits"]) is said


def test_weights_are_counted_by_their_type(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    first, *others = tensors
    rest = {name: tensors[name].to(torch.float32) for name in others}
    save_file({first: tensors[first].to(torch.float16)}, directory / "model-00001-of-00002.safetensors")
    save_file(rest, directory / "model-00002-of-00002.safetensors")
    (directory / "model.safetensors").unlink()
    names = {first: "model-00001-of-00002.safetensors"} | dict.fromkeys(rest, "model-00002-of-00002.safetensors")
    write_json(directory / "model.safetensors.index.json", {"weight_map": names})
    weights = describe(directory).data["weights"]
    sizes = {"float16": 2 * tensors[first].numel(), "float32": 4 * sum(tensor.numel() for tensor in rest.values())}
    assert (weights["files"], weights["tensors"], weights["by_dtype"]) == (2, len(tensors), sizes)
    assert weights["bytes"] == sum(sizes.values())


def test_a_value_that_is_no_number_is_found_where_it_is_looked_for(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, weights)
    assert describe(tmp_path).offenders == ()
    found = describe(tmp_path, verify=True)
    assert found.verified is False
    assert name in found.offenders[0]


def test_a_quantized_checkpoint_is_held_against_its_layout(tmp_path: Path) -> None:
    source, out = open_source(save_tiny(tmp_path / "source")), tmp_path / "out"
    with staged_dir(out) as stage:
        convert(source, stage, SCHEMES["int8"], DataFree(), pre_scale=False)
    found = describe(out, verify=True)
    assert (found.kind, found.verified, found.offenders) == (QUANTIZED, True, ())
    assert found.facts["precision"].startswith("quant_algo W8A16")
    [shard] = out.glob("*.safetensors")
    tensors = load_file(shard)
    lost = next(name for name in tensors if name.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, shard)
    found = describe(out, verify=True)
    assert found.verified is False
    assert lost in " ".join(found.offenders)


def test_a_checkpoint_that_is_quantized_for_other_servers(tmp_path: Path) -> None:
    """It is told as such, and not to be built from."""
    directory = save_tiny(tmp_path / "model", "qwen2")
    config = read_json(directory / "config.json")
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    write_json(directory / "config.json", config)
    found = describe(directory)
    assert (found.kind, found.facts["quantized"], found.data["quant_method"]) == (FOREIGN, "awq", "awq")
    assert found.data["weights"]["tensors"] > 0
    with pytest.raises(UsageError, match="--verify"):
        describe(directory, verify=True)
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write_json(directory / "config.json", config)
    assert describe(directory).kind == QUANTIZED, "ModelOpt's is the unified layout, which trtkit reads"


def test_a_bundles_weights_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    engine, bundle = tiny_engine_dir(tmp_path / "engine"), tmp_path / "bundle"
    manifest = read_json(engine / ENGINE_FILE)
    (engine / ENGINE_FILE).unlink()
    manifest["backend"] = manifest["recipe"]["backend"] = "tensorrt-llm"
    manifest["checkpoint_digest"] = {
        f"checkpoint/{path.name}": digest_file(path) for path in engine.iterdir() if path.is_file()
    }
    bundle.mkdir()
    engine.rename(bundle / "checkpoint")
    write_json(bundle / BUNDLE_FILE, manifest)
    found = describe(bundle, verify=True)
    assert (found.kind, found.verified, found.offenders) == (BUNDLE, True, ())
    assert found.data["weights"]["tensors"] == len(load_file(bundle / "checkpoint" / "model.safetensors"))
    (bundle / "checkpoint" / "model.safetensors").write_bytes(b"x")
    assert describe(bundle, verify=True).verified is False


def test_a_truncated_file_is_found_without_verify(tmp_path: Path) -> None:
    weights = save_tiny(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert any("model.safetensors" in text for text in describe(tmp_path).offenders)
    found = describe(tmp_path, verify=True)
    assert found.verified is False
    assert len(set(found.offenders)) == len(found.offenders), "each thing once"


def test_a_run_and_a_draft_head(tmp_path: Path) -> None:
    run, head = tmp_path / "run", tmp_path / "head"
    write_json(run / "run.json", {"version": 1, "created": "now", "engine": {"path": "e"}})
    (run / "journal.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    found = describe(run)
    assert found.kind == RUN
    assert "2 entries" in found.facts["journal"]
    assert found.facts["result"] == "not finished; a session on this directory goes on from here"
    write_json(run / "run.json", {"version": 1, "problems": {"path": "p.jsonl"}, "engine": {"path": "e"}})
    assert describe(run).facts["result"] == "not finished; the same `trtkit solve` command goes on from here"
    write_json(run / "summary.json", {"answered": 2, "problems": 3, "accuracy": 0.5})
    assert describe(run).facts["result"] == "2 of 3 answered, accuracy 50.0%"
    with pytest.raises(UsageError, match="neither digests nor tensors"):
        describe(run, verify=True)
    write_json(head / "config.json", {"hidden_size": 8, "exit_dim": 16, "num_draft_layers": 2, "rnn": True})
    with pytest.raises(CheckpointError):
        describe(head)
    save_file({"rnn_u.weight": torch.zeros(2, 2)}, head / "model.safetensors")
    assert describe(head).kind == DRAFTER


def test_a_draft_head_is_verified_against_its_config(tmp_path: Path) -> None:
    save_drafter(Drafter(DrafterConfig(hidden_size=8, vocab_size=12, exit_dim=8)), tmp_path, dtype=torch.bfloat16)
    assert describe(tmp_path, verify=True).verified is True
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["rnn_u.bias"][3] = float("nan")
    del tensors["rnn_w.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert describe(tmp_path).offenders == ()
    found = describe(tmp_path, verify=True)
    assert found.verified is False
    assert "rnn_w.weight: missing; rnn_u.bias: not finite" in found.offenders[0]


def test_a_regressors_values_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "difficulty.json", {"problems": 3, "usable": True})
    save_file({"good": torch.zeros(4), "bad": torch.tensor([0.0, float("inf")])}, tmp_path / "model.safetensors")
    assert describe(tmp_path).verified is None
    found = describe(tmp_path, verify=True)
    assert (found.kind, found.verified) == (DIFFICULTY, False)
    assert found.offenders == ("bad: holds values that are NaN or Inf",)


@pytest.mark.parametrize("made", ["nothing", "file", "empty"])
def test_what_is_nothing_is_said_to_be_nothing(tmp_path: Path, made: str) -> None:
    place = tmp_path / "place"
    if made == "file":
        place.write_text("x", encoding="utf-8")
    elif made == "empty":
        place.mkdir()
    with pytest.raises(InputError) as caught:
        describe(place)
    assert caught.value.hint


def test_a_newer_engine_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / ENGINE_FILE, {"version": 99})
    with pytest.raises(TrtkitError, match="newer"):
        describe(tmp_path)
