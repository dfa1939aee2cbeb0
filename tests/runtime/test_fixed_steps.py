"""Decode steps of fixed shapes, as CUDA graphs need them: the same tokens, and nothing inside waits for the device."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.runtime import decode, sampling
from trtkit.runtime.api import Request, SamplingParams, SwitchPenalty
from trtkit.runtime.cuda.graphs import StepGraphs
from trtkit.runtime.cuda.step_input import padded_rows, padded_width
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.sampling import sampling_rows
from trtkit.runtime.scheduler import Row
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12
SHAPES = [None, TreeShape(beams=1, length=3), TreeShape(beams=4, length=4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300)


@pytest.fixture(scope="module")
def head() -> Drafter:
    torch.manual_seed(5)
    made = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32))
    return made.eval().requires_grad_(False)


def _engine(model: DecoderModel, head: Drafter, shape: TreeShape | None, **limits: Any) -> TorchEngine:
    drafting = None if shape is None else Drafting(head=head, trees=(shape,))
    return TorchEngine(model, TorchLimits(**{"rows": 8, "total_tokens": 200, "kv_blocks": 300, **limits}), drafting)


def _requests(seed: int, count: int = 8) -> list[Request]:
    prompts = random_prompts(seed, [1, 9, 33], vocab=VOCAB)
    sampling: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 4}]
    return [
        request(str(i), prompts[i % 3], seed=seed + i, max_tokens=1 + 9 * (i % 4), **sampling[i % 4])
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_stream_is_the_plain_stream(model: DecoderModel, head: Drafter, seed: int) -> None:
    """Rows that come and go, preemption, tables that grow: padding is invisible."""
    source = random.Random(seed)
    shape, rows, blocks = SHAPES[seed % 3], source.randint(1, 8), source.choice([16, 300])
    arrivals = source.choice([1, 100])
    requests = _requests(seed)
    plain = run_all(_engine(model, head, None), requests)
    engine = _engine(model, head, shape, rows=rows, kv_blocks=blocks, block_size=8, fixed_shapes=True)
    assert run_all(engine, requests, arrivals_per_step=arrivals) == plain


def test_rows_that_pad_a_greedy_batch_are_greedy_too(model: DecoderModel, head: Drafter) -> None:
    """Kernels prepare nothing but the most likely token of such a batch: another draw would read what nobody wrote."""
    engine = _engine(model, head, None, fixed_shapes=True)
    for index in range(3):
        engine.submit(request(str(index), (1, 2), max_tokens=9, temperature=0.0))
    engine.step()
    graphs = engine._graphs
    assert graphs is not None
    key = graphs.load(engine._scheduler.running, None)
    _, sampling = graphs.inputs(key)
    assert (key.rows, sampling.greedy) == (4, True)
    assert sampling.cold.all()


def _prepared(model: DecoderModel, head: Drafter, count: int) -> tuple[TorchEngine, list[Row]]:
    """An engine whose ``count`` rows stand in the middle of their samples."""
    engine = _engine(model, head, SHAPES[2], fixed_shapes=True)
    for i, prompt in enumerate(random_prompts(3, [5 + 11 * i for i in range(count)], vocab=VOCAB)):
        engine.submit(request(str(i), prompt, seed=i, max_tokens=60, temperature=float(i % 2)))
    for _ in range(3):
        engine.step()
    return engine, list(engine._scheduler.schedule(nodes=17).rows)


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_padded_step_is_the_step(model: DecoderModel, head: Drafter, shape: TreeShape | None) -> None:
    """Three rows in buffers for four, a table wider than needed: tokens, cache and contexts come out equal."""
    engine, rows = _prepared(model, head, 3)
    on, graphs = engine._stepper, engine._graphs
    assert graphs is not None
    before = [on.cache._keys.clone(), on.cache._values.clone(), on.contexts.clone()]
    nodes = 1 if shape is None else shape.max_nodes
    sampling = sampling_rows([r.request.sampling for r in rows], [r.request.seed for r in rows], model.device)
    path, _ = decode.decode_step(on, decode.pending(on.cache, rows, nodes), shape, sampling)
    expected = decode.emitted(path).tolist()
    after = [on.cache._keys.clone(), on.cache._values.clone(), on.contexts.clone()]
    for now, then in zip((on.cache._keys, on.cache._values, on.contexts), before, strict=True):
        now.copy_(then)
    lines, scores = graphs.run(rows, shape)
    assert lines == expected
    assert scores == [[], [], []]
    torch.testing.assert_close(on.contexts[:-1], after[2][:-1], rtol=1e-5, atol=1e-5)
    size = on.cache.block_size
    for row, (length, *_) in zip(rows, expected, strict=True):
        slots = [row.blocks[i // size] * size + i % size for i in range(row.cached + length)]
        for now, then in zip((on.cache._keys, on.cache._values), after, strict=False):
            layers, heads = now.shape[:2]
            kept, wanted = (pool.view(layers, heads, -1, 64)[:, :, slots] for pool in (now, then))
            torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-5)
            assert bool((kept != 0).any())


_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "repeat_interleave.Tensor")


class _NoWaiting(TorchDispatchMode):
    """Fails at operations that wait for the device, or copy from pageable host memory, on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.seen.add(name)
        assert not name.startswith(_WAITS), f"{name} waits for the device"
        if name.startswith("index"):
            masks = [part for part in args[1] or () if part is not None] if isinstance(args[1], list | tuple) else []
            assert all(mask.dtype != torch.bool for mask in masks), f"{name} with a mask waits for the device"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.8, "top_k": 4, "min_p": 0.1}]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_in_a_step_waits_for_the_device(
    model: DecoderModel, head: Drafter, shape: TreeShape | None, sampling: dict[str, float]
) -> None:
    engine, rows = _prepared(model, head, 3)
    for row in rows:
        row.request = dataclasses.replace(row.request, logprobs=True, sampling=SamplingParams(**sampling))
    graphs = StepGraphs(engine._stepper, max_rows=8, max_path=5)
    key = graphs.load(rows, shape)
    with _NoWaiting() as watched:
        graphs._advance(key)
    engine._tune(3, shape)
    assert "mm.default" in watched.seen or "addmm.default" in watched.seen, "the mode saw nothing"


@pytest.mark.parametrize("wait", ["item", "bool", "mask", "nonzero", "list"])
def test_the_watch_notices(wait: str) -> None:
    """The test above can fail."""
    x = torch.arange(3)
    work = {
        "item": lambda: x.max().item(),
        "bool": lambda: bool((x > 1).any()),
        "mask": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "list": lambda: torch.tensor([1, 2]),
    }[wait]
    with pytest.raises(AssertionError, match="waits for the device"), _NoWaiting():
        work()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_log_probabilities_are_those_of_the_plain_step(
    model: DecoderModel, head: Drafter, shape: TreeShape | None
) -> None:
    requests = [dataclasses.replace(r, logprobs=i != 1) for i, r in enumerate(_requests(4, count=3))]
    found: list[dict[str, list[float]]] = []
    for fixed in (False, True):
        engine = _engine(model, head, shape, fixed_shapes=fixed)
        scores: dict[str, list[float]] = {r.id: [] for r in requests}
        for r in requests:
            engine.submit(r)
        while engine.has_work:
            for output in engine.step():
                scores[output.request_id] += output.logprobs or ()
        found.append(scores)
    assert found[1].keys() == found[0].keys()
    for name, scores in found[0].items():
        assert found[1][name] == pytest.approx(scores, abs=1e-4)
    assert len(found[0]["2"]) == requests[2].max_tokens
    assert found[0]["1"] == []


def test_rows_with_a_switch_penalty_take_the_plain_step(model: DecoderModel, head: Drafter) -> None:
    penalty = SwitchPenalty(alpha=3.0, beta=20, tokens=(2, 3))
    prompts = random_prompts(2, [4, 9], vocab=VOCAB)
    requests = [request(str(i), p, seed=i, switch=penalty if i else None) for i, p in enumerate(prompts)]
    plain, _ = run_all(_engine(model, head, None), requests)
    assert run_all(_engine(model, head, SHAPES[1], fixed_shapes=True), requests)[0] == plain


@pytest.mark.parametrize("fixed", [False, True])
def test_an_id_may_come_back_with_another_seed(model: DecoderModel, head: Drafter, fixed: bool) -> None:
    engine = _engine(model, head, None, fixed_shapes=fixed)
    (prompt,) = random_prompts(2, [9], vocab=VOCAB)
    first, second = (run_all(engine, [request("a", prompt, seed=seed)])[0]["a"] for seed in (1, 2))
    fresh = _engine(model, head, None, fixed_shapes=fixed)
    assert second == run_all(fresh, [request("a", prompt, seed=2)])[0]["a"] != first


def test_sizes_are_few() -> None:
    assert [padded_rows(rows) for rows in (1, 3, 5, 9, 13, 17, 33, 65, 257, 400)] == [
        1, 4, 8, 12, 16, 24, 48, 96, 384, 512,
    ]  # fmt: skip
    assert [padded_width(blocks, 100) for blocks in (1, 2, 3, 33, 64, 65, 100)] == [1, 2, 4, 64, 64, 100, 100]


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_replay_is_the_plain_step(
    tmp_path: Path, head: Drafter, shape: TreeShape | None, kernels: str, overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On a GPU: graphs against steps launched kernel by kernel, greedy and sampled rows, batches that change, each
    step launched after the one before was read or ahead of that."""
    monkeypatch.setenv("TRTKIT_NATIVE", kernels)
    sampling._triton_runs.cache_clear()
    directory = save_tiny(tmp_path, vocab_size=VOCAB)
    device = torch.device("cuda")
    model = DecoderModel(open_unified(directory), device=device, dtype=torch.float32, max_tokens=300)
    head = head.to(device)
    try:
        requests = [*_requests(11), request("long", (1, 2, 3), seed=9, max_tokens=120)]
        plain = run_all(_engine(model, head, None, fixed_shapes=False), requests, arrivals_per_step=2)
        engine = _engine(model, head, shape, fixed_shapes=True, overlap=overlap)
        assert run_all(engine, requests, arrivals_per_step=2) == plain
        assert engine._graphs is not None
        assert len(engine._graphs) > 1
    finally:
        head.to("cpu")
