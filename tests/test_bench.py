from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines import tiny_engine_dir
from trtkit import bench
from trtkit.bench import BenchOptions, measure
from trtkit.errors import EngineError, UsageError


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BUFFER_BYTES", 1 << 20)


def test_points_and_document(tmp_path: Path) -> None:
    engine = tiny_engine_dir(tmp_path)
    options = BenchOptions(batches=(1, 4), prompt_tokens=8, new_tokens=6, repeats=2, device="cpu")
    document = json.loads(json.dumps(measure([engine], options).document(), allow_nan=False))
    assert document["machine"]["read_bytes_per_second"] > 0
    assert [point["batch"] for point in document["points"]] == [1, 4]
    for point in document["points"]:
        assert {"precision", "drafter", "batch", "tokens_per_second", "tokens_per_step", "roofline_fraction"} <= set(
            point
        )
        assert point["precision"] == "bf16"
        assert point["drafter"] is None
        assert point["tokens_per_step"] == 1.0
        assert point["roofline_fraction"] > 0


def test_bad_options_are_listed_together() -> None:
    with pytest.raises(UsageError) as caught:
        BenchOptions(batches=(0,), repeats=0)
    assert len(caught.value.offenders) == 2


def test_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        measure([tmp_path / "nothing"], BenchOptions())
    engine = tiny_engine_dir(tmp_path / "engine")
    with pytest.raises(UsageError, match="exceed the engine's 256"):
        measure([engine], BenchOptions(prompt_tokens=250, new_tokens=10, device="cpu"))
