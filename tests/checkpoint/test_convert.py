"""A conversion whose stages overlap writes what one step after the other writes, and fails like it."""

from __future__ import annotations

import dataclasses
import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.conftest import RandomScales
from tests.quant.test_calibrate import ROWS
from tests.tiny import save_tiny
from trtkit.checkpoint import convert as room
from trtkit.checkpoint.convert import convert
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, layer_of, layer_prefix, open_source
from trtkit.checkpoint.shard_writer import ShardWriter
from trtkit.checkpoint.shards import Shards
from trtkit.checkpoint.unified import open_unified, unified_layout
from trtkit.decoder import LINEAR_PARTS, Norms
from trtkit.errors import CheckpointError, OutputError
from trtkit.files import digest_file
from trtkit.quant.calibrate import CalibrationOptions, Calibrator, DataFree, LayerScales, LayerwiseCalibrator, Parts
from trtkit.quant.group import GroupScales
from trtkit.quant.tensor import QuantTensor, quantize_fp8, quantize_int4, quantize_int8
from trtkit.scheme import SCHEMES, KvDtype, QuantScheme
from trtkit.staging import staged_dir

KINDS = ["bf16", "int8", "int8-sq", "fp8", "fp8+kv", "int4", "int4-rtn"]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "trtkit pipeline"] == []


def setting(source: HfCheckpoint, kind: str) -> tuple[QuantScheme, Calibrator, bool]:
    """Scheme, a fresh calibrator, and whether it gives pre-scales."""
    name = kind.split("+")[0].removesuffix("-rtn")
    scheme = dataclasses.replace(SCHEMES[name], kv_dtype="fp8" if kind.endswith("+kv") else "model")
    if kind in ("bf16", "int8", "int4-rtn"):
        return scheme, DataFree(), False
    if kind == "int4":
        return scheme, RandomScales(), True
    calibrator = LayerwiseCalibrator(
        source.spec, scheme, ROWS, source.shards.tensor(EMBEDDING), options=CalibrationOptions()
    )
    return scheme, calibrator, kind == "int8-sq"


def quantized(weight: Tensor, scheme: QuantScheme, scales: GroupScales, amax: Tensor, part: int) -> QuantTensor:
    """By definition."""
    wide = weight if scales.pre_scale is None else weight.float() / scales.pre_scale.float()
    if scheme.name == "fp8":
        return quantize_fp8(wide, amax=amax)
    if scheme.weight_format == "int8":
        return quantize_int8(wide, steps=127 if scheme.name == "int8-sq" else 128)
    return quantize_int4(wide, clip=None if scales.clips is None else scales.clips[part])


def expected_digest(source: HfCheckpoint, out: Path, kind: str) -> str:
    """Of the weight file, made one tensor after the other."""
    scheme, calibrator, pre_scale = setting(source, kind)
    layout = unified_layout(source.spec, scheme, pre_scale=pre_scale)
    tensors = {name: source.shards.tensor(name) for name in layout if name in source.shards}
    for layer in range(source.spec.layers if scheme.weight_format != "bf16" else 0):
        parts = {name: [source.part(layer, part) for part in members] for name, members in LINEAR_PARTS.items()}
        scales = calibrator.layer(layer, source.norms(layer), parts)
        for group, members in LINEAR_PARTS.items():
            amax = torch.stack([part.weight.data.abs().amax() for part in parts[group]]).amax()
            for position, (member, part) in enumerate(zip(members, parts[group], strict=True)):
                made = quantized(part.weight.data, scheme, scales.groups[group], amax, position)
                stem = f"{layer_prefix(layer)}{member}"
                found = {
                    "weight": made.data, "weight_scale": made.scale, "input_scale": scales.groups[group].input_scale,
                    "pre_quant_scale": scales.groups[group].pre_scale,
                }  # fmt: skip
                tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in found.items() if tensor is not None}
        if kind == "fp8+kv":
            assert scales.kv_amax is not None
            assert max(scales.kv_amax) < 448
            tensors |= {f"{layer_prefix(layer)}self_attn.{name}": torch.tensor(1.0)
                        for name in ("k_proj.k_scale", "v_proj.v_scale")}  # fmt: skip
    out.mkdir()
    writer = ShardWriter(out, layout)
    for name in layout:
        writer.write(name, tensors[name])
    return writer.close()["model.safetensors"]


@pytest.mark.parametrize(("family", "kind"), [*(("qwen2", kind) for kind in KINDS), ("qwen3", "int8")])
def test_bytes_are_those_of_one_step_after_the_other(
    tmp_path: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(save_tiny(tmp_path / "source", family, dtype=torch.bfloat16))
    # Lines that hold next to nothing, and tables that come in many blocks.
    monkeypatch.setattr(room, "_AHEAD_BYTES", 1)
    monkeypatch.setattr(room, "_BEHIND_BYTES", 1)
    blocks = Shards.blocks
    monkeypatch.setattr(Shards, "blocks", lambda self, name: blocks(self, name, 5000))
    (tmp_path / "out").mkdir()
    scheme, calibrator, pre_scale = setting(source, kind)
    digests = convert(source, tmp_path / "out", scheme, calibrator, pre_scale=pre_scale)
    assert digests.keys() >= {"config.json", "generation_config.json"}
    assert digests == {path.name: digest_file(path) for path in (tmp_path / "out").iterdir()}
    assert digests["model.safetensors"] == expected_digest(source, tmp_path / "expected", kind)


class Cached:
    """Gives the scales that need no data, and these largest keys and values."""

    def __init__(self, key: float, value: float) -> None:
        self._amax = (key, value)

    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        return dataclasses.replace(DataFree().layer(index, norms, parts), kv_amax=self._amax)


@pytest.mark.parametrize(
    ("kv_dtype", "amax", "scales"),
    [
        ("fp8", (44.8, 896.0), (1.0, 2.0)), ("fp8", (896.0, 44.8), (2.0, 1.0)), ("int8", (12.7, 254.0), (0.1, 2.0)),
    ],
)  # fmt: skip
def test_the_caches_scales_are_those_of_the_largest_key_and_value(
    tmp_path: Path, kv_dtype: KvDtype, amax: tuple[float, float], scales: tuple[float, float]
) -> None:
    """The grids end at 448 and 127; ModelOpt never stretches an fp8 cache that has room."""
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    (tmp_path / "out").mkdir()
    scheme = dataclasses.replace(SCHEMES["bf16"], kv_dtype=kv_dtype)
    convert(source, tmp_path / "out", scheme, Cached(*amax), pre_scale=False)
    assert open_unified(tmp_path / "out").kv_scales(1) == pytest.approx(scales)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ("kv_cache_scheme" in config) == (kv_dtype == "fp8"), "other servers know no other cache"


class Watched:
    """Calls back with every layer's number before it gives the scales that need no data."""

    def __init__(self, fail_at: int, problem: BaseException) -> None:
        self.seen: list[int] = []
        self._fail_at = fail_at
        self._problem = problem

    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        self.seen.append(index)
        if index == self._fail_at:
            raise self._problem
        return DataFree().layer(index, norms, parts)


def damaged(directory: Path, *names: str) -> HfCheckpoint:
    """A tiny checkpoint with one value of each of these tensors made NaN, Inf, NaN, ..."""
    source = open_source(save_tiny(directory, dtype=torch.bfloat16))
    for position, name in enumerate(names):
        entry = source.shards.entries[name]
        bad = torch.tensor([float("inf") if position % 2 else float("nan")], dtype=entry.dtype)
        with entry.path.open("r+b") as stream:
            stream.seek(entry.offset + entry.nbytes - entry.dtype.itemsize)
            stream.write(bad.view(torch.uint8).numpy().tobytes())
    return source


def into(source: HfCheckpoint, out: Path, calibrator: Calibrator) -> None:
    with staged_dir(out) as stage:
        convert(source, stage, SCHEMES["int8"], calibrator, pre_scale=False)


def test_tensors_without_a_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A layer too many, or a bias that config.json does not speak of: the model would be another one."""
    directory = save_tiny(tmp_path / "source", "llama", dtype=torch.bfloat16, tie_word_embeddings=True)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()  # tied, and stored nevertheless
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # transformers before 4.32
    save_file(tensors, path)
    into(open_source(directory), tmp_path / "known", DataFree())
    assert not caplog.text
    bias = "model.layers.0.self_attn.q_proj.bias"
    more = {f"model.layers.2.{name}": torch.ones(1) for name in "abcde"}
    save_file({**tensors, bias: torch.ones(256), **more}, path)
    into(open_source(directory), tmp_path / "unknown", DataFree())
    assert "6 tensor(s) of the checkpoint have no place in the model of its config.json" in caplog.text
    assert f"not read: {bias}, model.layers.2.a, " in caplog.text
    assert caplog.text.rstrip().endswith("model.layers.2.d, ...")


@pytest.mark.parametrize(
    "first", [EMBEDDING, "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"]
)
def test_values_that_are_not_finite_are_all_named_and_nothing_is_kept(tmp_path: Path, first: str) -> None:
    bad = (first, "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight")
    source = damaged(tmp_path / "source", *bad)
    calibrator = Watched(-1, ValueError())
    with pytest.raises(CheckpointError, match="not finite") as caught:
        into(source, tmp_path / "out", calibrator)
    assert caught.value.offenders == tuple(f"{name}: 1 value(s) are NaN or Inf" for name in bad)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert calibrator.seen == list(range(layer_of(first) or 0)), "no layer from the first bad one on is worked on"


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    put, written = ShardWriter._put, 0

    def full(self: ShardWriter, data: memoryview) -> None:
        nonlocal written
        written += len(data)
        if written > 500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data)

    monkeypatch.setattr(ShardWriter, "_put", full)
    with pytest.raises(OutputError, match="No space left"):
        into(source, tmp_path / "out", DataFree())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    (tmp_path / "source" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        into(source, tmp_path / "out", DataFree())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), ValueError("in the calibrator")])
def test_what_ends_the_calibrator_ends_the_conversion(tmp_path: Path, problem: BaseException) -> None:
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    with pytest.raises(type(problem)):
        into(source, tmp_path / "out", Watched(1, problem))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_torch_keeps_its_threads(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source", dtype=torch.bfloat16))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        into(source, tmp_path / "out", DataFree())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
