"""Damaged, incomplete and unreachable checkpoints: every offender at once, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.hf import check_finite, open_source, resolve_source
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.shards import open_shards
from trtkit.checkpoint.unified import open_unified
from trtkit.describe import describe
from trtkit.errors import CheckpointError, HubError, InputError, OutputError, UnsupportedError
from trtkit.files import digest_file

Change = Callable[[dict[str, torch.Tensor]], None]


def changed(directory: Path, change: Change, **options: object) -> Path:
    """A tiny checkpoint with its tensors changed."""
    save_tiny(directory, **options)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def sharded(directory: Path) -> Path:
    tiny_model().save_pretrained(directory, max_shard_size="500KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_tensor_reads_as_saved(tmp_path: Path, family: str) -> None:
    source = open_source(save_tiny(tmp_path, family))
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(source.shards.tensor(name), tensor)
        assert torch.equal(torch.cat(list(source.shards.blocks(name, 1000))), tensor.flatten())


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    whole = open_source(save_tiny(tmp_path / "whole"))
    parts = open_source(sharded(tmp_path / "parts"))
    for name in whole.shards.entries:
        assert torch.equal(whole.shards.tensor(name), parts.shards.tensor(name))


def test_tied_checkpoint_needs_no_lm_head(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in source.shards
    check_finite(source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_table_that_is_stored_twice_must_be_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype, copy=True)

    def other(tensors: dict[str, torch.Tensor]) -> None:
        twice(tensors)
        tensors["lm_head.weight"][-1, -1] += 1

    check_finite(open_source(changed(tmp_path / "same", twice, tie_word_embeddings=True, dtype=torch.bfloat16)))
    source = open_source(changed(tmp_path / "other", other, tie_word_embeddings=True, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="ties lm_head to the embeddings, and the files have an lm_head with"):
        check_finite(source)


def test_all_offenders_are_listed_at_once(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(3, 5)
        tensors["model.norm.weight"] = torch.ones(256, dtype=torch.int32)

    with pytest.raises(CheckpointError) as caught:
        open_source(changed(tmp_path, damage))
    assert caught.value.offenders == (
        "model.layers.0.mlp.up_proj.weight: missing",
        "model.layers.1.self_attn.o_proj.weight: shape [3, 5], config.json implies [256, 256]",
        "model.norm.weight: dtype int32, expected a 16- or 32-bit float",
        "lm_head.weight: missing",
    )


def test_long_lists_are_cut_with_a_count(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(changed(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]]))
    assert len(caught.value.offenders) == 21
    assert caught.value.offenders[-1].startswith("... and")
    assert "problem(s)" in str(caught.value)


def test_nan_and_inf_are_found_in_one_pass(tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
        tensors["model.layers.1.self_attn.q_proj.bias"][:2] = float("-inf")

    source = open_source(changed(tmp_path, damage))
    with pytest.raises(CheckpointError, match="not finite") as caught:
        check_finite(source)
    assert caught.value.offenders == (
        "model.layers.0.mlp.up_proj.weight: 1 value(s) are NaN or Inf",
        "model.layers.1.self_attn.q_proj.bias: 2 value(s) are NaN or Inf",
    )


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = save_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path)
    assert len(caught.value.offenders) == 1, "the tensors of a damaged file need no line each"
    assert "truncated" in caught.value.offenders[0]


def test_a_single_file_beside_a_left_over_index_is_read_as_transformers_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(seed=1)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    wanted = tiny_model(seed=2)
    wanted.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    name = "model.norm.weight"
    ours = open_source(tmp_path).shards.tensor(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()[name]
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, wanted.state_dict()[name])
    assert not torch.equal(ours, model.state_dict()[name])
    assert "model.safetensors is read, and the shards of model.safetensors.index.json beside it are not" in caplog.text


def test_damaged_header_and_trailing_bytes(tmp_path: Path) -> None:
    path = save_tiny(tmp_path) / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good + b"more")
    with pytest.raises(CheckpointError, match="longer than its header"):
        open_source(tmp_path)
    path.write_bytes(good[:9] + b"\xff" + good[10:])
    with pytest.raises(CheckpointError, match="header is damaged"):
        open_source(tmp_path)
    path.write_bytes(good.replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(CheckpointError, match="unknown dtype 'F99'"):
        open_source(tmp_path)
    path.write_bytes(good.replace(b'"F32"', b'["F"]', 1))
    with pytest.raises(CheckpointError, match=r"unknown dtype \['F'\]"):
        open_source(tmp_path)
    path.write_bytes(good.replace(b"[320,256]", b"[1e999,2]", 1))
    with pytest.raises(CheckpointError, match="header is damaged at"):
        open_source(tmp_path)


def test_missing_shards_and_wrong_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].unlink()
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = next(name for name, file in table["weight_map"].items() if file == files[2].name)
    table["weight_map"][name] = files[0].name
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path)
    assert f"{files[1].name}: file is missing" in caught.value.offenders
    assert f"{name}: the index says {files[0].name}, but it is not there" in caught.value.offenders
    for weight_map in ({name: 5}, [name], None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="no usable weight_map"):
            open_source(tmp_path)


def test_of_a_tensor_in_two_files_the_one_in_the_index_counts(tmp_path: Path) -> None:
    sharded(tmp_path)
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    for named, other in ((first, last), (last, first)):
        name, good = next(iter(load_file(named).items()))
        save_file({**load_file(other), name: good + 1}, other, metadata={"format": "pt"})
        assert torch.equal(open_source(tmp_path).shards.tensor(name), good)


def test_what_a_download_may_have_left_out_is_named(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "shards")
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no weights found") as caught:
        open_source(directory)
    assert "download model.safetensors.index.json too" in str(caught.value.hint)
    save_tiny(tmp_path / "cloned")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567890\n"
    (tmp_path / "cloned" / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="Git LFS pointer, not the weights: run `git lfs pull`"):
        open_source(tmp_path / "cloned")


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "run.json").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json\)\nhint: `trtkit inspect"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        open_source(tmp_path / "run.json")
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization"):
        open_source(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match="already quantized"):
        open_source(tmp_path)
    with pytest.raises(UnsupportedError, match="quantized with 'gptq' are not read"):
        open_unified(tmp_path)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a checkpoint directory"):
        resolve_source(str(tmp_path / "file"))
    with pytest.raises(InputError, match="no such directory"):
        resolve_source("./some/where")
    with pytest.raises(InputError, match="hub id"):
        resolve_source("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="cannot be reached") as caught:
        resolve_source("owner/model-that-is-not-cached")
    assert "--model" in str(caught.value)


class ConnectError(Exception):
    __module__ = "httpx"


@pytest.mark.parametrize(
    ("problem", "message"),
    [(ConnectError("no route"), "cannot be reached"), (OSError("disk"), "cannot be used"), (ValueError("bad"), "bad")],
)
def test_hub_failures_say_what_to_pass_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(HubError, match=message) as caught:
        resolve_source("owner/name")
    assert "practice" in str(caught.value)


@pytest.mark.parametrize("weights", [True, False])
def test_weights_are_downloaded_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch, weights: bool) -> None:
    """A tokenizer of a 14B is some megabytes, the rest are thirty gigabytes."""
    asked: list[list[str]] = []

    def noted(_model: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return "there"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    assert resolve_source("owner/name", weights=weights) == Path("there")
    assert ("*.safetensors" in asked[0]) == weights
    assert {"*.json", "*.jinja"} <= set(asked[0])


def test_a_folder_of_the_hubs_cache_leads_to_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name"
    snapshot = folder / "snapshots" / "0123abcd"
    (folder / "blobs").mkdir(parents=True)
    save_tiny(snapshot)
    for file in snapshot.iterdir():
        blob = folder / "blobs" / file.name
        file.rename(blob)
        file.symlink_to(f"../../blobs/{file.name}")
    check_finite(open_source(resolve_source(str(snapshot))))
    with pytest.raises(InputError, match="folder of the hub's cache") as caught:
        resolve_source(str(folder))
    assert caught.value.hint == f"the checkpoint in it: {snapshot}"
    with pytest.raises(InputError, match="neither") as caught:
        describe(folder)
    assert caught.value.hint == f"a checkpoint in it: {snapshot}"


def test_writer_makes_files_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 3), "b": torch.tensor(2.5), "c": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "d": torch.randn(4, 4).to(torch.float8_e4m3fn), "e": torch.randn(6).bfloat16(),
    }  # fmt: skip
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for shard_bytes, files in ((10_000, 1), (20, 4)):
        out = tmp_path / str(shard_bytes)
        out.mkdir()
        writer = ShardWriter(out, layout, shard_bytes=shard_bytes)
        for name, tensor in tensors.items():
            writer.write(name, [tensor[:3], tensor[3:]] if name == "c" else tensor)
        digests = writer.close()
        assert digests == {path.name: digest_file(path) for path in out.glob("*.safetensors")}
        assert len(digests) == files
        for name in digests:
            # The format asks for tensors that begin at multiples of 8.
            assert int.from_bytes((out / name).read_bytes()[:8], "little") % 8 == 0
        read = {name: value for path in out.glob("*.safetensors") for name, value in load_file(path).items()}
        shards, problems = open_shards(out)
        assert not problems
        for name, tensor in tensors.items():
            for found in (read[name], shards.tensor(name)):
                assert found.shape == tensor.shape
                assert found.dtype == tensor.dtype
                assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_a_large_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    # Large enough for huge pages.
    tensors = {"a": torch.arange(3_000_000, dtype=torch.int32), "b": torch.full((2_100_001,), -1, dtype=torch.int32)}
    writer = ShardWriter(tmp_path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    shards, _ = open_shards(tmp_path)
    first, again, other = shards.tensor("a"), shards.tensor("a"), shards.tensor("b")
    first += 1
    assert first.equal(tensors["a"] + 1)
    assert again.equal(tensors["a"])
    assert other.equal(tensors["b"])


def test_a_disk_that_cannot_hold_it_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too full"):
        ShardWriter(tmp_path, {"a": (torch.float32, (1 << 50,))})
    assert not list(tmp_path.iterdir())
