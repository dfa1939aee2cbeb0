"""Calibration one layer at a time, the activations carried over: the memory of one layer plus the activations.

The pass is the unquantized model in float32. For each of a layer's four products it keeps, per input channel, the
largest and the mean magnitude, and a few sampled rows for the AWQ search. Letters: T tokens, K inputs, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.decoder import LINEAR_PARTS, LinearName, Norms, decoder_layer
from trtkit.model_spec import ModelSpec
from trtkit.quant.batches import TextRow, pack_rows
from trtkit.quant.group import GroupScales
from trtkit.quant.search import awq_pre_scale, clip_ranges, smooth_pre_scale
from trtkit.quant.tensor import FP8_MAX, LinearWeights
from trtkit.scheme import QuantScheme

__all__ = ["CalibrationOptions", "Calibrator", "DataFree", "LayerScales", "LayerwiseCalibrator", "Parts"]

Parts = Mapping[LinearName, Sequence[LinearWeights]]
"""The dense linears of a layer, by product."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """Choices of the scale searches."""

    smooth_alpha: float = 0.5
    int4_awq: bool = True
    int4_clip: bool = True
    samples: int = 512
    """Tokens per product that the AWQ search sees, spread evenly over the calibration text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScales:
    """What calibration decides for a layer."""

    groups: Mapping[LinearName, GroupScales]
    kv_amax: tuple[float, float] | None = None
    """Largest magnitudes of keys (after rotation) and values."""


class Calibrator(Protocol):
    """Called once per layer, in order, with the layer's unquantized weights."""

    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales: ...


class DataFree:
    """The calibrator of formats that need no data."""

    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        """No scales but those that the weights give."""
        return LayerScales(groups={name: GroupScales() for name in LINEAR_PARTS})


@dataclass(slots=True)
class _Statistics:
    """Of the inputs of one product."""

    amax: Tensor | None = None
    total: Tensor | None = None
    tokens: int = 0
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, samples: int) -> None:
        magnitude = x.abs()
        amax, total = magnitude.amax(dim=0), magnitude.sum(dim=0)
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)
        self.total = total if self.total is None else self.total + total
        self.tokens += x.shape[0]
        if samples:
            picks = torch.linspace(0, x.shape[0] - 1, min(samples, x.shape[0]), device=x.device).long()
            self.samples.append(x[picks])


class LayerwiseCalibrator:
    """Our own calibration. Holds the hidden states of all calibration rows between layers."""

    def __init__(
        self,
        spec: ModelSpec,
        scheme: QuantScheme,
        rows: Sequence[TextRow],
        embedding: Tensor,
        *,
        options: CalibrationOptions | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._spec = spec
        self._scheme = scheme
        self._dtype: torch.dtype = getattr(torch, spec.dtype)  # that of the scales; files may be wider
        self._options = options or CalibrationOptions()
        self._device = device or torch.device("cpu")
        self._batches = pack_rows(rows, self._device)
        self._hidden = [
            F.embedding(batch.tokens.to(embedding.device), embedding).float().to(self._device)
            for batch in self._batches
        ]

    @torch.no_grad()
    def layer(self, index: int, norms: Norms, parts: Parts) -> LayerScales:
        """Run the layer over all rows, then choose its scales."""
        statistics, kv_amax = self._run(norms, parts)
        groups = {name: self._scales(name, parts[name], statistics[name]) for name in LINEAR_PARTS}
        return LayerScales(groups=groups, kv_amax=kv_amax)

    def _run(self, norms: Norms, parts: Parts) -> tuple[dict[LinearName, _Statistics], tuple[float, float]]:
        statistics: dict[LinearName, _Statistics] = {name: _Statistics() for name in LINEAR_PARTS}
        weights = {
            name: torch.cat([part.weight.data for part in parts[name]]).to(self._device).float()
            for name in LINEAR_PARTS
        }
        biases = {
            name: torch.cat([part.bias for part in parts[name] if part.bias is not None]).to(self._device).float()
            for name in LINEAR_PARTS
            if parts[name][0].bias is not None
        }
        kv = torch.zeros(2)
        awq = self._scheme.weight_format == "int4" and self._options.int4_awq
        quota = -(-self._options.samples // max(len(self._batches), 1)) if awq else 0

        def linear(name: LinearName, x: Tensor) -> Tensor:
            statistics[name].add(x, quota)
            return F.linear(x, weights[name], biases.get(name))

        norms = norms_on(norms, self._device)
        for position, batch in enumerate(self._batches):
            inner = batch.attend()

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                kv.copy_(torch.maximum(kv, torch.stack([k.abs().amax(), v.abs().amax()]).cpu()))
                return inner(q, k, v)  # noqa: B023  (called before the loop goes on)

            rope = batch.rope(self._spec, torch.float32)
            self._hidden[position] = decoder_layer(self._spec, norms, self._hidden[position], rope, linear, attend)
        return statistics, (float(kv[0]), float(kv[1]))

    def _scales(self, name: LinearName, parts: Sequence[LinearWeights], seen: _Statistics) -> GroupScales:
        assert seen.amax is not None, "no calibration tokens"
        assert seen.total is not None
        weights = [part.weight.data.to(self._device) for part in parts]
        if self._scheme.activations == "fp8":
            return GroupScales(input_scale=_positive(seen.amax.amax() / FP8_MAX))
        if self._scheme.activations == "int8":
            pre = smooth_pre_scale(seen.amax, weights, self._options.smooth_alpha, dtype=self._dtype)
            scale = (seen.amax * pre.float()).amax() / 127
            return GroupScales(pre_scale=pre.cpu(), input_scale=_positive(scale))
        if self._scheme.weight_format != "int4" or not self._options.int4_awq:
            return GroupScales()
        size = self._scheme.group_size
        assert size is not None
        samples = torch.cat(seen.samples)
        pre = awq_pre_scale(seen.total / seen.tokens, weights, samples, group_size=size, dtype=self._dtype)
        clips = None
        # Clipping q and k changes where attention looks; AWQ's authors leave them alone too.
        if self._options.int4_clip and name != "qkv":
            clips = tuple(clip_ranges(weight, pre, samples, group_size=size).cpu() for weight in weights)
        return GroupScales(pre_scale=pre.cpu(), clips=clips)


def _positive(scale: Tensor) -> Tensor:
    return scale.float().clamp_min(_TINY).cpu()


def norms_on(norms: Norms, device: torch.device) -> Norms:
    """The norm weights on ``device``."""
    return Norms(
        input=norms.input.to(device),
        post=norms.post.to(device),
        q=None if norms.q is None else norms.q.to(device),
        k=None if norms.k is None else norms.k.to(device),
    )
