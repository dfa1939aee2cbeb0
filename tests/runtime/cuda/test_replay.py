"""A recorded step, replayed for rows that have moved on, is the step: nothing is left in it of the batch that it was
recorded with. In plain torch, and with every kernel in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request
from tests.examples import slow
from tests.runtime.cuda.interpreting import correct_numerics
from tests.runtime.cuda.replaying import RecordedGraphs, record_launches
from trtkit.bench.random_model import RandomWeights
from trtkit.model_spec import ModelSpec, RopeSpec
from trtkit.quant.tensor import LinearWeights
from trtkit.runtime.cuda.choices import Choice, Shape, candidates
from trtkit.runtime.cuda.graphs import StepGraphs
from trtkit.runtime.cuda.linear import CudaLinear
from trtkit.runtime.cuda.tuning import gpu_of
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.scheme import KvDtype, Precision

CPU = torch.device("cpu")
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=2, length=2)
SPEC = ModelSpec(
    family="qwen2", layers=1, hidden=256, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=16,
    rope=RopeSpec(theta=1e4), norm_eps=1e-6, qkv_bias=True, qk_norm=True, tied=False, max_positions=128,
    dtype="bfloat16",
)  # fmt: skip


class _Weights(RandomWeights):
    """Some tokens are likelier than others."""

    def _draw(self, *shape: int) -> torch.Tensor:
        return 5 * super()._draw(*shape)


class _Engine(TorchEngine):
    """Its steps have fixed shapes; ``recorded``: they are replayed."""

    recorded = False

    def _fixed_steps(self) -> StepGraphs:
        kind = RecordedGraphs if self.recorded else StepGraphs
        return kind(
            self._stepper, max_rows=self._limits.rows, max_path=1 + self._chooser.max_length,
            max_drafts=0 if self._lookup is None else self._nodes - 1, prepare=self._tune,
        )  # fmt: skip


class _RecordedEngine(_Engine):
    recorded = True


def _chosen(shape: Shape, bucket: int) -> Choice:
    """Another kernel for each shape: with and without parts of sums, of the activations' codes."""
    options = [option for option in candidates(shape, bucket, gpu_of(CPU)) if option.kernel != "library"]
    return options[(7 * shape.columns + 3 * bucket) % len(options)]


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU has graphs of its own: tests/runtime/test_fixed_steps.py")
    for room in ("cuda.kernels", "cuda.linear"):
        monkeypatch.setattr(f"trtkit.runtime.{room}.triton_runs", lambda _device: True)
    monkeypatch.setattr("trtkit.runtime.sampling._triton_runs", lambda *_: True)
    monkeypatch.setattr("trtkit.runtime.cuda.tuning.table_of", lambda _: SimpleNamespace(get=_chosen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    correct_numerics(monkeypatch)
    record_launches(monkeypatch)


def _linear(weights: LinearWeights, *, device: torch.device, dtype: torch.dtype) -> CudaLinear:
    return CudaLinear(weights, device)


def _told(
    model: DecoderModel, drafting: Drafting | None, kind: type[_Engine], *, cuts: bool, **limits: Any
) -> tuple[dict[str, list[Any]], _Engine]:  # fmt: skip
    """What an engine says of rows that come and go, some with ``cuts`` (on a CPU plain torch looks at numbers then)."""
    given = TorchLimits(
        rows=4, total_tokens=60, kv_blocks=60, block_size=4, fixed_shapes=True,
        overlap=drafting is None or not drafting.lookup, **limits,
    )  # fmt: skip
    engine = kind(model, given, drafting)
    prompts = random_prompts(3, [2, 7, 5], vocab=SPEC.vocab)
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8}, {"top_p": 0.8}, {"top_k": 3}]
    kinds = kinds[: 4 if cuts else 2]
    queue = [
        request(str(i), prompts[i % 3], seed=i, max_tokens=3 + 3 * (i % 3), **kinds[i % len(kinds)]) for i in range(4)
    ]
    queue[1] = dataclasses.replace(queue[1], logprobs=True)
    told: dict[str, list[Any]] = {made.id: [] for made in queue}
    while queue or engine.has_work:
        for made in queue[:2]:
            engine.submit(made)
        queue = queue[2:]
        for output in engine.step():
            told[output.request_id] += [*output.tokens, *(output.logprobs or ()), output.finish]
    return told, engine


@pytest.mark.parametrize(
    ("precision", "dtype", "kv_dtype", "tree", "lookup", "kernels"),
    [
        ("bf16", torch.float32, "model", TREE, False, False),
        slow("bf16", torch.float32, "model", TREE, False, True),
        slow("int8", torch.bfloat16, "int8", None, False, True),
        slow("fp8", torch.bfloat16, "fp8", TREE, False, True),
        slow("int4", torch.bfloat16, "model", CHAIN, True, True),
    ],
)
@torch.inference_mode()
def test_a_replay_is_the_step(
    precision: Precision, dtype: torch.dtype, kv_dtype: KvDtype, tree: TreeShape | None, lookup: bool, kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dtype == torch.bfloat16:
        monkeypatch.setattr("trtkit.runtime.model.runtime_linear", _linear)
    if not kernels:
        monkeypatch.setattr("trtkit.runtime.model.open_cuda_kernels", lambda *_: None)
        monkeypatch.setattr("trtkit.runtime.sampling._triton_runs", lambda *_: False)
    weights = _Weights(spec=SPEC, precision=precision, device=CPU)
    model = DecoderModel(weights, device=CPU, dtype=dtype, max_tokens=64)
    drafting = None
    if tree is not None:
        head = Drafter(DrafterConfig(hidden_size=SPEC.hidden, vocab_size=SPEC.vocab, exit_dim=32)).to(dtype).eval()
        drafting = Drafting(head=None if lookup else head.requires_grad_(False), trees=(tree,), lookup=lookup)
    run = functools.partial(_told, model, drafting, cuts=kernels, kv_dtype=kv_dtype)
    told, engine = run(_RecordedEngine)
    graphs = engine._graphs
    assert isinstance(graphs, RecordedGraphs)
    assert graphs.recorded > len(graphs) > 1
    assert any(recording.replays > 1 for recording in graphs.recordings)
    assert told == run(_Engine)[0]
