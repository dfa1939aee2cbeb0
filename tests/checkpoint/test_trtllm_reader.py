"""Reading TensorRT-LLM checkpoints back: bit-identical tensors, the same tokens, and damage by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.config import TreeShape
from tests.checkpoint.conftest import Native
from tests.checkpoint.test_trtllm import KINDS, options
from tests.engines import random_prompts, request, run_all
from tests.tiny import LLAMA3, YARN
from trtkit.checkpoint.trtllm import write_trtllm_checkpoint
from trtkit.checkpoint.trtllm_reader import merged_drafter, open_checkpoint, open_trtllm
from trtkit.checkpoint.unified import open_unified
from trtkit.describe import TRTLLM, describe
from trtkit.errors import CheckpointError, ConfigError, EngineError, UnsupportedError, UsageError
from trtkit.recipe import EngineManifest, Limits, Recipe, write_manifest
from trtkit.runtime.draft_head import HeadOptions
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.torch_engine import TorchEngine


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit, also for dtypes that cannot be compared."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8)
    )  # fmt: skip


def held(directory: Path, out: Path) -> Path:
    """A copy with the scales of fp8 inputs as a TensorRT-LLM checkpoint in bf16 has them."""
    tensors = load_file(shutil.copytree(directory, out) / "model.safetensors")
    for name in tensors:
        if name.endswith("input_scale"):
            tensors[name] = tensors[name].bfloat16().float()
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_identical(native: Native, tmp_path: Path, kind: str, tp: int) -> None:
    directory = native("qwen2", kind)
    write_trtllm_checkpoint(directory, tmp_path / "out", options(tp))
    if kind.startswith("fp8"):
        directory = held(directory, tmp_path / "held")
    ours, theirs = open_unified(directory), open_checkpoint(tmp_path / "out")
    assert theirs.spec == ours.spec
    assert theirs.scheme == ours.scheme
    assert theirs.shards.entries.keys() == ours.shards.entries.keys()
    for name in ours.shards.entries:
        if name.endswith(("k_scale", "v_scale")):
            continue
        assert same(theirs.shards.tensor(name), ours.shards.tensor(name)), name
        assert same(torch.cat(list(theirs.shards.blocks(name))), ours.shards.tensor(name).reshape(-1)), name
    pair = ours.kv_scales(0)
    assert theirs.kv_scales(0) == (None if pair is None else (max(pair), max(pair)))


@pytest.mark.parametrize(("family", "rope"), [("qwen3", YARN), ("llama", LLAMA3)])
def test_round_trip_of_other_families_over_stages(
    native: Native, tmp_path: Path, family: str, rope: dict[str, Any]
) -> None:
    directory = native(family, "int4-rtn", num_hidden_layers=2, vocab_size=333, rms_norm_eps=3e-5, head_dim=128,
                       rope_scaling={**rope, "rope_theta": 54321.0}, tie_word_embeddings=family == "llama")  # fmt: skip
    write_trtllm_checkpoint(directory, tmp_path / "out", options(2, 2))
    ours, theirs = open_unified(directory), open_trtllm(tmp_path / "out")
    assert theirs.spec == ours.spec
    assert (theirs.spec.rope.theta, theirs.spec.norm_eps) == (54321.0, 3e-5)
    assert theirs.spec.head_dim == 128, "not hidden size by heads, as in several sizes of Qwen3"
    # Other writers say one of the two names.
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rotary_scaling"]
    for name in ("type", "rope_type"):
        scaling = {key: value for key, value in written.items() if key != name}
        change_config(tmp_path / "out", {"rotary_scaling": scaling})
        assert open_trtllm(tmp_path / "out").spec == ours.spec
    for name in ours.shards.entries:
        assert same(theirs.shards.tensor(name), ours.shards.tensor(name)), name


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8-sq", "fp8+fp8", "int4"])
def test_torch_runtime_gives_the_same_tokens(native: Native, tmp_path: Path, kind: str) -> None:
    directory = native("qwen2", kind)
    write_trtllm_checkpoint(directory, tmp_path / "trtllm", options(4))
    if kind.startswith("fp8"):
        directory = held(directory, tmp_path / "held")
    prompts = random_prompts(1, [5, 17, 30])
    tokens = [_greedy(_engine_dir(place, tmp_path / f"engine{i}", kind), prompts)
              for i, place in enumerate((directory, tmp_path / "trtllm"))]  # fmt: skip
    assert tokens[0] == tokens[1]
    assert all(len(stream) == 12 for stream in tokens[0].values())


def test_a_bare_checkpoint_with_a_head_opens_and_drafts(
    native: Native, head_dirs: dict[str, Path], tmp_path: Path
) -> None:
    directory = native("qwen2", "int8")
    write_trtllm_checkpoint(directory, tmp_path / "out", options(2, head=head_dirs["rnn+proj"]))
    prompts = random_prompts(2, [8, 21])
    chain = OpenOptions(device="cpu", rows=2, tree=TreeShape(beams=1, length=3))
    with open_engine(tmp_path / "out", chain) as engine:
        assert isinstance(engine, TorchEngine)
        found, _ = run_all(engine, [request(str(i), p, max_tokens=12, temperature=0) for i, p in enumerate(prompts)])
        assert len(engine.stats().accepted_by_depth) == 3
    with pytest.raises(UsageError, match="which tokens are frequent"):
        open_engine(tmp_path / "out", OpenOptions(device="cpu", head=HeadOptions(vocabulary=64)))
    assert found == _greedy(_engine_dir(directory, tmp_path / "engine", "int8"), prompts)
    with pytest.raises(EngineError, match=r"config\.json"):
        open_engine(tmp_path / "out", OpenOptions(device="cpu", drafter=tmp_path))  # the one that is named, not its own
    head = merged_drafter(tmp_path / "out", dtype=torch.bfloat16, device=torch.device("cpu"))
    assert head is not None
    stored = load_file(head_dirs["rnn+proj"] / "model.safetensors")
    assert same(head.state_dict()["rnn_u.bias"], stored["rnn_u.bias"])
    assert same(head.state_dict()["output.weight"], stored["lm_head.2.weight"])


def _engine_dir(checkpoint: Path, out: Path, kind: str) -> Path:
    """The checkpoint with an engine.json beside it, as links."""
    out.mkdir()
    for path in checkpoint.iterdir():
        (out / path.name).symlink_to(path)
    name, _, kv = kind.partition("+")
    recipe = Recipe(
        model="tiny", precision=name, kv_dtype="fp8" if kv else "model",
        limits=Limits(batch=4, prompt_tokens=200, total_tokens=256),
    )  # fmt: skip
    write_manifest(out, EngineManifest(
        recipe=recipe, backend="torch", versions={}, checkpoint_digest={}, quality=None, created="2026-01-01T00:00:00Z"
    ))  # fmt: skip
    return out


def _greedy(directory: Path, prompts: list[tuple[int, ...]]) -> dict[str, list[int]]:
    # The output layer as the checkpoint has it: one alone, without a recipe, is opened like that.
    with open_engine(directory, OpenOptions(device="cpu", output_layer="model")) as engine:
        found, _ = run_all(engine, [request(str(i), p, max_tokens=12, temperature=0) for i, p in enumerate(prompts)])
    return found


def test_damage_is_listed_by_rank_and_tensor(native: Native, tmp_path: Path) -> None:
    write_trtllm_checkpoint(native("qwen3", "fp8"), tmp_path / "out", options(2))
    path = tmp_path / "out" / "rank1.safetensors"
    tensors = load_file(path)
    prefix = "transformer.layers.0"
    del tensors[f"{prefix}.attention.q_layernorm.weight"]
    tensors[f"{prefix}.mlp.fc.weight"] = tensors[f"{prefix}.mlp.fc.weight"].view(torch.uint8)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
    tensors["drafter.lm_head.weight"] = torch.zeros(4, 4)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        open_trtllm(tmp_path / "out")
    said = "\n".join(caught.value.offenders)
    assert len(caught.value.offenders) == 4
    for text in ("q_layernorm.weight: missing", "fc.weight: dtype uint8", "drafter.lm_head.weight: not part",
                 "rank1.safetensors: lm_head.weight: shape [512, 160], expected [160, 512]"):  # fmt: skip
        assert text in said
    path.unlink()
    found = describe(tmp_path / "out", verify=True)
    assert found.kind == TRTLLM
    assert found.verified is False
    assert any("rank1.safetensors: file is missing" in text for text in found.offenders)


def test_describe_says_what_it_is(native: Native, head_dirs: dict[str, Path], tmp_path: Path) -> None:
    write_trtllm_checkpoint(native("qwen2", "fp8+fp8"), tmp_path / "out", options(2, head=head_dirs["rnn"]))
    found = describe(tmp_path / "out", verify=True)
    assert found.kind == TRTLLM
    assert found.verified is True
    assert found.facts["precision"] == "fp8 (FP8), KV cache fp8"
    assert found.facts["drafter"] == "ReDrafter, tree 2x3"
    assert found.data["trtllm"]["tensor_parallel"] == 2
    assert found.data["weights"]["files"] == 2


def change_config(directory: Path, change: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


AWQ = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False,
       "pre_quant_scale": False}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"seq_length": None}, ConfigError, "seq_length"),
        ({"qwen_type": "qwen1"}, ConfigError, "qwen_type"),
        ({"rotary_base": "x"}, ConfigError, "rotary_base"),
        ({"position_embedding_type": "learned_absolute"}, ConfigError, "only rope_gpt_neox is read"),
        ({"dtype": "float32"}, ConfigError, "dtype: expected bfloat16 or float16"),
        ({"use_parallel_embedding": True}, ConfigError, "use_parallel_embedding"),
        ({"mapping": {"world_size": 3, "tp_size": 2, "pp_size": 1}}, ConfigError, "world_size"),
        ({"architecture": "GPTForCausalLM"}, UnsupportedError, "GPTForCausalLM"),
        ({"num_attention_heads": 7}, UnsupportedError, "7 attention heads"),
        ({"quantization": {"quant_algo": "W4A16_GPTQ"}}, UnsupportedError, "one GPU architecture"),
        ({"rotary_scaling": {"type": "linear", "factor": 2.0}}, ConfigError, "yarn and llama3 are known"),
        ({"rotary_scaling": {"type": "yarn", "mscale": 0.7}}, ConfigError, "rotary_scaling.mscale: unknown key"),
        ({"rotary_scaling": {"type": ["yarn"]}}, ConfigError, "found .'yarn'"),
        ({"quantization": {"quant_algo": ["FP8"]}}, UnsupportedError, "not a precision"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": ["FP8"]}}, ConfigError, "found .'FP8'"),
        ({"quantization": {**AWQ, "group_size": 64}}, ConfigError, "symmetric groups of 128"),
        ({"quantization": {**AWQ, "has_zero_point": True}}, ConfigError, "symmetric groups of 128"),
        ({"quantization": {"quant_algo": "NVFP4"}}, UnsupportedError, "NVFP4"),
        ({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}, UnsupportedError, "no q/k norm"),
        ({"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL_PLUGIN"}}, UnsupportedError, "no q/k norm"),
    ],
)
def test_wrong_configurations(
    native: Native, tmp_path: Path, change: dict[str, Any], kind: type[Exception], said: str
) -> None:
    write_trtllm_checkpoint(native("qwen3", "bf16"), tmp_path / "out", options(2))
    change_config(tmp_path / "out", change)
    with pytest.raises(kind, match=said):
        open_trtllm(tmp_path / "out")
