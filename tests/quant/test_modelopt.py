"""Our calibration and nvidia-modelopt's, side by side on a tiny model: scales and codes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant.test_calibrate import ROWS, calibrate
from tests.tiny import save_tiny, tiny_model
from trtkit.checkpoint.hf import open_source
from trtkit.checkpoint.unified import open_unified
from trtkit.decoder import LINEAR_PARTS, causal_attention
from trtkit.quant.calibrate import CalibrationOptions, LayerScales
from trtkit.quant.group import quantize_group
from trtkit.quant.modelopt import ModeloptCalibrator, quantized_model
from trtkit.quant.tensor import linear_reference
from trtkit.runtime.model import DecoderModel
from trtkit.scheme import SCHEMES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def _modelopt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)


def both(directory: Path, precision: str, **options: Any) -> tuple[Any, list[LayerScales], list[LayerScales], Any]:
    source = open_source(directory)
    theirs = ModeloptCalibrator(directory, SCHEMES[precision], ROWS, options=CalibrationOptions(**options))
    found = [theirs.layer(layer, source.norms(layer), {}) for layer in range(source.spec.layers)]
    return source, calibrate(source, precision, **options), found, theirs.model


@pytest.mark.usefixtures("_modelopt")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fp8_scales_and_codes_agree(tmp_path: Path, family: str) -> None:
    source, ours, theirs, model = both(save_tiny(tmp_path, family), "fp8")
    for layer in range(source.spec.layers):
        for name, parts in LINEAR_PARTS.items():
            one, other = ours[layer].groups[name].input_scale, theirs[layer].groups[name].input_scale
            torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
            amaxes = [model.model.layers[layer].get_submodule(part).weight_quantizer.amax for part in parts]
            dense = [source.part(layer, part) for part in parts]
            found = quantize_group(dense, SCHEMES["fp8"], ours[layer].groups[name])
            assert found[0].weight.scale is not None
            assert float(found[0].weight.scale) == pytest.approx(float(torch.stack(amaxes).max()) / 448, rel=1e-6)
            if len(parts) == 1:
                from modelopt.torch.quantization.qtensor import FP8QTensor

                codes, _ = FP8QTensor.quantize(dense[0].weight.data)
                assert torch.equal(codes._quantized_data.float(), found[0].weight.data.float())


@pytest.mark.usefixtures("_modelopt")
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_smoothquant_scales_and_codes_agree(tmp_path: Path, alpha: float) -> None:
    source, ours, theirs, model = both(save_tiny(tmp_path), "int8-sq", smooth_alpha=alpha)
    for layer in range(source.spec.layers):
        for name, parts in LINEAR_PARTS.items():
            # Ours smooths a fused product with one joint weight maximum, modelopt averages: equal for single parts.
            if len(parts) > 1 and alpha != 1.0:
                continue
            one, other = ours[layer].groups[name], theirs[layer].groups[name]
            torch.testing.assert_close(one.pre_scale, other.pre_scale, rtol=1e-4, atol=0)
            torch.testing.assert_close(one.input_scale, other.input_scale, rtol=1e-3, atol=0)
            if len(parts) > 1:
                continue
            module = model.model.layers[layer].get_submodule(parts[0])
            (found,) = quantize_group([source.part(layer, parts[0])], SCHEMES["int8-sq"], other)
            scale = module.weight_quantizer.amax.float().reshape(-1) / 127
            torch.testing.assert_close(found.weight.scale, scale, rtol=1e-5, atol=0)
            # modelopt keeps the smoothed weight in the module.
            codes = (module.weight.float() / scale[:, None]).round().clamp(-128, 127)
            assert (codes == found.weight.data.float()).float().mean() > 0.999


@pytest.mark.usefixtures("_modelopt")
def test_awq_search_is_as_good_as_modelopts(tmp_path: Path) -> None:
    source, ours, theirs, model = both(save_tiny(tmp_path), "int4", int4_clip=False)
    generator = torch.Generator().manual_seed(0)
    for name, parts in LINEAR_PARTS.items():
        dense = [source.part(0, part) for part in parts]
        x = torch.randn(64, dense[0].weight.shape[1], generator=generator)
        truth = torch.cat([linear_reference(x, part) for part in dense], dim=1)

        def error(scales: LayerScales) -> float:
            found = quantize_group(dense, SCHEMES["int4"], scales.groups[name])  # noqa: B023
            product = torch.cat([linear_reference(x, part) for part in found], dim=1)  # noqa: B023
            return float((product - truth).norm() / truth.norm())  # noqa: B023

        assert error(ours[0]) < 1.1 * error(theirs[0])
        if len(parts) == 1:
            module = model.model.layers[0].get_submodule(parts[0])
            (found,) = quantize_group(dense, SCHEMES["int4"], theirs[0].groups[name])
            amax = module.weight_quantizer.amax.float().reshape(found.weight.scale.shape)
            torch.testing.assert_close(found.weight.scale, amax / 7, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("_modelopt")
@pytest.mark.parametrize("precision", ["fp8", "int8-sq", "int4"])
def test_modelopts_own_export_opens_and_runs(tmp_path: Path, precision: str) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    directory = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    model = quantized_model(directory, SCHEMES[precision], ROWS, CalibrationOptions())
    tokens = torch.tensor(ROWS[3].tokens)
    with torch.no_grad():
        plain, simulated = (m(tokens[None]).logits[0].float() for m in (tiny_model(dtype=torch.bfloat16), model))
    export_hf_checkpoint(model, export_dir=str(tmp_path / "export"))
    checkpoint = open_unified(tmp_path / "export")
    assert checkpoint.scheme.name == precision
    ours = DecoderModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_tokens=64)
    found = ours.logits(ours.forward(tokens, torch.arange(len(tokens)), lambda layer: causal_attention))
    # The export smooths fused products again, so the codes are not those of the simulation; the quality is.
    assert (found - plain).norm() < 1.3 * (simulated - plain).norm()
