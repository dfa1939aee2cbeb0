"""What can be tried for a product, what is taken unmeasured, and what is remembered. Plain data: no kernel runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from trtkit.quant.tensor import LinearWeights, dense
from trtkit.runtime.cuda import tuning
from trtkit.runtime.cuda.choices import BUCKETS, LIBRARY, Gpu, Kind, Shape, bucket_of, candidates, default_choice
from trtkit.runtime.cuda.linear import CudaLinear, prepare_linears
from trtkit.runtime.cuda.workspace import Workspace

H200 = Gpu(sms=132, capability=(9, 0), shared_bytes=227 << 10)
L4 = Gpu(sms=58, capability=(8, 9), shared_bytes=99 << 10)
KINDS: tuple[Kind, ...] = ("bf16", "int8", "int8-sq", "fp8", "int4")


def shape(kind: Kind, columns: int = 5120, depth: int = 5120) -> Shape:
    return Shape(kind=kind, columns=columns, depth=depth, prepared_input=kind in ("int8-sq", "fp8"))


def test_rows_go_to_the_next_larger_bucket() -> None:
    assert [bucket_of(rows) for rows in (1, 2, 16, 17, 64, 256, 257)] == [1, 16, 16, 32, 64, 256, None]


@pytest.mark.parametrize("gpu", [H200, L4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bucket_has_candidates(kind: Kind, gpu: Gpu) -> None:
    for bucket in BUCKETS:
        found = candidates(shape(kind), bucket, gpu)
        assert found
        assert len(found) == len(set(found))
        for choice in found:
            if choice.kernel == "product":
                assert choice.rows * -(-bucket // choice.rows) >= bucket
                assert choice.splits * choice.depth <= 5120
                assert gpu is H200 or not choice.swap


def test_unmeasured_products_fill_the_gpu() -> None:
    for kind in ("int8", "int8-sq", "fp8", "int4"):
        choice = default_choice(shape(kind), 16, H200)
        programs = -(-5120 // choice.columns) * choice.splits
        assert 2 * H200.sms <= programs <= 4 * H200.sms, (kind, choice)
        assert default_choice(shape(kind), None, H200) == LIBRARY
    assert default_choice(shape("bf16"), 1, H200) == LIBRARY


def test_int8_codes_have_no_library_product_of_few_rows() -> None:
    assert LIBRARY not in candidates(shape("int8-sq"), 16, H200)
    assert LIBRARY in candidates(shape("int8-sq"), 32, H200)


def test_the_table_survives_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "cuda" / "table.json"
    choice = candidates(shape("fp8"), 16, H200)[1]
    tuning.Table(path).put(shape("fp8"), 16, choice, 12.345)
    again = tuning.Table(path)
    assert again.get(shape("fp8"), 16) == choice
    assert again.get(shape("fp8"), 32) is None
    again.put(shape("int4"), 16, choice, 1.0)
    assert tuning.Table(path).get(shape("fp8"), 16) == choice


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": {"choice": {"kernel": "product", "new": 1}}}'])
def test_a_damaged_table_is_an_empty_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    assert tuning.Table(path).get(shape("fp8"), 16) is None


def test_a_table_that_may_not_be_looked_at_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME=/root in a container that runs as another user."""

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refused)
        table = tuning.Table(tmp_path / "table.json")
    assert table.get(shape("fp8"), 16) is None


def test_preparing_measures_each_shape_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, measured = tuning.Table(tmp_path / "table.json"), []

    def fastest(options: list[object], run: object, device: torch.device) -> tuple[object, float]:
        measured.append(len(options))
        return LIBRARY, 1.0

    monkeypatch.setattr(tuning, "table_of", lambda device: table)
    monkeypatch.setattr(tuning, "fastest", fastest)
    pair = [CudaLinear(LinearWeights(weight=dense(torch.randn(32, 64))), torch.device("cpu")) for _ in range(2)]
    prepare_linears([*pair, lambda x: x], 20)
    assert len(measured) == 3  # buckets 1, 16 and 32
    assert all(linear.choice(17) == LIBRARY for linear in pair)
    assert len(json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))) == 3


@pytest.mark.parametrize("alive", [True, False])
def test_a_kernel_that_takes_the_device_along_is_named(monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """After an illegal access every kernel fails: the others are not to blame, and none may be chosen."""
    options = candidates(shape("fp8"), 16, H200)[:3]

    def time(run: Callable[[], object], _other: torch.Tensor) -> float:
        if run() == options[1]:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return 2.0 if run() == options[0] else 1.0

    def synchronize(_device: object) -> None:
        if not alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "_microseconds", time)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    cpu = torch.device("cpu")
    if alive:
        assert tuning.fastest(options, lambda option: option, cpu) == (options[2], 1.0)
    else:
        with pytest.raises(RuntimeError, match=f"columns={options[1].columns}.*illegal memory access"):
            tuning.fastest(options, lambda option: option, cpu)


def test_a_grown_workspace_keeps_what_graphs_may_use() -> None:
    space = Workspace(torch.device("cpu"))
    space.reserve(partial=10, tiles=4)
    old = space.partial.data_ptr()
    space.reserve(partial=5, tiles=4)
    assert space.partial.data_ptr() == old
    kept = space.partial
    space.reserve(partial=20)
    assert space.partial.numel() == 20
    assert any(tensor is kept for tensor in space._retired)
    assert space.arrived.tolist() == [0, 0, 0, 0]
