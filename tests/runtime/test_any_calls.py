"""Whatever is asked of an engine, and whenever: each request says what it would say alone, and no block is lost."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, run_all
from tests.examples import examples
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import RequestError
from trtkit.runtime.api import FinishReason, Request, SamplingParams
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.prefill import PART_TOKENS
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB, LONGEST = 12, 40
SAMPLING = [SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=1.3, top_p=0.8, min_p=0.05)]
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(
        tmp_path_factory.mktemp("small"), vocab_size=VOCAB, hidden_size=64, intermediate_size=64, head_dim=16
    )
    return DecoderModel(
        open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=LONGEST + 10
    )


@pytest.fixture(scope="module")
def head() -> Drafter:
    torch.manual_seed(5)
    return Drafter(DrafterConfig(hidden_size=64, vocab_size=VOCAB, exit_dim=32)).eval().requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def _short_prompts() -> Iterator[None]:
    """A few tokens are worth taking over, and too many for one step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtkit.runtime.scheduler._LEAST_REUSED", 4)
        patch.setitem(PART_TOKENS, "cpu", 7)
        yield


class _Heard:
    """Passes calls on to an engine, and holds what it says to what each request says ``alone``."""

    def __init__(self, engine: TorchEngine, alone: Callable[[Request], tuple[list[int], FinishReason]]) -> None:
        self.engine = engine
        self._alone = alone
        self._said: dict[str, tuple[Request, list[int]]] = {}
        """By name: a request that begins where this one began or went on, and what was heard since."""

    def submit(self, request: Request) -> None:
        self.engine.submit(request)
        self._said[request.id] = (request, [])

    def extend(self, name: str, tokens: Sequence[int], drop: int, most: int) -> None:
        self.engine.extend(name, tokens, max_tokens=most, drop=drop)
        request, said = self._said[name]
        so_far = (*request.prompt, *said)
        prompt = (*so_far[: len(so_far) - drop], *tokens)
        self._said[name] = (dataclasses.replace(request, prompt=prompt, max_tokens=most), [])

    def step(self) -> None:
        for output in self.engine.step():
            request, said = self._said[output.request_id]
            said += output.tokens
            if output.finish not in (None, FinishReason.CANCELLED):
                assert (said, output.finish) == self._alone(request)


Call: TypeAlias = Callable[[_Heard], None]


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    kind = draw(st.sampled_from(["submit"] * 3 + ["step"] * 5 + ["cancel", "pause", "extend", "extend", "extend"]))
    name, most = draw(st.sampled_from("abcdef")), draw(st.sampled_from([1, 5, 20]))
    if kind == "step":
        return _Heard.step
    if kind == "cancel":
        return lambda heard: heard.engine.cancel(name)
    if kind == "pause":
        return lambda heard: heard.engine.pause(name)
    if kind == "extend":
        tokens, drop = draw(st.lists(st.integers(0, VOCAB - 1), max_size=5)), draw(st.integers(0, 3))
        return lambda heard: heard.extend(name, tokens, drop, most)
    (prompt,) = random_prompts(draw(st.integers(0, 2)), [draw(st.sampled_from([1, 5, 12]))], vocab=VOCAB)
    asked = Request(
        id=name, prompt=prompt, sampling=draw(st.sampled_from(SAMPLING)), stop_ids=draw(st.sampled_from([(), (4, 7)])),
        max_tokens=most, seed=draw(st.integers(0, 9)), hold=draw(st.sampled_from([True, True, False])),
    )  # fmt: skip
    return lambda heard: heard.submit(asked)


@examples(24)
@given(
    calls=st.lists(_calls(), min_size=10, max_size=50), tree=st.sampled_from([None, CHAIN, TREE]),
    lookup=st.booleans(), rows=st.sampled_from([1, 3, 6]), spare=st.sampled_from([0, 4, 100]),
    form=st.sampled_from([(False, False), (True, False), (True, True)]), prefix_cache=st.booleans(),
)  # fmt: skip
def test_each_request_says_what_it_would_alone(
    model: DecoderModel, head: Drafter, calls: list[Call], tree: TreeShape | None, lookup: bool, rows: int, spare: int,
    form: tuple[bool, bool], prefix_cache: bool,
) -> None:  # fmt: skip
    def alone(request: Request) -> tuple[list[int], FinishReason]:
        limits = TorchLimits(rows=1, total_tokens=LONGEST, kv_blocks=12, block_size=4)
        with TorchEngine(model, limits) as engine:
            tokens, ends = run_all(engine, [dataclasses.replace(request, hold=False)])
        return tokens[request.id], ends[request.id]

    nodes = 1 if tree is None else tree.max_nodes
    limits = TorchLimits(
        rows=rows, total_tokens=LONGEST, kv_blocks=(LONGEST + nodes) // 4 + 2 + spare, block_size=4,
        fixed_shapes=form[0], overlap=form[1], prefix_cache=prefix_cache,
    )  # fmt: skip
    drafting = None if tree is None else Drafting(head=head, lookup=lookup, trees=(tree,))
    with TorchEngine(model, limits, drafting) as engine:
        heard = _Heard(engine, alone)
        for call in calls:
            with contextlib.suppress(RequestError):
                call(heard)
        while engine.has_work:
            heard.step()
        for name in "abcdef":
            engine.cancel(name)
        heard.step()
        assert not engine.has_work
        assert engine.stats().kv_blocks_free == limits.kv_blocks
