"""The decoder of an engine: a checkpoint's weights behind the forward of ``trtkit/decoder.py``.

Letters: T tokens (flat over rows and nodes), H hidden, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.checkpoint.hf import narrow
from trtkit.decoder import Attend, LinearName, Norms, PlainPointwise, Pointwise, Rope, Stream, rope_at, stream_layer
from trtkit.model_spec import ModelSpec
from trtkit.quant.in_cache import int8_matrix
from trtkit.quant.tensor import LinearWeights, dense, dequantize
from trtkit.runtime.cuda.kernels import open_cuda_kernels
from trtkit.runtime.cuda.linear import prepare_linears
from trtkit.runtime.linear import Kernel, runtime_linear
from trtkit.runtime.native.kernels import NativePointwise, open_kernels
from trtkit.runtime.native.layers import open_layers
from trtkit.runtime.ranks.group import Ranks, gather_columns
from trtkit.scheme import OutputLayer

__all__ = ["DecoderModel", "WeightSource"]

_NAMES: tuple[LinearName, ...] = ("qkv", "o", "gate_up", "down")


_SUMMED: tuple[LinearName, ...] = ("o", "down")
"""Products over a rank's share of their inputs: see ``checkpoint/rank_share.py``."""


@dataclass(frozen=True, slots=True)
class _Layer:
    norms: Norms
    kernels: dict[LinearName, Kernel]
    ranks: Ranks | None

    def linear(self, name: LinearName, x: Tensor) -> Tensor:
        product = self.kernels[name](x)
        return product if self.ranks is None or name not in _SUMMED else self.ranks.sum(product)


class WeightSource(Protocol):
    """What a model is made of, read once: a ``UnifiedCheckpoint``, or random numbers for a benchmark."""

    @property
    def spec(self) -> ModelSpec: ...

    def linear(self, layer: int, name: LinearName) -> LinearWeights: ...

    def norms(self, layer: int) -> Norms: ...

    def kv_scales(self, layer: int) -> tuple[float, float] | None: ...

    def embedding(self) -> Tensor: ...

    def final_norm(self) -> Tensor: ...

    def lm_head(self) -> Tensor: ...


class DecoderModel:
    """Weights on a device, ready to run."""

    def __init__(
        self, checkpoint: WeightSource, *, device: torch.device, dtype: torch.dtype, max_tokens: int,
        output_layer: OutputLayer = "model", ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """``ranks``: the processes that share the layers; ``checkpoint`` is then this one's ``RankShare``."""
        self.spec = checkpoint.spec
        self.ranks = ranks
        self.device = device
        self.dtype = dtype
        together = 1 if ranks is None else ranks.size
        self.native = open_kernels(together * self.spec.parameters, device, dtype)
        """Whether everything but the products runs on the C++ kernels."""
        cuda_kernels = open_cuda_kernels(device, dtype)
        self.triton = cuda_kernels is not None
        """Whether everything but the products runs on the Triton kernels."""
        self._pointwise: Pointwise = NativePointwise() if self.native else cuda_kernels or PlainPointwise()
        self._layers = [self._load_layer(checkpoint, index) for index in range(self.spec.layers)]
        self.embedding = self._held(checkpoint.embedding(), "the embedding").to(device=device, dtype=dtype)
        self._final_norm = checkpoint.final_norm().to(device).float()
        whole = [(layer.norms, layer.kernels) for layer in self._layers]
        at_once = self.native and ranks is None
        self.native_layers = open_layers(self.spec, whole, self._final_norm) if at_once else None
        """Every layer in one call, for decode steps on the C++ kernels. Ranks meet twice in each layer."""
        matrix = self._held(checkpoint.lm_head(), "lm_head")
        head = int8_matrix(matrix, steps=128) if output_layer == "int8" else dense(matrix)
        self._head = runtime_linear(LinearWeights(weight=head), device=device, dtype=dtype)
        scales = [checkpoint.kv_scales(index) for index in range(self.spec.layers)]
        self.kv_scales = None if None in scales else [pair for pair in scales if pair is not None]
        """Step sizes of an 8-bit KV cache, where the checkpoint was calibrated for one."""
        self._rope = rope_at(self.spec, torch.arange(max_tokens, device=device), dtype)

    def _load_layer(self, checkpoint: WeightSource, index: int) -> _Layer:
        linears = {name: checkpoint.linear(index, name) for name in _NAMES}
        stored = checkpoint.norms(index)
        # The scale in front of qkv and gate_up is the norm's own output scale: fold it in, in float32, for nothing.
        input_norm, linears["qkv"] = _fold(stored.input, linears["qkv"])
        post_norm, linears["gate_up"] = _fold(stored.post, linears["gate_up"])
        for name, weights in linears.items():
            self._check_held(weights, f"{name} of layer {index}")
        norms = Norms(
            input=input_norm.to(self.device),
            post=post_norm.to(self.device),
            q=None if stored.q is None else stored.q.float().to(self.device),
            k=None if stored.k is None else stored.k.float().to(self.device),
        )
        kernels = {
            name: runtime_linear(weights, device=self.device, dtype=self.dtype) for name, weights in linears.items()
        }
        return _Layer(norms, kernels, self.ranks)

    def _held(self, tensor: Tensor, where: str) -> Tensor:
        """``tensor``. Raises :class:`CheckpointError` when float16, which ends at 65504, is to hold it and cannot; the
        other dtypes have the range of what is stored."""
        return narrow(tensor, self.dtype, where) if self.dtype == torch.float16 else tensor

    def _check_held(self, weights: LinearWeights, where: str) -> None:
        if self.dtype != torch.float16:
            return
        if weights.weight.format in ("bf16", "int4"):  # the codes of the others are multiplied, then their scales
            self._held(dequantize(weights.weight), where)
        if weights.bias is not None:
            self._held(weights.bias, f"the bias of {where}")

    def prepare(self, tokens: int) -> None:
        """Let the CUDA kernels tune themselves for passes of up to ``tokens`` tokens: they cannot within a capture."""
        kernels = [kernel for layer in self._layers for kernel in layer.kernels.values()]
        prepare_linears([*kernels, self._head], tokens)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable[[int], Attend]) -> Tensor:
        """Hidden states after the final norm, (T, H), of tokens (T,) at positions (T,).

        ``attend(layer)`` is that layer's attention over the cache.
        """
        stream, rope = Stream(self.embed(tokens), None), self.rope(positions)
        for index, layer in enumerate(self._layers):
            stream = stream_layer(self.spec, layer.norms, stream, rope, layer.linear, attend(index), self._pointwise)
        assert stream.delta is not None
        return self._pointwise.add_norm(stream.hidden, stream.delta, self._final_norm, self.spec.norm_eps)[1]

    def rope(self, positions: Tensor) -> Rope:
        """The rotation of tokens at positions (T,)."""
        return Rope(self._rope.cos[positions], self._rope.sin[positions])

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings: ids (...) -> (..., H)."""
        return F.embedding(tokens, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, H) -> (T, V), on every rank."""
        logits = self._head(hidden)
        return logits if self.ranks is None else gather_columns(self.ranks, logits, self.spec.vocab)


def _fold(norm: Tensor, weights: LinearWeights) -> tuple[Tensor, LinearWeights]:
    if weights.pre_scale is None:
        return norm.float(), weights
    return norm.float() * weights.pre_scale.float(), dataclasses.replace(weights, pre_scale=None)
