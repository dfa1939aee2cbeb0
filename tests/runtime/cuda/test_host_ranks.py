"""The host's side of a rank on a GPU: what it exchanges lies on the device and can be captured. No GPU is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from drafter.config import DrafterConfig, TreeShape
from tests.engines import random_prompts, request
from tests.examples import slow
from tests.runtime.cuda.fake_gpu import CUDA, FakeGpu, fake_gpu
from trtkit.bench.random_model import RandomWeights, random_drafter, shape_spec
from trtkit.checkpoint.rank_share import share_rows, share_spec
from trtkit.runtime.cuda import graphs
from trtkit.runtime.draft_head import with_kernels
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.scheme import Precision

RANKS = 2
WHOLE = dataclasses.replace(shape_spec("tiny"), layers=3, heads=8, kv_heads=4, intermediate=1024)
TREE = TreeShape(beams=3, length=2)
TREES = (None, TreeShape(beams=1, length=3), TREE)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    monkeypatch.setattr(graphs, "_WARM_UPS", 1)
    with fake_gpu(monkeypatch) as made:
        yield made


@dataclass
class _Ranks:
    """What NCCL asks for: contiguous tensors of the device. Any call of the host's while a step is captured fails."""

    rank: int
    gpu: FakeGpu
    size: int = RANKS
    calls: list[str] = field(default_factory=list)
    agreed: int = 0
    others: int | None = None
    """What the other rank says to ``least``."""

    def _seen(self, name: str, x: Tensor) -> Tensor:
        assert x.device.type == "cuda", f"{name} of a tensor of the host"
        assert x.is_contiguous(), f"{name} of a tensor with gaps"
        self.calls.append(name)
        return x

    def sum(self, x: Tensor) -> Tensor:
        return self._seen("sum", x)

    def gather(self, x: Tensor) -> list[Tensor]:
        return list(torch.cat([self._seen("gather", x.contiguous())] * self.size).chunk(self.size))

    def first(self, x: Tensor) -> Tensor:
        return self._seen("first", x.contiguous())

    def agree(self, number: int) -> int:
        assert not self.gpu.capturing
        self.agreed += 1
        return number

    def least(self, number: int) -> int:
        assert not self.gpu.capturing
        return number if self.others is None else min(number, self.others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share(RandomWeights):
    """One rank's weights, on the host as a checkpoint gives them."""

    def lm_head(self) -> Tensor:
        return share_rows(super().lm_head(), 0, RANKS)


def _engine(gpu: FakeGpu, precision: Precision, rank: int) -> tuple[TorchEngine, _Ranks]:
    ranks, cpu = _Ranks(rank, gpu), torch.device("cpu")
    weights = _Share(spec=share_spec(WHOLE, RANKS), precision=precision, device=cpu)
    model = DecoderModel(weights, device=CUDA, dtype=torch.bfloat16, max_tokens=4096, ranks=ranks)
    head = random_drafter(WHOLE, device=cpu, dtype=torch.bfloat16)
    head = with_kernels(head, device=CUDA, dtype=torch.bfloat16, ranks=ranks)
    limits = TorchLimits(rows=8, total_tokens=3000, kv_blocks=900)
    engine = TorchEngine(model, limits, Drafting(head=head, trees=TREES))
    for index, prompt in enumerate(random_prompts(0, [19, 2500])):
        engine.submit(request(str(index), prompt, max_tokens=400, top_p=0.9))
    return engine, ranks


@pytest.mark.parametrize(
    ("precision", "rank"), [("bf16", 0), ("fp8", 1), ("int4", 0), slow("bf16", 1), slow("fp8", 0), slow("int4", 1)]
)
def test_a_step_of_a_rank_is_captured_whole(gpu: FakeGpu, precision: Precision, rank: int) -> None:
    engine, ranks = _engine(gpu, precision, rank)
    for _ in range(40):
        engine.step()
    assert engine._graphs is not None
    assert engine._graphs._captures, "no step could be captured"
    assert all(graph.captured == 1 for graph in gpu.graphs)
    assert len({key.shape for key in engine._graphs._graphs}) == len(TREES)
    assert ranks.agreed >= 30
    waited, captured = gpu.waits, len(gpu.graphs)
    engine.step()
    assert len(gpu.graphs) == captured
    assert gpu.waits - waited == 1, "a step waits for its output and for nothing else"

    ranks.calls.clear()
    engine._graphs.step(engine._graphs.load(engine._scheduler.running, TREE))
    drafted = [name for name in ranks.calls if name == "gather"][1:]
    assert ranks.calls == [*drafted, "first", *["sum"] * 2 * WHOLE.layers, "gather"]
    layers = (
        1 + DrafterConfig(hidden_size=1, vocab_size=1, exit_dim=2).num_draft_layers + 2
    )  # output, blocks, the recurrence
    assert len(drafted) == layers * TREE.length

    held = engine._graphs  # as by a traceback
    engine.close()
    assert not len(held)
    assert not any(graph.captured for graph in gpu.graphs), "NCCL waits for graphs with its exchanges in them"


def test_all_ranks_replay_or_none(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warming up and recording take more exchanges than a step does: a rank that did so alone would wait for ever."""
    engine, ranks = _engine(gpu, "bf16", 1)
    ranks.others = 0
    for _ in range(3):
        engine.step()
    assert engine._graphs is not None
    assert not engine._graphs._captures
    assert [graph.replays for graph in gpu.graphs] == [0]

    engine, ranks = _engine(gpu, "bf16", 1)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("here")

    monkeypatch.setattr(engine._graphs, "_prepare", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="here"):
        engine.step()
