"""The CUDA linears on a device: real shapes, the tuner, graphs, and how close to the memory's speed they come."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.runtime.cuda.test_linear import KINDS, close, made
from trtkit.quant.tensor import linear_reference
from trtkit.runtime.cuda import tuning
from trtkit.runtime.cuda.choices import BUCKETS, LIBRARY, candidates
from trtkit.runtime.cuda.linear import CudaLinear
from trtkit.runtime.linear import runtime_linear

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]

CUDA = torch.device("cuda")
# o and down of a 14B: the two extremes of N and K that have to be split.
SHAPES = {"o": (5120, 5120), "down": (5120, 13824)}


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tuning.Table(tmp_path / "table.json")
    monkeypatch.setattr(tuning, "table_of", lambda device: table)


@pytest.fixture(autouse=True)
def _many_threads() -> Iterator[None]:
    """For the reference, which is the slow part."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_is_right(kind: str) -> None:
    """All that the tuner may choose, at the size at which a race or a wrong offset shows."""
    weights = made(kind, 1040, 5120, pre=kind in ("int8-sq", "int4"))
    linear = CudaLinear(weights, CUDA)
    gpu = tuning.gpu_of(CUDA)
    ran = 0
    for bucket in BUCKETS:
        x = torch.randn(bucket, 5120).bfloat16()
        wanted, on_device = linear_reference(x, weights), x.to(CUDA)
        for choice in candidates(linear.weights.shape, bucket, gpu):
            first, second = linear.run(on_device, choice), linear.run(on_device, choice)
            error = ((first.float().cpu() - wanted).norm() / wanted.norm()).item()
            rounded = choice == LIBRARY and kind in ("int8", "int4")
            assert error < (0.004 if rounded else 0.003), (choice, error)
            assert torch.equal(first, second), choice
            ran += 1
    assert ran > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 12, 33, 300])
def test_real_shapes(kind: str, name: str, rows: int) -> None:
    weights = made(kind, *SHAPES[name], pre=kind in ("int8-sq", "int4"))
    kernel = runtime_linear(weights, device=CUDA, dtype=torch.bfloat16)
    assert isinstance(kernel, CudaLinear)
    x = torch.randn(rows, SHAPES[name][1]).bfloat16()
    found, wanted = kernel(x.to(CUDA)), linear_reference(x, weights)
    assert (found.float().cpu() - wanted).norm() < 0.004 * wanted.norm()


def test_fp8_with_many_rows() -> None:
    weights = made("fp8", 512, 768)
    x = torch.randn(40, 768).bfloat16()
    close(CudaLinear(weights, CUDA).run(x.to(CUDA), LIBRARY), weights, x)


def test_float32_and_odd_shapes_take_the_plain_way() -> None:
    weights = made("int8", 64, 512)
    assert not isinstance(runtime_linear(weights, device=CUDA, dtype=torch.float32), CudaLinear)
    odd = made("int8", 60, 512)
    x = torch.randn(3, 512).bfloat16()
    found = runtime_linear(odd, device=CUDA, dtype=torch.bfloat16)(x.to(CUDA))
    wanted = linear_reference(x, odd)
    assert (found.float().cpu() - wanted).norm() < 0.006 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_linear_runs_in_a_graph(kind: str) -> None:
    weights = made(kind, 1024, 2048, pre=kind in ("int8-sq", "int4"))
    linear = CudaLinear(weights, CUDA)
    linear.prepare(16)
    for rows in (1, 12):
        x = torch.randn(rows, 2048).bfloat16().to(CUDA)
        eager = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        out.zero_()
        for _ in range(3):
            graph.replay()
        assert torch.equal(out, eager)


def test_a_second_linear_of_the_shape_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made("fp8", 1024, 1024)
    CudaLinear(weights, CUDA).prepare(1)
    monkeypatch.setattr(tuning, "fastest", lambda *_: pytest.fail("measured again"))
    CudaLinear(weights, CUDA).prepare(1)


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_products_come_near_the_memory(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A report more than a test: a third of the copy bandwidth is asked for, which only a broken kernel misses."""
    copied = _copy_bytes_per_second()
    lines = [f"{torch.cuda.get_device_name()}, copy {copied / 1e9:.0f} GB/s"]
    for columns, depth in ((7168, 5120), (5120, 5120), (27648, 5120), (5120, 13824)):
        weights = made(kind, columns, depth)
        linear = CudaLinear(weights, CUDA)
        size = columns * depth * {"bf16": 2.0, "int4": 0.5 + 2 / 128}.get(kind, 1.0)
        for rows in (1, 16, 32, 64):
            choice = linear.tune(rows)
            x = torch.randn(rows, depth, device=CUDA).bfloat16()
            spent = _graph_seconds(linear, x, copies=max(2, math.ceil(400e6 / size)))
            part = size / spent / copied
            lines.append(f"{kind:8}{columns:6} x {depth:<6} M={rows:<3} {1e6 * spent:7.1f} us  {part:5.2f}  {choice}")
            if rows == 1:
                assert part > 1 / 3, lines[-1]
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")


def _copy_bytes_per_second() -> float:
    source = torch.empty(1 << 30, dtype=torch.int8, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.numel() / _events(lambda: target.copy_(source), 10)


def _graph_seconds(linear: CudaLinear, x: torch.Tensor, copies: int) -> float:
    """One product within a graph of several, each of its own copy of the weights: none is found in the L2."""
    placed = linear.weights
    others = [linear]
    for _ in range(copies - 1):
        other = object.__new__(CudaLinear)
        other.__dict__.update(linear.__dict__)
        other.weights = dataclasses.replace(placed, codes=placed.codes.clone())
        others.append(other)
    for other in others:
        other(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for other in others:
            other(x)
    return _events(graph.replay, 20) / copies


def _events(run: Callable[[], object], repeats: int) -> float:
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats
