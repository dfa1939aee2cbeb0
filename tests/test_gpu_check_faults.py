"""What the GPU checklist says of backends with one fault each. Nothing is built: made-up engines answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.fakes import FakeEngine
from trtkit.gpu import profile_named
from trtkit.gpu_check.items import ITEMS
from trtkit.gpu_check.lab import TOKENS, Lab
from trtkit.gpu_check.run import Finding, check_gpu_host
from trtkit.recipe import Recipe
from trtkit.runtime.api import Request, StepOutput

Says: TypeAlias = Callable[[str, Request, bool | None], list[int]]
"""What the engine of a name answers to a request, with or without block reuse."""


def right(_engine: str, request: Request, _reuse: bool | None) -> list[int]:
    """A sample that depends on the prompt and, except at temperature 0, on the seed; no token comes twice or is 0."""
    begin = sum(request.prompt) % 1000 + (7000 * request.seed if request.sampling.temperature else 0)
    return [begin + place + 1 for place in range(request.max_tokens)]


def wrong(share: float, engine: str, *, reuse: bool | None = None) -> Says:
    """That engine errs in the last ``share`` of every sample."""

    def says(name: str, request: Request, reused: bool | None) -> list[int]:
        tokens = right(name, request, reused)
        kept = round(len(tokens) * (1 - share)) if (name, reused) == (engine, reuse) else len(tokens)
        return tokens[:kept] + [token + 1 for token in tokens[kept:]]

    return says


class MadeUp(Lab):
    """A laboratory without a backend."""

    def __init__(self, scratch: Path, devices: int, says: Says) -> None:
        super().__init__(scratch, "l4", devices)
        self._says = says

    def engine(self, name: str, recipe: Recipe, drafter: Path | None = None) -> Path:
        self.seconds[name] = 1.0
        return self.scratch / name

    def head(self) -> Path:
        return self.scratch / "head"

    def torch_tokens(self, recipe: Recipe) -> dict[str, list[int]]:
        return {request.id: right("torch", request, None) for request in self.cold()}

    def say(self, directory: Path, requests: Sequence[Request], *, reuse: bool | None = None) -> dict[str, list[int]]:
        return {request.id: self._says(directory.name, request, reuse) for request in requests}


Sets: TypeAlias = Callable[..., None]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sets:
    """Makes this machine a GPU host with such engines."""

    def sets(says: Says, devices: int = 2, engine: type[FakeEngine] = FakeEngine) -> None:
        @contextmanager
        def opened(_directory: Path, _options: object) -> Iterator[FakeEngine]:
            yield engine(lambda request: right("", request, None))

        where = "trtkit.gpu_check"
        monkeypatch.setattr(f"{where}.run.require_tensorrt_llm", lambda: "1.2.0")
        monkeypatch.setattr(f"{where}.run.cuda_device", lambda: ("NVIDIA L4", (8, 9)))
        monkeypatch.setattr(f"{where}.run.detect", lambda: profile_named("l4x2"))
        monkeypatch.setattr(f"{where}.run.Lab", lambda *_args, **_more: MadeUp(tmp_path, devices, says))
        monkeypatch.setattr(f"{where}.items.open_compiled", opened)

    return sets


@pytest.fixture
def check(host: Sets) -> Callable[..., Finding]:
    """Runs one item of the checklist: what does it find?"""

    def run(item: str, says: Says = right, **more: Any) -> Finding:
        host(says, **more)
        machine, found = check_gpu_host(only=[item])
        assert machine.detail == "TensorRT-LLM 1.2.0 on 2x NVIDIA L4 (8.9)"
        return found

    return run


def test_all_items_are_run_and_a_fault_of_one_is_its_own(host: Sets) -> None:
    host(wrong(0.6, "int4"))
    found = check_gpu_host()
    assert [item.name for item in found[1:]] == [f"{number} {name}" for number, (name, _) in enumerate(ITEMS, start=2)]
    # "names" looks at the installed package, and the made-up engine begins a sample again.
    assert {item.name for item in found if item.status != "ok"} - {"2 names"} == {
        "7 int4 engine", "13 continuing a sample",
    }  # fmt: skip


@pytest.mark.parametrize(
    "item", [name for name, _ in ITEMS if name not in ("names", "continuing a sample")]
)  # fmt: skip
def test_a_backend_without_fault_passes(check: Callable[..., Finding], item: str) -> None:
    found = check(item)
    assert (found.status, found.hint) == ("ok", ""), found.detail


@pytest.mark.parametrize(
    ("item", "says", "said"),
    [
        ("bf16 engine", wrong(0.6, "bf16"), "40% of 192 tokens equal: it computes another model"),
        ("fp8 engine", wrong(0.25, "fp8"), "75% of 192 tokens equal: more than rounding ties explain"),
        ("int8 KV cache", wrong(0.6, "kv-int8"), "another model"),
        ("seeds", lambda name, request, reuse: [1] * TOKENS, "two seeds gave the same sample"),
        ("KV block reuse", wrong(0.25, "bf16", reuse=True), "more than rounding ties"),
        ("ReDrafter, greedy", wrong(0.25, "redrafter-greedy"), "more than rounding ties"),
        ("ReDrafter with block reuse", wrong(0.25, "redrafter-greedy", reuse=True), "more than rounding ties"),
        ("two ranks", wrong(0.25, "two-ranks"), "more than rounding ties"),
    ],
)
def test_an_engine_that_says_something_else_fails(
    check: Callable[..., Finding], item: str, says: Says, said: str
) -> None:
    found = check(item, says)
    assert found.status == "fail"
    assert said in found.detail


def test_what_rounding_explains_is_no_fault(check: Callable[..., Finding]) -> None:
    assert check("fp8 engine", wrong(0.04, "fp8")).status == "ok"
    # The KV scales of the backends differ: more of it may.
    assert check("fp8 KV cache", wrong(0.4, "kv-fp8")).status == "ok"


@pytest.mark.parametrize(("zeros", "status"), [(1, "fail"), (0, "ok")])
def test_a_sampler_that_emits_token_zero_is_broken(check: Callable[..., Finding], zeros: int, status: str) -> None:
    """32 samples of 48 tokens; the plain engine's own zeros are no fault of the head."""

    def says(name: str, request: Request, reuse: bool | None) -> list[int]:
        few = 1 if name == "bf16" else 1 + zeros
        return [0] * few + right(name, request, reuse)[few:]

    found = check("ReDrafter, sampling", says)
    assert found.status == status
    assert f"token id 0 came {32 * (1 + zeros)} times in {32 * TOKENS}" in found.detail


def test_the_same_seed_may_give_another_sample_in_a_batch_and_that_is_said(check: Callable[..., Finding]) -> None:
    def says(name: str, request: Request, reuse: bool | None) -> list[int]:
        return [ord(request.id[-1])] * TOKENS if request.id != "2/0" else right(name, request, reuse)

    assert "the same seed gives the same sample" in check("seeds").detail
    found = check("seeds", says)
    assert (found.status, "DIFFERENT samples" in found.detail) == ("ok", True)


def test_one_gpu_cannot_show_two_ranks(check: Callable[..., Finding]) -> None:
    found = check("two ranks", devices=1)
    assert (found.status, "needs two GPUs" in found.detail) == ("info", True)


class NeverStops(FakeEngine):
    """Knows no stop ids."""

    def step(self) -> list[StepOutput]:
        for name, (request, left) in self._left.items():
            self._left[name] = (replace(request, stop_ids=()), left)
        return super().step()


class CancelsInSilence(FakeEngine):
    """Never says that a cancelled request has ended."""

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self._ended.clear()


class CancelsAll(FakeEngine):
    """A cancelled request takes the engine along."""

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self._script = lambda request: [1]


@pytest.mark.parametrize(
    ("item", "engine", "said"),
    [
        ("stop ids", NeverStops, "asked to stop at"),
        ("cancel", CancelsInSilence, "cancelled request ended as []"),
        ("cancel", CancelsAll, "afterwards 1 tokens came"),
        ("continuing a sample", FakeEngine, "more than rounding ties"),  # it begins again
    ],
)
def test_an_engine_that_does_something_else_fails(
    check: Callable[..., Finding], item: str, engine: type[FakeEngine], said: str
) -> None:
    found: Any = check(item, engine=engine)
    assert found.status == "fail"
    assert said in found.detail
