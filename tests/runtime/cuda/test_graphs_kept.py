"""How many graphs of steps there are, what memory they may take, and what a step that makes one counts as. No GPU is
needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tests.engines import request
from tests.runtime.cuda.fake_gpu import FakeGpu
from tests.runtime.cuda.test_host_path import _engine as make_engine
from tests.runtime.cuda.test_host_path import _finish as finish
from tests.runtime.cuda.test_host_path import _model as make_model
from tests.runtime.cuda.test_host_path import gpu as gpu
from trtkit.runtime.cuda import graphs, tuning
from trtkit.runtime.cuda.step_input import StepKey
from trtkit.runtime.torch_engine import TorchEngine


def _captures(engine: TorchEngine, rows: int, tokens: int = 3) -> int:
    """How many a batch takes."""
    assert engine._graphs is not None
    before = engine._graphs.recorded
    for index in range(rows):
        engine.submit(request(str(index), (1, 2, 3), max_tokens=tokens))
    finish(engine)
    return engine._graphs.recorded - before


def test_graphs_of_long_ago_are_given_back(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some memory, and a long run has hundreds of kinds of steps: by rows, widths, trees and cuts."""
    monkeypatch.setattr(graphs, "graphs_kept", lambda _free, _layers: 3)
    engine = make_engine(make_model())
    made = [_captures(engine, rows) for rows in (1, 2, 4, 8, 4, 8, 1, 4)]
    assert made == [1, 1, 1, 1, 0, 0, 1, 0], "the one of one row made room for that of eight"
    assert sum(graph.captured for graph in gpu.graphs) == 3
    assert _captures(engine, 2, tokens=100) > 1, "wider block tables"
    assert sum(graph.captured for graph in gpu.graphs) == 3


def test_a_capture_that_finds_no_memory_is_tried_again_with_fewer_graphs(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph takes is a guess; steps without any are several times slower."""
    engine = make_engine(make_model())
    assert [_captures(engine, rows) for rows in (1, 2, 4)] == [1, 1, 1]
    assert engine._graphs is not None
    record = engine._graphs._record

    def recorded(key: StepKey) -> Any:
        if sum(graph.captured for graph in gpu.graphs) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return record(key)

    monkeypatch.setattr(engine._graphs, "_record", recorded)
    assert [_captures(engine, rows) for rows in (8, 4, 8, 2)] == [1, 0, 0, 1]
    assert engine._graphs._captures
    assert len(engine._graphs) == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_waited_for_a_capture_is_no_measure_of_its_tree(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """A wider block table takes a graph of its own, long after the first steps of that tree."""
    engine = make_engine(make_model(), overlap=overlap)
    observed: list[object] = []
    monkeypatch.setattr(engine._chooser, "observe", lambda *_, **__: observed.append(1))
    assert engine._graphs is not None
    for index in range(2):
        engine.submit(request(str(index), (1, 2, 3), max_tokens=70))
    while engine.has_work:
        recorded, before = engine._graphs.recorded, len(observed)
        engine.step()
        assert len(observed) - before == (engine._graphs.recorded == recorded)
    assert engine._graphs.recorded == 4, "1, 2, 4 and 8 blocks"


def test_how_many_graphs_are_kept() -> None:
    l4 = graphs.graphs_kept(3 << 29, 48)
    assert l4 * 48 * graphs._BYTES_A_LAYER <= 3 << 28, "half of what is left free beside the KV cache of a 14B"
    assert graphs.graphs_kept(6 << 30, 48) == 85
    assert graphs.graphs_kept(100 << 30, 2) == graphs._MOST_KEPT


def test_where_no_memory_is_left_to_tune_in_steps_are_captured_all_the_same(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late in a run the quarter of a GB that the tuner reads between two measurements may not be there."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.measures = True
    monkeypatch.setattr(tuning, "fastest", full)
    engine = make_engine(make_model("fp8"))
    engine.submit(request("a", (1, 2, 3), max_tokens=3))
    finish(engine)
    assert engine._graphs is not None
    assert engine._graphs._captures
