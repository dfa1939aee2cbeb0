"""The export for the PyTorch backend: the same function as the native checkpoint, in the form its loader reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conftest import Native
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.checkpoint.unified_export import write_unified_hf
from trtkit.decoder import rms_norm
from trtkit.errors import UnsupportedError
from trtkit.quant.tensor import linear_reference

NORM_OF = {"qkv": "input", "gate_up": "post"}


def behind_norm(checkpoint: UnifiedCheckpoint, product: str, hidden: torch.Tensor) -> torch.Tensor:
    """Norm and product together: what folding must keep."""
    norms = checkpoint.norms(0)
    normed = rms_norm(hidden, getattr(norms, NORM_OF[product]), checkpoint.spec.norm_eps)
    return linear_reference(normed, checkpoint.linear(0, product))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["int4", "int4-rtn"])
def test_int4_pre_scales_are_where_the_loader_looks(native: Native, tmp_path: Path, kind: str) -> None:
    write_unified_hf(native("qwen2", kind), tmp_path / "out")
    ours, theirs = open_unified(native("qwen2", kind)), open_unified(tmp_path / "out")
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
