"""The quality report against transformers with the rounded weights, activations, keys and values put into it."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2

from tests.quant.test_calibrate import ROWS
from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.convert import convert
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, open_source
from trtkit.checkpoint.quality import measure_quality
from trtkit.checkpoint.unified import UnifiedCheckpoint, open_unified
from trtkit.errors import InputError
from trtkit.quant.batches import TextRow, pack_rows
from trtkit.quant.calibrate import LayerwiseCalibrator
from trtkit.quant.tensor import dequantize
from trtkit.scheme import SCHEMES

FEW = [TextRow(tokens=ROWS[0].tokens[:6])]
"""So little text to calibrate on that much of what follows lies beyond the scales."""
JUDGES = [TextRow(tokens=tuple((31 * i * n + 7 * n) % 320 for i in range(40)), prompt_tokens=9 * n) for n in range(5)]


def built(
    source: HfCheckpoint, out: Path, precision: str, kv_dtype: Any, rows: list[TextRow] = ROWS
) -> UnifiedCheckpoint:
    scheme = dataclasses.replace(SCHEMES[precision], kv_dtype=kv_dtype)
    out.mkdir()
    calibrator = LayerwiseCalibrator(source.spec, scheme, rows, source.shards.tensor(EMBEDDING))
    convert(source, out, scheme, calibrator, pre_scale=precision in ("int8-sq", "int4"))
    return open_unified(out)


def rounded(x: Tensor, scale: float | Tensor, kind: str) -> Tensor:
    """To the nearest of a format's values, those beyond its range to the last one."""
    if kind == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    return torch.round(x / scale).clamp(-128, 127) * scale


def with_roundings(checkpoint: UnifiedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' model that computes what an engine of the checkpoint computes."""
    model, kind = tiny_model("qwen2"), checkpoint.scheme.kv_dtype
    keys = []
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            part = checkpoint.part(index, name)
            module.weight.data = dequantize(part.weight)

            def rounding(_: Any, inputs: Any, part: Any = part) -> Any:
                x = inputs[0] if part.pre_scale is None else inputs[0] * part.pre_scale
                return x if part.input_scale is None else rounded(x, part.input_scale, part.weight.format)

            module.register_forward_pre_hook(rounding)
        scales = checkpoint.kv_scales(index)
        if kind != "model":
            assert scales is not None
            key, value = scales
            keys.append(key)
            layer.self_attn.v_proj.register_forward_hook(lambda _, __, v, value=value: rounded(v, value, kind))
    if kind != "model":
        plain, calls = modeling_qwen2.apply_rotary_pos_emb, iter(keys * 1000)

        def turned(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
            q, k = plain(*arguments, **more)
            return q, rounded(k, next(calls), kind)

        monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", turned)
    return model


def log_probabilities(model: Any, rows: list[TextRow]) -> tuple[Tensor, Tensor]:
    """Of every answer token of the rows (P, V), and those tokens."""
    found, targets = [], []
    for row in rows:
        first = max(row.prompt_tokens, 1)
        with torch.no_grad():
            found.append(model(torch.tensor([row.tokens])).logits[0, first - 1 : -1].log_softmax(dim=1))
        targets += row.tokens[first:]
    return torch.cat(found), torch.tensor(targets)


@pytest.mark.parametrize(
    ("precision", "kv_dtype"), [("int8-sq", "int8"), ("fp8", "fp8"), ("int4", "model"), ("bf16", "int8")]
)
def test_the_report_is_what_transformers_makes_of_the_rounded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kv_dtype: str
) -> None:
    # As large models are judged: several batches, and their head in several pieces.
    monkeypatch.setattr("trtkit.checkpoint.quality.pack_rows", functools.partial(pack_rows, tokens=100))
    monkeypatch.setattr("trtkit.checkpoint.quality._POSITIONS", 11)
    monkeypatch.setattr("trtkit.checkpoint.quality._VOCAB_BLOCK", 100)
    source = open_source(save_tiny(tmp_path / "source"))
    checkpoint = built(source, tmp_path / "out", precision, kv_dtype, FEW)
    quality = measure_quality(source, checkpoint, JUDGES)
    expected, targets = log_probabilities(tiny_model("qwen2"), JUDGES)
    found, _ = log_probabilities(with_roundings(checkpoint, monkeypatch), JUDGES)
    assert quality.tokens == len(targets) == 39 + 31 + 22 + 13 + 4
    kl = float((expected.exp() * (expected - found)).sum(dim=1).mean())
    assert kl > 1e-5
    assert quality.kl_mean == pytest.approx(kl, rel=0.01)
    assert quality.top1_agreement == pytest.approx(
        float((expected.argmax(dim=1) == found.argmax(dim=1)).float().mean()), abs=1.5 / len(targets)
    )
    losses = [float(F.nll_loss(each, targets)) for each in (found, expected)]
    assert quality.perplexity == pytest.approx(math.exp(losses[0]), rel=1e-3)
    assert quality.perplexity_bf16 == pytest.approx(math.exp(losses[1]), rel=1e-4)


def test_the_worst_tensors_are_those_that_lost_most_of_what_multiplies_the_input(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source"))
    checkpoint = built(source, tmp_path / "out", "int4", "model")
    lost = {}
    for index, layer in enumerate(tiny_model("qwen2").model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                part = checkpoint.part(index, name)
                weight = module.weight.detach()
                off = dequantize(part.weight) * part.pre_scale - weight
                lost[f"layers.{index}.{name}"] = float(off.norm() / weight.norm())
    worst = sorted(lost.items(), key=lambda pair: -pair[1])[:8]
    found = measure_quality(source, checkpoint, JUDGES).worst_tensors
    assert [name for name, _ in found] == [name for name, _ in worst]
    assert [error for _, error in found] == pytest.approx([error for _, error in worst], rel=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_pieces_is_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    source = open_source(save_tiny(tmp_path / "source", tie_word_embeddings=tied))
    checkpoint = built(source, tmp_path / "out", "bf16", "model")
    whole = measure_quality(source, checkpoint, JUDGES, output_layer="int8")
    monkeypatch.setattr("trtkit.checkpoint.quality._VOCAB_BLOCK", 100)
    pieces = measure_quality(source, checkpoint, JUDGES, output_layer="int8")
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert pieces.worst_tensors[0] == ("lm_head", pytest.approx(whole.worst_tensors[0][1], rel=1e-5))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("silent", ["v_proj", "k_proj", "up_proj"])
def test_layers_of_zeros_are_judged_like_others(tmp_path: Path, kv_dtype: str, silent: str) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if "layers.1." in name and silent in name:
            weight.zero_()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    original = open_source(source)
    for precision in ("bf16", "int8-sq", "fp8"):
        quality = measure_quality(original, built(original, tmp_path / precision, precision, kv_dtype), JUDGES)
        assert 0 < quality.kl_mean < 0.2
        assert math.isfinite(quality.perplexity)


def test_text_without_an_answer_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path / "source"))
    checkpoint = built(source, tmp_path / "out", "bf16", "model")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no answer"):
        measure_quality(source, checkpoint, [TextRow(tokens=(1, 2, 3), prompt_tokens=5), TextRow(tokens=(4,))])
