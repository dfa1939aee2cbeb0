"""The same calibration through nvidia-modelopt (extra ``modelopt``): its statistics and its scale searches.

ModelOpt works on the whole transformers model in memory. Where it chooses one pre-scale per linear, the parts of a
fused product (q, k, v; gate, up) get the mean of theirs, as in ModelOpt's own export.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.errors import MissingDependency, UnsupportedError
from trtkit.quant.batches import TextRow
from trtkit.quant.calibrate import CalibrationOptions, LayerScales, Parts
from trtkit.quant.group import GroupScales
from trtkit.quant.tensor import FP8_MAX
from trtkit.scheme import QuantScheme

__all__ = ["ModeloptCalibrator", "quantized_model", "require_modelopt"]


class ModeloptCalibrator:
    """Calibrates the whole model when it is made; :meth:`layer` hands the scales out."""

    def __init__(
        self,
        directory: Path,
        scheme: QuantScheme,
        rows: Sequence[TextRow],
        *,
        options: CalibrationOptions | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._scheme = scheme
        if scheme.kv_dtype != "model":
            raise UnsupportedError(
                "--calibrator modelopt does not calibrate an 8-bit KV cache", hint="use --calibrator trtkit"
            )
        self.model = quantized_model(directory, scheme, rows, options or CalibrationOptions(), device)

    @torch.no_grad()
    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        """ModelOpt's scales for a layer."""
        layer = self.model.model.layers[index]
        groups = {
            name: self._group([layer.get_submodule(member) for member in members], name)
            for name, members in LINEAR_PARTS.items()
        }
        return LayerScales(groups=groups)

    def _group(self, linears: Sequence[Any], name: LinearName) -> GroupScales:
        quantizers = [linear.input_quantizer for linear in linears]
        if self._scheme.activations == "fp8":
            return GroupScales(input_scale=_largest(quantizers).cpu() / FP8_MAX)
        given = [quantizer.pre_quant_scale for quantizer in quantizers]
        if any(scale is None for scale in given):
            return GroupScales()
        pre = torch.stack([scale.float().reshape(-1) for scale in given]).mean(dim=0).to(given[0].dtype).cpu()
        if self._scheme.activations != "int8":
            return GroupScales(pre_scale=pre)
        # Per-channel maxima of the unscaled activation, the same for all parts: they read one input.
        amax = quantizers[0]._amax_for_smoothing.float().reshape(-1).cpu()
        return GroupScales(pre_scale=pre, input_scale=(amax * pre.float()).amax() / 127)


def _largest(quantizers: Sequence[Any]) -> Tensor:
    return torch.stack([quantizer.amax.float().amax() for quantizer in quantizers]).amax()


def quantized_model(
    directory: Path,
    scheme: QuantScheme,
    rows: Sequence[TextRow],
    options: CalibrationOptions,
    device: torch.device | None = None,
) -> Any:
    """The transformers model with ModelOpt's calibrated quantizers in it."""
    mtq = require_modelopt()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True, torch_dtype="auto")
    model = model.to(device or torch.device("cpu")).eval()
    algorithms: dict[str, tuple[str, Any]] = {
        "int8-sq": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": options.smooth_alpha}),
        "fp8": ("FP8_DEFAULT_CFG", "max"),
        "int4": ("INT4_AWQ_CFG", {"method": "awq_lite", "alpha_step": 0.1}),
    }
    name, algorithm = algorithms[scheme.name]
    config = copy.deepcopy(getattr(mtq, name))
    config["algorithm"] = algorithm

    def run(target: Any) -> None:
        for row in rows:
            target(torch.tensor([row.tokens], device=target.device))

    with torch.no_grad():
        return mtq.quantize(model, config, run)


def require_modelopt() -> Any:
    """``modelopt.torch.quantization``. Raises :class:`MissingDependency`."""
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as problem:
        raise MissingDependency(
            f"--calibrator modelopt needs nvidia-modelopt ({problem})",
            hint='pip install "trtkit[modelopt]", or use --calibrator trtkit',
        ) from problem
    return mtq
