"""Statistics against transformers' own activations, and what the searches promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, open_source
from trtkit.decoder import LINEAR_PARTS, LinearName
from trtkit.quant.batches import TextRow, pack_rows
from trtkit.quant.calibrate import CalibrationOptions, LayerScales, LayerwiseCalibrator
from trtkit.quant.group import GroupScales, effective_weight, quantize_group
from trtkit.quant.search import awq_pre_scale, clip_ranges, smooth_pre_scale
from trtkit.quant.tensor import LinearWeights, dense, dequantize, linear_reference, quantize_int4
from trtkit.scheme import SCHEMES

ROWS = [TextRow(tokens=tuple((7 * i * n + n) % 320 for i in range(20 + 5 * n))) for n in range(1, 6)]


def calibrate(source: HfCheckpoint, precision: str, **options: object) -> list[LayerScales]:
    """The scales of every layer."""
    calibrator = LayerwiseCalibrator(
        source.spec, SCHEMES[precision], ROWS, source.shards.tensor(EMBEDDING),
        options=CalibrationOptions(**options),  # type: ignore[arg-type]
    )  # fmt: skip
    return [
        calibrator.layer(
            layer,
            source.norms(layer),
            {name: [source.part(layer, part) for part in parts] for name, parts in LINEAR_PARTS.items()},
        )
        for layer in range(source.spec.layers)
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fp8_input_scales_are_the_activations_of_transformers(tmp_path: Path, family: str) -> None:
    source = open_source(save_tiny(tmp_path, family))
    model = tiny_model(family)
    seen: dict[str, float] = {}

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().amax()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row.tokens]))
    for layer, scales in enumerate(calibrate(source, "fp8")):
        for name, parts in LINEAR_PARTS.items():
            found = scales.groups[name].input_scale
            assert found is not None
            assert float(found) * 448 == pytest.approx(seen[f"model.layers.{layer}.{parts[0]}"], rel=1e-4)


def test_rows_do_not_see_each_other() -> None:
    batch = pack_rows(ROWS, torch.device("cpu"))[0]
    q, k, v = (
        torch.randn(sum(batch.lengths), 4, 8),
        torch.randn(sum(batch.lengths), 2, 8),
        torch.randn(sum(batch.lengths), 2, 8),
    )
    together = batch.attend()(q, k, v)
    first = batch.lengths[0]
    alone = pack_rows(ROWS[:1], torch.device("cpu"))[0].attend()(q[:first], k[:first], v[:first])
    torch.testing.assert_close(together[:first], alone)
    positions, targets = pack_rows([TextRow(tokens=(5, 6, 7, 8), prompt_tokens=2)], torch.device("cpu"))[
        0
    ].predictions()
    assert (positions.tolist(), targets.tolist()) == ([1, 2], [7, 8])


def test_smooth_scale_moves_the_range_by_alpha() -> None:
    weight, amax = torch.rand(8, 4) + 0.1, torch.tensor([1.0, 10.0, 100.0, 0.0])
    assert torch.equal(smooth_pre_scale(amax, [weight], 1.0)[:3], 1 / amax[:3])
    half = smooth_pre_scale(amax, [weight[:4], weight[4:]], 0.5)
    torch.testing.assert_close(half[:3], (weight.amax(dim=0) / amax).sqrt()[:3])
    assert half[3] == 1, "a silent input is left alone"


def test_smoothquant_beats_plain_int8_on_outlier_channels() -> None:
    torch.manual_seed(1)
    x = torch.randn(256, 128)
    x[:, 5] *= 80
    weight = LinearWeights(weight=dense(torch.randn(64, 128)))
    truth = linear_reference(x, weight)

    def error(alpha: float) -> float:
        pre = smooth_pre_scale(x.abs().amax(dim=0), [weight.weight.data], alpha)
        scales = GroupScales(pre_scale=pre, input_scale=(x * pre).abs().amax() / 127)
        (found,) = quantize_group([weight], SCHEMES["int8-sq"], scales)
        return float((linear_reference(x, found) - truth).norm() / truth.norm())

    plain = GroupScales(input_scale=x.abs().amax() / 127)
    (rough,) = quantize_group([weight], SCHEMES["int8-sq"], plain)
    assert error(0.5) < 0.5 * float((linear_reference(x, rough) - truth).norm() / truth.norm())


def test_awq_is_never_worse_than_rounding_and_much_better_with_salient_inputs() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(200, 256), torch.randn(64, 256)
    x[:, ::32] *= 30
    truth = x @ weight.T
    plain = float((x @ dequantize(quantize_int4(weight)).T - truth).norm())
    pre = awq_pre_scale(x.abs().mean(dim=0), [weight], x, group_size=128)
    linear = LinearWeights(weight=dense(weight))
    (found,) = quantize_group([linear], SCHEMES["int4"], GroupScales(pre_scale=pre))
    scaled = float((linear_reference(x, found) - truth).norm())
    assert scaled < 0.7 * plain
    clip = clip_ranges(weight, pre, x, group_size=128)
    (clipped,) = quantize_group([linear], SCHEMES["int4"], GroupScales(pre_scale=pre, clips=(clip,)))
    assert float((linear_reference(x, clipped) - truth).norm()) < scaled
    even = torch.randn(200, 256)
    pre = awq_pre_scale(even.abs().mean(dim=0), [weight], even, group_size=128)
    rounded = dequantize(quantize_int4(weight / pre)) * pre
    assert (even @ (rounded - weight).T).norm() <= (
        even @ (dequantize(quantize_int4(weight)) - weight).T
    ).norm() * 1.0001


@pytest.mark.parametrize("precision", ["int8", "int8-sq", "fp8", "int4"])
def test_blocks_of_rows_change_nothing(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [LinearWeights(weight=dense(torch.randn(rows, 256).bfloat16())) for rows in (20, 6)]
    pre = (torch.rand(256) + 0.5).bfloat16() if precision in ("int8-sq", "int4") else None
    clips = tuple(torch.rand(rows, 2) / 2 + 0.5 for rows in (20, 6)) if precision == "int4" else None
    scales = GroupScales(pre_scale=pre, clips=clips)
    whole = quantize_group(parts, SCHEMES[precision], scales)
    monkeypatch.setattr("trtkit.quant.in_cache._BLOCK_VALUES", 256 * 4)
    blocked = quantize_group(parts, SCHEMES[precision], scales)
    for one, other, part in zip(whole, blocked, parts, strict=True):
        assert one.weight.data.view(torch.uint8).equal(other.weight.data.view(torch.uint8))
        assert one.weight.scale is not None
        assert other.weight.scale is not None
        assert one.weight.scale.equal(other.weight.scale)
        close = effective_weight(one, dequantize(one.weight))
        assert (close - part.weight.data.float()).norm() / part.weight.data.float().norm() < 0.3
    if precision == "fp8":
        assert whole[0].weight.scale.equal(whole[1].weight.scale), "fused parts share their scale"  # type: ignore[union-attr]


def test_shared_scales_across_fused_parts(tmp_path: Path) -> None:
    source = open_source(save_tiny(tmp_path, "qwen2"))
    names: tuple[LinearName, ...] = ("qkv", "o", "gate_up", "down")
    for scales in calibrate(source, "int4"):
        assert all(scales.groups[name].pre_scale is not None for name in names)
        assert scales.groups["qkv"].clips is None
        assert scales.groups["gate_up"].clips is not None
    assert all(scales.kv_amax is not None and min(scales.kv_amax) > 0 for scales in calibrate(source, "int8-sq"))
    plain = calibrate(source, "int4", int4_awq=False)
    assert all(scales.groups[name].pre_scale is None for scales in plain for name in names)
