"""The quantized model against the original on held-out text, layer by layer with both hidden states carried.

Both run in float32, so what is measured is the quantization (weights, static activation scales, 8-bit cache) and not
the rounding of a compute dtype. Letters: T tokens, K inputs, P predicted positions, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.checkpoint.hf import EMBEDDING, FINAL_NORM, LM_HEAD, HfCheckpoint
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.checkpoint.verify import relative_error
from trtkit.decoder import LINEAR_PARTS, Attend, Linear, LinearName, decoder_layer, rms_norm
from trtkit.errors import InputError
from trtkit.log import Progress
from trtkit.quant.batches import TextRow, TokenBatch, pack_rows
from trtkit.quant.calibrate import norms_on
from trtkit.quant.group import effective_weight
from trtkit.quant.in_cache import int8_matrix
from trtkit.quant.tensor import FP8_MAX, QuantTensor, dense, dequantize, quantize_activation
from trtkit.recipe import Quality
from trtkit.scheme import KvDtype, OutputLayer

__all__ = ["measure_quality"]

_POSITIONS = 512
_VOCAB_BLOCK = 16384
_WORST = 8


@dataclass(slots=True)
class _Sums:
    """Over predicted positions."""

    tokens: int = 0
    kl: float = 0.0
    agreed: int = 0
    loss: float = 0.0
    loss_reference: float = 0.0


@torch.no_grad()
def measure_quality(
    source: HfCheckpoint,
    built: UnifiedCheckpoint,
    rows: Sequence[TextRow],
    *,
    device: torch.device | None = None,
    output_layer: OutputLayer = "model",
) -> Quality:
    """Compare next-token distributions on the answers in ``rows``; ``output_layer`` is how lm_head will run.

    Raises :class:`InputError` when the rows hold nothing to predict.
    """
    if all(len(row.tokens) <= max(row.prompt_tokens, 1) for row in rows):
        raise InputError("the held-out text has no answer tokens", hint="give longer rows, or more of them")
    device = device or torch.device("cpu")
    batches = pack_rows(rows, device)
    embedding = source.shards.tensor(EMBEDDING)
    hidden = [F.embedding(batch.tokens.cpu(), embedding).float().to(device) for batch in batches]
    del embedding
    pairs = [(each, each) for each in hidden]
    errors: list[tuple[str, float]] = []
    with Progress("quality", total=source.spec.layers, unit="layers") as progress:
        for layer in range(source.spec.layers):
            errors += _run_layer(source, built, layer, batches, pairs)
            progress.advance()
    head = dense(source.shards.tensor(EMBEDDING if source.spec.tied else LM_HEAD))
    coded = head
    if output_layer == "int8":
        coded = int8_matrix(head.data, steps=128)
        errors.append(("lm_head", _blockwise_error(head, coded)))
    sums = _compare(source, batches, pairs, (head, coded))
    return Quality(
        tokens=sums.tokens,
        kl_mean=max(sums.kl / sums.tokens, 0.0),
        top1_agreement=sums.agreed / sums.tokens,
        perplexity=math.exp(min(sums.loss / sums.tokens, 700)),
        perplexity_bf16=math.exp(min(sums.loss_reference / sums.tokens, 700)),
        worst_tensors=tuple(sorted(errors, key=lambda pair: -pair[1])[:_WORST]),
    )


def _run_layer(
    source: HfCheckpoint, built: UnifiedCheckpoint, layer: int, batches: Sequence[TokenBatch],
    pairs: list[tuple[Tensor, Tensor]],
) -> list[tuple[str, float]]:  # fmt: skip
    """Advance both hidden states of every batch by one layer; returns the layer's weight errors."""
    device = batches[0].tokens.device
    spec, norms = source.spec, norms_on(source.norms(layer), device)
    errors: list[tuple[str, float]] = []
    plain: dict[LinearName, Callable[[Tensor], Tensor]] = {}
    quantized: dict[LinearName, Callable[[Tensor], Tensor]] = {}
    for name in LINEAR_PARTS:
        plain[name], quantized[name] = _products(source, built, layer, name, device, errors)
    for index, batch in enumerate(batches):
        rope, attend = batch.rope(spec, torch.float32), batch.attend()
        reference, approximate = pairs[index]
        cached = _through_cache(attend, built.scheme.kv_dtype, built.kv_scales(layer))
        pairs[index] = (
            decoder_layer(spec, norms, reference, rope, _linear(plain), attend),
            decoder_layer(spec, norms, approximate, rope, _linear(quantized), cached),
        )
    return errors


def _linear(products: dict[LinearName, Callable[[Tensor], Tensor]]) -> Linear:
    return lambda name, x: products[name](x)


def _products(
    source: HfCheckpoint, built: UnifiedCheckpoint, layer: int, name: LinearName, device: torch.device,
    errors: list[tuple[str, float]],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:  # fmt: skip
    """One product of both models, by definition but dequantized only once. Adds the parts' weight errors."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    # The stacked form, not part by part: it is what an engine loads.
    linear = built.linear(layer, name)
    dequantized = dequantize(linear.weight)
    start = 0
    for part in LINEAR_PARTS[name]:
        original = source.part(layer, part)
        rows = original.weight.shape[0]
        weights.append(original.weight.data.float())
        biases += [] if original.bias is None else [original.bias.float()]
        rounded = dequantized[start : start + rows]
        errors.append((f"layers.{layer}.{part}", relative_error(weights[-1], effective_weight(linear, rounded))))
        start += rows
    weight, approximate = torch.cat(weights).to(device), dequantized.to(device)
    bias = torch.cat(biases).to(device) if biases else None
    pre = None if linear.pre_scale is None else linear.pre_scale.float().to(device)
    scale = None if linear.input_scale is None else linear.input_scale.to(device)

    def quantized(x: Tensor) -> Tensor:
        x = x if pre is None else x * pre
        x = x if scale is None else quantize_activation(x, scale, linear.weight.format)
        return F.linear(x, approximate, bias)

    return lambda x: F.linear(x, weight, bias), quantized


def _through_cache(attend: Attend, kv_dtype: KvDtype, scales: tuple[float, float] | None) -> Attend:
    """Attention over keys and values that were rounded to the cache's format."""
    if kv_dtype == "model":
        return attend
    key, value = scales or (1.0, 1.0)

    def rounded(x: Tensor, scale: float) -> Tensor:
        steps = x / scale
        if kv_dtype == "fp8":
            return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
        return steps.round().clamp(-128, 127) * scale

    return lambda q, k, v: attend(q, rounded(k, key), rounded(v, value))


def _compare(
    source: HfCheckpoint, batches: Sequence[TokenBatch], pairs: Sequence[tuple[Tensor, Tensor]],
    heads: tuple[QuantTensor, QuantTensor],
) -> _Sums:  # fmt: skip
    """Run lm_head, as it was and as it will run, on the two final states, some positions at a time, and compare the
    distributions."""
    spec = source.spec
    norm = source.shards.tensor(FINAL_NORM)
    sums = _Sums()
    for batch, (reference, approximate) in zip(batches, pairs, strict=True):
        positions, targets = batch.predictions()
        for chunk, target in zip(torch.split(positions, _POSITIONS), torch.split(targets, _POSITIONS), strict=True):
            expected, found = (
                _log_probabilities(rms_norm(hidden[chunk], norm.to(hidden.device), spec.norm_eps), head)
                for hidden, head in zip((reference, approximate), heads, strict=True)
            )
            sums.tokens += chunk.numel()
            sums.kl += float(F.kl_div(found, expected, reduction="sum", log_target=True))
            sums.agreed += int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
            sums.loss_reference += float(F.nll_loss(expected, target, reduction="sum"))
            sums.loss += float(F.nll_loss(found, target, reduction="sum"))
    return sums


def _log_probabilities(hidden: Tensor, head: QuantTensor) -> Tensor:
    """(P, H) -> (P, V); the head is widened a block of the vocabulary at a time."""
    logits = [hidden @ block.T for block in _blocks(head, hidden.device)]
    return torch.cat(logits, dim=1).log_softmax(dim=1)


def _blocks(head: QuantTensor, device: torch.device) -> Iterator[Tensor]:
    """The rows of a head (V, H) in float32, some at a time."""
    for start in range(0, head.shape[0], _VOCAB_BLOCK):
        data = head.data[start : start + _VOCAB_BLOCK].to(device)
        scale = None if head.scale is None else head.scale[start : start + _VOCAB_BLOCK].to(device)
        yield dequantize(QuantTensor(data=data, scale=scale, format=head.format, shape=(len(data), head.shape[1])))


def _blockwise_error(head: QuantTensor, coded: QuantTensor) -> float:
    """``relative_error`` without a float32 copy of the whole head."""
    place = head.data.device
    lost = norm = 0.0
    for original, rounded in zip(_blocks(head, place), _blocks(coded, place), strict=True):
        lost += float((original - rounded).square().sum())
        norm += float(original.square().sum())
    return math.sqrt(lost / norm) if norm else 0.0
