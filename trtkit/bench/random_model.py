"""Engines of a real model's shape without a checkpoint: random weights and a full cache, made on the device.

For speed alone. A decode step reads and multiplies the same bytes whatever they say, so nothing has to be downloaded,
written to a disk or prefilled before it can be timed; what such an engine emits is noise.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from drafter.tree import TokenTree
from trtkit.decoder import LINEAR_PARTS, LinearName, Norms
from trtkit.known_models import known_model
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.quant.tensor import LinearWeights, dense, quantize_fp8, quantize_int4, quantize_int8
from trtkit.runtime import decode
from trtkit.runtime.api import Request, SamplingParams
from trtkit.runtime.decode import Pending
from trtkit.runtime.draft_head import with_kernels
from trtkit.runtime.kv_cache import KvCache
from trtkit.runtime.ranks.group import Ranks
from trtkit.runtime.sampling import uniforms
from trtkit.runtime.scheduler import Schedule
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.scheme import Precision

__all__ = [
    "SHAPES",
    "RandomWeights",
    "StandingEngine",
    "forced_acceptance",
    "random_drafter",
    "random_head",
    "shape_spec",
    "standing_rows",
]

SHAPES = ("14b", "tiny")
_TINY = ModelSpec(
    family="qwen2", layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=384, vocab=512,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=True, qk_norm=False, tied=False, max_positions=4096,
    dtype="bfloat16",
)  # fmt: skip
_STD = 0.02
_INPUT_AMAX = 8.0
"""Assumed largest activation, for the static scales of 8-bit activations."""


def shape_spec(name: str) -> ModelSpec:
    """``14b`` (Qwen2.5-14B) or ``tiny`` (for tests of the benchmark itself)."""
    spec = known_model("fast-math-r1-14b") if name == "14b" else _TINY
    assert spec is not None
    return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeights:
    """The weights of ``spec`` in one precision, drawn when they are asked for; for :class:`DecoderModel`."""

    spec: ModelSpec
    precision: Precision
    device: torch.device

    def linear(self, layer: int, name: LinearName) -> LinearWeights:
        """One of the layer's four products, quantized on the device."""
        shapes = [self.spec.linear_shapes[part] for part in LINEAR_PARTS[name]]
        weight = self._draw(sum(out for out, _ in shapes), shapes[0][1])
        bias = self._draw(weight.shape[0]) if name == "qkv" and self.spec.qkv_bias else None
        if self.precision == "bf16":
            return LinearWeights(weight=dense(weight), bias=bias)
        if self.precision == "int8":
            return LinearWeights(weight=quantize_int8(weight, steps=128), bias=bias)
        if self.precision == "int4":
            return LinearWeights(weight=quantize_int4(weight), bias=bias)
        step = torch.tensor(_INPUT_AMAX / (448 if self.precision == "fp8" else 127), device=self.device)
        codes = quantize_fp8(weight) if self.precision == "fp8" else quantize_int8(weight, steps=127)
        return LinearWeights(weight=codes, bias=bias, input_scale=step)

    def norms(self, layer: int) -> Norms:
        """Ones."""
        ones = torch.ones(self.spec.hidden, dtype=torch.bfloat16, device=self.device)
        head = torch.ones(self.spec.head_dim, dtype=torch.bfloat16, device=self.device) if self.spec.qk_norm else None
        return Norms(input=ones, post=ones, q=head, k=head)

    def embedding(self) -> Tensor:
        """(V, H)."""
        return self._draw(self.spec.vocab, self.spec.hidden)

    def final_norm(self) -> Tensor:
        """(H,)."""
        return torch.ones(self.spec.hidden, dtype=torch.bfloat16, device=self.device)

    def lm_head(self) -> Tensor:
        """(V, H)."""
        return self._draw(self.spec.vocab, self.spec.hidden)

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """One step of an 8-bit cache is 1."""
        return None

    def _draw(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, _STD)


def random_drafter(spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> Drafter:
    """A draft head of the published shape: residual blocks twice as wide as the model."""
    config = DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=2 * spec.hidden)
    with torch.device("meta"):
        head = Drafter(config)
    head = head.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(0, _STD)
    return head


def random_head(
    spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, vocabulary: int | None = None,
    ranks: Ranks | None = None,
) -> Drafter:  # fmt: skip
    """A :func:`random_drafter` ready to run, or one that drafts only the first ``vocabulary`` tokens."""
    head = random_drafter(spec, device=device, dtype=dtype)
    if vocabulary is not None and vocabulary < spec.vocab:
        head.trim(torch.arange(vocabulary, device=device))
    return with_kernels(head, device=device, dtype=dtype, ranks=ranks)


def forced_acceptance(
    shares: Sequence[float], vocab: int, *, seed: int = 0
) -> Callable[[TokenTree, Pending, Tensor], Tensor]:
    """A ``Stepper.redraw`` under which chains are accepted to a given profile, whatever the model says.

    ``shares[d]`` of the row-steps accept more than d drafted tokens (falling). The draws at the accepted nodes are
    replaced by the drafted tokens, and the one after them by another token than the drafted one. Everything else, the
    sampling included, is computed as always. Which step accepts how much is a hash of ``seed`` + row and position.
    """

    def redraw(tree: TokenTree, at: Pending, picks: Tensor) -> Tensor:
        assert tree.chain
        rows = torch.arange(picks.shape[0], device=picks.device)
        uniform = uniforms(seed + rows, at.cached)
        accepted = torch.zeros_like(rows)
        for share in shares[: tree.levels]:
            accepted = accepted + (uniform < share)
        depth = torch.arange(tree.levels, device=picks.device)
        drafted, drawn = tree.tokens[:, 1:], picks[:, : tree.levels]
        other = torch.where(drawn == drafted, (drawn + 1) % vocab, drawn)
        forced = torch.where(depth < accepted[:, None], drafted, other)
        return torch.cat([forced, picks[:, tree.levels :]], dim=1)

    return redraw


class StandingEngine(TorchEngine):
    """An engine whose rows stand at the end of their prompts at once: the cache holds random numbers from the start.

    ``redraw`` forces an acceptance, see :func:`forced_acceptance`.
    """

    def force(self, redraw: Callable[[TokenTree, Pending, Tensor], Tensor]) -> None:
        """From now on, let ``redraw`` decide what is accepted. Before the first step only."""
        self._stepper = dataclasses.replace(self._stepper, redraw=redraw)
        self._graphs = None if self._graphs is None else self._fixed_steps()

    def fill_cache(self) -> None:
        """Random keys and values in every block."""
        _fill(self._stepper.cache, self._model.spec.layers)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    @property
    def head(self) -> Drafter | None:
        """What drafts."""
        return self._stepper.head

    @property
    def captured(self) -> int:
        """CUDA graphs that it has captured; 0 on a CPU, or where capturing failed."""
        return 0 if self._graphs is None else self._graphs.recorded

    def parts(self, shape: TreeShape | None) -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
        """The phases of the next step and the step itself as calls that can be repeated; and the step as the engine
        runs it, host and all. With fixed shapes only."""
        on, rows, graphs = self._stepper, self._scheduler.running, self._graphs
        assert graphs is not None
        self._discard_flight()
        shape = None if on.head is None else shape
        key = graphs.load(rows, shape)
        at, sampling = graphs.inputs(key)
        contexts = on.contexts.index_select(0, at.lines)

        def draft() -> TokenTree:
            if on.head is None or shape is None:
                return decode.root_only(at)
            return decode.draft(on.head, on.model, contexts, at, shape, fixed=True)

        tree = draft()
        verified = decode.verify(on.model, on.cache, at, tree)
        works: dict[str, Callable[[], object]] = {
            "draft": draft,
            "verify": lambda: decode.verify(on.model, on.cache, at, tree),
            "accept": lambda: decode.accept(on.cache, verified, tree, sampling, at, redraw=on.redraw),
            "step": lambda: graphs.step(key),
        }
        return works, lambda: graphs.run(rows, shape)

    def _prefill(self, plan: Schedule) -> None:
        self._stepper.cache.copy_blocks(plan.copies)
        for row in plan.recomputes:
            row.cached = len(row.tokens) - 1


def _fill(cache: KvCache, layers: int) -> None:
    for layer in range(layers):
        for pool in cache.pools(layer):
            for head in pool:
                values = torch.randn(head.shape, device=head.device)
                head.copy_(values.mul_(30).round_() if pool.dtype == torch.int8 else values)


def standing_rows(engine: StandingEngine, rows: int, context: int, new_tokens: int, vocab: int) -> None:
    """Submit ``rows`` requests with prompts of their own, so that no two share a block of the cache."""
    source = random.Random(0)
    common = tuple(source.randrange(vocab) for _ in range(context - 1))
    for row in range(rows):
        engine.submit(
            Request(
                id=str(row), prompt=(row % vocab, *common), sampling=SamplingParams(), max_tokens=new_tokens, seed=row
            )
        )
