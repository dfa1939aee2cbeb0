"""Statistics against transformers' own activations, and what the searches promise."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.hf import EMBEDDING, HfCheckpoint, open_source
from trtkit.decoder import LINEAR_PARTS, LinearName
from trtkit.quant.batches import TextRow, pack_rows
from trtkit.quant.calibrate import CalibrationOptions, LayerScales, LayerwiseCalibrator, _Statistics
from trtkit.quant.group import GroupScales, effective_weight, quantize_group
from trtkit.quant.search import awq_pre_scale, clip_ranges, smooth_pre_scale
from trtkit.quant.tensor import LinearWeights, dense, dequantize, linear_reference, quantize_int4
from trtkit.scheme import SCHEMES

ROWS = [TextRow(tokens=tuple((7 * i * n + n) % 320 for i in range(20 + 5 * n))) for n in range(1, 6)]


def calibrate(source: HfCheckpoint, precision: str, **options: object) -> list[LayerScales]:
    """The scales of every layer."""
    calibrator = LayerwiseCalibrator(
        source.spec, SCHEMES[precision], ROWS, source.shards.tensor(EMBEDDING),
        options=CalibrationOptions(**options),
    )  # fmt: skip
    return [
        calibrator.layer(
            layer,
            source.norms(layer),
            {name: [source.part(layer, part) for part in parts] for name, parts in LINEAR_PARTS.items()},
        )
        for layer in range(source.spec.layers)
    ]


def seen_by_transformers(family: str, **changes: object) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Inputs of every linear over all rows, (tokens, inputs), and the largest key and value that each layer caches."""
    model, seen = tiny_model(family, **changes), {}
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.model.layers]

    def record(name: str):
        def hook(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0][0])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        for row in ROWS:
            cache = model(torch.tensor([row.tokens]), use_cache=True).past_key_values
            for layer, held in enumerate(cache.layers):
                kept[layer].append((held.keys, held.values))
    largest = [
        (max(float(k.abs().max()) for k, _ in pairs), max(float(v.abs().max()) for _, v in pairs)) for pairs in kept
    ]
    return {name: torch.cat(inputs) for name, inputs in seen.items()}, largest


@pytest.fixture(params=[2048, 50], ids=["one batch", "several batches"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in batches of at most so many tokens."""
    monkeypatch.setattr("trtkit.quant.calibrate.pack_rows", functools.partial(pack_rows, tokens=request.param))


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_fp8_input_scales_are_the_activations_of_transformers(tmp_path: Path, family: str) -> None:
    source = open_source(save_tiny(tmp_path, family))
    seen, largest = seen_by_transformers(family)
    for layer, scales in enumerate(calibrate(source, "fp8")):
        for name, parts in LINEAR_PARTS.items():
            found = scales.groups[name].input_scale
            assert found is not None
            wanted = float(seen[f"model.layers.{layer}.{parts[0]}"].abs().max())
            assert float(found) * 448 == pytest.approx(wanted, rel=1e-4)
        assert scales.kv_amax == pytest.approx(largest[layer], rel=1e-4)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_follows_the_paper_on_the_activations_of_transformers(tmp_path: Path, alpha: float) -> None:
    """s = max|x|^alpha / max|w|^(1 - alpha) per input, weights joint over what reads it; x / s in 127 steps."""
    source = open_source(save_tiny(tmp_path))
    seen, _ = seen_by_transformers("qwen2")
    for layer, scales in enumerate(calibrate(source, "int8-sq", smooth_alpha=alpha)):
        for name, parts in LINEAR_PARTS.items():
            x = seen[f"model.layers.{layer}.{parts[0]}"].abs().amax(dim=0)
            weight = torch.cat([source.part(layer, part).weight.data for part in parts]).abs().amax(dim=0)
            s = x**alpha / weight ** (1 - alpha)
            found = scales.groups[name]
            torch.testing.assert_close(found.pre_scale, 1 / s, rtol=1e-3, atol=0)
            torch.testing.assert_close(found.input_scale, (x / s).max() / 127, rtol=1e-3, atol=0)


def test_a_search_over_several_batches_sees_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save_tiny(tmp_path, num_hidden_layers=1))
    whole = calibrate(source, "int4")  # more samples allowed than there are tokens
    seen, _ = seen_by_transformers("qwen2", num_hidden_layers=1)
    for name, parts in LINEAR_PARTS.items():
        x = seen[f"model.layers.0.{parts[0]}"]
        weights = [source.part(0, part).weight.data for part in parts]
        wanted = awq_pre_scale(x.abs().mean(dim=0), weights, x, group_size=128)
        torch.testing.assert_close(whole[0].groups[name].pre_scale, wanted, rtol=1e-3, atol=0)
    monkeypatch.setattr("trtkit.quant.calibrate.pack_rows", functools.partial(pack_rows, tokens=50))
    for one, other in zip(whole, calibrate(source, "int4"), strict=True):
        for name in LINEAR_PARTS:
            torch.testing.assert_close(one.groups[name].pre_scale, other.groups[name].pre_scale, rtol=1e-3, atol=0)
            for clips in zip(one.groups[name].clips or (), other.groups[name].clips or (), strict=True):
                assert (clips[0] == clips[1]).float().mean() > 0.98  # the order of sums decides ties


@pytest.mark.parametrize("precision", ["fp8", "int8-sq"])
def test_a_product_that_never_sees_anything_has_a_scale_to_divide_by(tmp_path: Path, precision: str) -> None:
    """Some published models carry layers that do nothing: zero up_proj, so that down_proj multiplies zeros."""
    source = open_source(save_tiny(tmp_path, num_hidden_layers=1))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scales = calibrate(source, precision)[0].groups["down"]
    assert scales.input_scale is not None
    assert scales.input_scale > 0
    (down,) = quantize_group([source.part(0, "mlp.down_proj")], SCHEMES[precision], scales)
    assert torch.equal(linear_reference(torch.zeros(1, 384), down), torch.zeros(1, 256))


def test_the_samples_of_a_search_are_spread_over_the_text() -> None:
    """Inputs of the first half of the text differ from those of the second."""
    seen = _Statistics()
    for batch in range(2):
        seen.add(torch.arange(1000.0)[:, None] + 1000 * batch, 10)
    (picked,) = torch.cat(seen.samples).T
    assert len(picked) == 20
    assert picked.diff().min() > 0
    assert torch.cat([picked, torch.tensor([2000.0])]).diff().max() < 200


def test_batches_hold_what_they_may_and_no_row_is_lost() -> None:
    """The memory of a pass is that of the largest batch."""
    lengths = [30, 0, 30, 40, 60, 41, 1, 250, 99, 1, 1]
    rows = [TextRow(tokens=tuple(range(length))) for length in lengths]
    batches = pack_rows(rows, torch.device("cpu"), tokens=100)
    assert [row for batch in batches for row in batch.rows] == [row for row in rows if row.tokens]
    sizes = [len(batch.tokens) for batch in batches]
    assert sizes == [sum(batch.lengths) for batch in batches]
    assert all(size <= 100 or len(batch.rows) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert all(one + batch.lengths[0] > 100 for one, batch in zip(sizes, batches[1:], strict=False)), "filled up"


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


@pytest.mark.parametrize("best_is", ["paper", "modelopt"])
def test_awq_finds_the_best_of_the_papers_and_modelopts_scales(best_is: str) -> None:
    torch.manual_seed(3)
    sizes, others = (torch.logspace(-1, 1, 256)[torch.randperm(256)] for _ in range(2))
    x, weight = torch.randn(60, 256) * sizes, torch.randn(32, 256)
    if best_is == "modelopt":
        weight *= others
    else:  # its mean weight means little where most weights of some inputs are 0
        weight *= (torch.rand(32, 256) < torch.linspace(0.15, 1, 256)[torch.randperm(256)]) / sizes.sqrt()
    weights = [weight[:24], weight[24:]]
    mean = x.abs().mean(dim=0)
    groups = weight.abs().view(32, 2, 128)
    relative = (groups / groups.amax(dim=2, keepdim=True)).mean(dim=0).flatten()

    def error(s: torch.Tensor) -> float:
        s = s / (s.max() * s.min()).sqrt()
        return float((x @ (dequantize(quantize_int4(weight * s)) / s - weight).T).norm())

    tenths = [step / 10 for step in range(11)]
    paper, modelopt = (
        min(error(mean**a) for a in tenths[:10]),
        min(error(mean**a / relative ** (1 - a)) for a in tenths),
    )
    best, other = (paper, modelopt) if best_is == "paper" else (modelopt, paper)
    assert best < 0.97 * other
    found = awq_pre_scale(mean, weights, x, group_size=128)
    assert error(1 / found) == pytest.approx(best, rel=1e-3)
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-3), "as large as small: fits 16 bits"


def test_every_group_is_clipped_where_its_own_product_errs_least() -> None:
    torch.manual_seed(4)
    x = torch.randn(50, 256) * torch.logspace(-1, 1, 256)[torch.randperm(256)]
    weight, pre = torch.randn(6, 256), torch.rand(256) + 0.5
    found = clip_ranges(weight, pre, x, group_size=128)
    shares = [1 - step / 20 for step in range(9)]
    products = []
    for share in shares:
        off = dequantize(quantize_int4(weight / pre, clip=torch.full((6, 2), share))) * pre - weight
        parts = [(x[:, at : at + 128] @ off[:, at : at + 128].T).square().sum(dim=0) for at in (0, 128)]
        products.append(torch.stack(parts, dim=1))
    best = torch.tensor(shares)[torch.stack(products).argmin(dim=0)]
    torch.testing.assert_close(found, best)
    assert len(found.unique()) > 2


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
        assert whole[0].weight.scale.equal(whole[1].weight.scale), "fused parts share their scale"


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
