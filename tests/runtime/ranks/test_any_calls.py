"""Whatever is asked of an engine over two ranks, and whenever: it says what one engine says, and both ranks do it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts
from tests.examples import examples
from tests.runtime.ranks.threads import ThreadRanks, on_ranks
from tests.tiny import save_tiny
from trtkit.checkpoint.rank_share import RankShare
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import CapacityError, RequestError
from trtkit.runtime.api import EngineStats, Request, SamplingParams, StepOutput, SwitchPenalty
from trtkit.runtime.draft_head import with_kernels
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB, LONGEST = 12, 60
CPU = torch.device("cpu")
CHAIN, TREE = TreeShape(beams=1, length=3), TreeShape(beams=3, length=2)
TREES: list[tuple[TreeShape | None, ...]] = [(None,), (CHAIN,), (TREE,), (None, CHAIN, TREE)]
HEAD = DrafterConfig(hidden_size=128, vocab_size=VOCAB, exit_dim=32)

Call: TypeAlias = Callable[[TorchEngine], Sequence[StepOutput] | None]
Said: TypeAlias = list[Sequence[StepOutput] | str | None]


@dataclass(frozen=True)
class _Parts:
    """What the engines are made of: one model, and those of two ranks."""

    whole: DecoderModel
    shares: tuple[DecoderModel, ...]
    head: Drafter


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> _Parts:
    directory = save_tiny(
        tmp_path_factory.mktemp("small"), vocab_size=VOCAB, hidden_size=128, intermediate_size=128, head_dim=32
    )
    whole = open_unified(directory)
    torch.manual_seed(5)
    made = [
        DecoderModel(source, device=CPU, dtype=torch.float32, max_tokens=LONGEST + 10)
        for source in (whole, *(RankShare(whole=whole, rank=rank, ranks=2) for rank in range(2)))
    ]
    return _Parts(made[0], tuple(made[1:]), Drafter(HEAD).eval().requires_grad_(False))


def _of_ranks(model: DecoderModel, ranks: ThreadRanks) -> DecoderModel:
    """The share ``model``, connected to the others: as if it had been made for ``ranks``."""
    connected = copy.copy(model)
    connected.ranks = ranks
    connected._layers = [dataclasses.replace(layer, ranks=ranks) for layer in model._layers]
    return connected


def _engine(
    model: DecoderModel, head: Drafter, trees: tuple[TreeShape | None, ...], limits: TorchLimits
) -> TorchEngine:  # fmt: skip
    if trees == (None,):
        return TorchEngine(model, limits)
    shared = with_kernels(copy.deepcopy(head), device=CPU, dtype=torch.float32, ranks=model.ranks)
    return TorchEngine(model, limits, Drafting(head=shared, trees=trees))


def _measured(fastest: TreeShape | None, trees: Sequence[TreeShape | None]) -> dict[str, Any]:
    """What a rank remembers on whose clock that tree is the fastest."""
    seconds = [[size, str(tree), [0.1 if tree == fastest else 9.0] * 9] for size in range(4) for tree in trees]
    return {"seconds": seconds, "acceptance": []}


def _play(engine: TorchEngine, calls: Sequence[Call]) -> tuple[Said, EngineStats]:
    """What each call gives, refusals included, and what then comes until all is done."""
    said: Said = []
    with engine:
        for call in calls:
            try:
                said.append(call(engine))
            except (RequestError, CapacityError) as refusal:
                said.append(str(refusal))
        while engine.has_work:
            said.append(engine.step())
        return said, dataclasses.replace(engine.stats(), seconds={})


SAMPLING = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(top_p=0.8, top_k=6),
    SamplingParams(temperature=1.3, min_p=0.05),
    SamplingParams(switch=SwitchPenalty(alpha=3.0, beta=9, tokens=(2, 3))),
]
_names = st.sampled_from("abcdef")
_tokens = st.lists(st.integers(0, VOCAB), max_size=5).map(tuple)  # VOCAB itself is refused


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    kind, name = (
        draw(st.sampled_from(["submit"] * 3 + ["step"] * 5 + ["cancel", "pause", "extend", "extend"])),
        draw(_names),
    )
    if kind == "step":
        return lambda engine: engine.step()
    if kind == "cancel":
        return lambda engine: engine.cancel(name)
    if kind == "pause":
        return lambda engine: engine.pause(name)
    most = draw(st.sampled_from([1, 5, 20, 40]))
    if kind == "extend":
        tokens, drop = draw(_tokens), draw(st.integers(0, 3))
        return lambda engine: engine.extend(name, tokens, max_tokens=most, drop=drop)
    (prompt,) = random_prompts(draw(st.integers(0, 5)), [draw(st.sampled_from([1, 5, 12, 21]))], vocab=VOCAB)
    asked = Request(
        id=name, prompt=prompt, sampling=draw(st.sampled_from(SAMPLING)),
        stop_ids=draw(st.sampled_from([(), (4,), (4, 7)])), max_tokens=most,
        seed=draw(st.integers(0, 99)), hold=draw(st.booleans()),
    )  # fmt: skip
    return lambda engine: engine.submit(asked)


@examples(20)
@given(
    calls=st.lists(_calls(), min_size=4, max_size=40), trees=st.sampled_from(TREES), rows=st.sampled_from([1, 3, 6]),
    spare=st.sampled_from([0, 0, 4, 100]), form=st.sampled_from([(False, False), (True, False), (True, True)]),
)  # fmt: skip
def test_two_ranks_say_what_one_engine_says(
    parts: _Parts, calls: list[Call], trees: tuple[TreeShape | None, ...], rows: int, spare: int,
    form: tuple[bool, bool],
) -> None:  # fmt: skip
    """Of several trees the first rank's clock chooses: then nobody knows how far one engine would be after a step."""
    nodes = max(1 if tree is None else tree.max_nodes for tree in trees)
    limits: dict[str, Any] = {"rows": rows, "total_tokens": LONGEST, "block_size": 4}
    limits |= {"kv_blocks": (LONGEST + nodes) // 4 + 2 + spare, "fixed_shapes": form[0], "overlap": form[1]}
    settled = TorchLimits(**limits)

    def rank(ranks: ThreadRanks) -> tuple[Said, EngineStats]:
        engine = _engine(_of_ranks(parts.shares[ranks.rank], ranks), parts.head, trees, settled)
        engine._chooser.recall(_measured(trees[-ranks.rank], trees))
        return _play(engine, calls)

    first, other = on_ranks(2, rank)
    assert other == first
    if len(trees) == 1:
        assert _play(_engine(parts.whole, parts.head, trees, settled), calls) == first
