"""The GPU checklist through the double: its experiments pass on a backend that works and notice one that does not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trtllm_double.install import forget_double, install_double
from trtkit.cli.app import run
from trtkit.gpu import profile_named
from trtkit.gpu_check.items import ITEMS
from trtkit.gpu_check.run import check_gpu_host


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    install_double(monkeypatch, tmp_path / "dist")
    monkeypatch.setattr("trtkit.gpu_check.run.cuda_device", lambda: ("NVIDIA L4", (8, 9)))
    monkeypatch.setattr("trtkit.gpu_check.run.detect", lambda: profile_named("l4x2"))
    yield monkeypatch
    forget_double()


def statuses(*only: str) -> dict[str, str]:
    return {item.name: item.status for item in check_gpu_host(torch_device="cpu", only=only)}


def test_the_checklist_in_the_docs_has_these_items() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tensorrt-llm.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(\d+)\. \*\*(.+?)\*\*:", text, flags=re.MULTILINE)
    wanted = ["the machine", *(name for name, _ in ITEMS)]
    assert listed == [(str(number), name) for number, name in enumerate(wanted, start=1)]


def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--gpu-check"]) == 1
    said = capsys.readouterr().out
    assert "TensorRT-LLM is not installed; no CUDA GPU" in said
    assert run(["doctor", "--only", "cancel"]) == 2
    assert run(["doctor", "--gpu-check", "--only", "cancle"]) == 2
    assert "did you mean 'cancel'" in capsys.readouterr().err


def test_what_works_passes(host: pytest.MonkeyPatch) -> None:
    assert statuses("names", "stop ids", "cancel", "continuing a sample", "ReDrafter, greedy", "two ranks") == {
        "1 the machine": "ok", "2 names": "ok", "10 stop ids": "ok", "11 cancel": "ok", "13 continuing a sample": "ok",
        "15 ReDrafter, greedy": "ok", "18 two ranks": "ok",
    }  # fmt: skip


@pytest.mark.slow
def test_every_item_passes(host: pytest.MonkeyPatch) -> None:
    found = statuses()
    assert len(found) == len(ITEMS) + 1
    assert set(found.values()) == {"ok"}


def test_a_setting_that_is_gone_is_named(host: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.plugin import PluginConfig

    host.delitem(PluginConfig.__annotations__, "use_fused_mlp")
    host.delattr(PluginConfig, "use_fused_mlp")
    item = check_gpu_host(torch_device="cpu", only=["names"])[1]
    assert (item.status, "PluginConfig.use_fused_mlp" in item.detail) == ("fail", True)


def test_other_tokens_are_another_model(host: pytest.MonkeyPatch) -> None:
    import tensorrt_llm.bindings.executor as bindings

    real = bindings.Executor._response

    def shifted(self: Any, output: Any) -> Any:
        response = real(self, output)
        response.result.output_token_ids[0][:] = [token ^ 1 for token in response.result.output_token_ids[0]]
        return response

    host.setattr(bindings.Executor, "_response", shifted)
    item = check_gpu_host(torch_device="cpu", only=["bf16 engine"])[1]
    assert item.status == "fail"
    assert "another model" in item.detail


def test_a_crash_is_a_finding(host: pytest.MonkeyPatch) -> None:
    import tensorrt_llm.bindings.executor as bindings

    def crash(self: Any, request: Any) -> int:
        raise IndexError("deep inside")

    host.setattr(bindings.Executor, "enqueue_request", crash)
    item = check_gpu_host(torch_device="cpu", only=["stop ids"])[1]
    assert item.status == "fail"
    assert "IndexError: deep inside" in item.detail
    assert "tensorrt_llm" in sys.modules
