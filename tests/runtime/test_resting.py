"""Held and paused requests: they go on as if their tokens had been a prompt, and lose nothing when memory is short."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all
from tests.examples import examples
from tests.tiny import save_tiny
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import RequestError
from trtkit.runtime.api import FinishReason, Request, StepOutput
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits

VOCAB = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    directory = save_tiny(tmp_path_factory.mktemp("small"), vocab_size=VOCAB)
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300)


def _engine(model: DecoderModel, *, rows: int = 8, blocks: int = 200, tree: TreeShape | None = None) -> TorchEngine:
    drafting = None
    if tree is not None:
        torch.manual_seed(5)
        head = Drafter(DrafterConfig(hidden_size=256, vocab_size=VOCAB, exit_dim=32))
        drafting = Drafting(head=head, trees=(tree,))
    return TorchEngine(model, TorchLimits(rows=rows, total_tokens=256, kv_blocks=blocks, block_size=4), drafting)


def _held(name: str, prompt: tuple[int, ...], **more: int) -> Request:
    plain = request(name, prompt, **more)
    return Request(id=name, prompt=plain.prompt, sampling=plain.sampling, max_tokens=plain.max_tokens,
                   seed=plain.seed, hold=True)  # fmt: skip


def _drain(engine: TorchEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.tokens)
    return tokens


@examples(15)
@given(
    seed=st.integers(0, 99),
    blocks=st.sampled_from([26, 32, 200]),
    rows=st.integers(1, 8),
    tree=st.sampled_from([None, TreeShape(beams=1, length=3), TreeShape(beams=2, length=2)]),
    data=st.data(),
)
def test_an_extended_request_goes_on_as_a_fresh_one_would(
    model: DecoderModel, seed: int, blocks: int, rows: int, tree: TreeShape | None, data: st.DataObject
) -> None:
    """The reference is a new request whose prompt is everything so far, with the same seed."""
    engine = _engine(model, rows=rows, blocks=blocks, tree=tree)
    prompts = random_prompts(seed, [9, 9, 14, 1], vocab=VOCAB)
    requests = [_held(str(i), prompt, seed=seed + i, max_tokens=11) for i, prompt in enumerate(prompts)]
    first, ends = run_all(engine, requests)
    assert set(ends.values()) == {FinishReason.LENGTH}
    expected = {}
    for i in data.draw(st.permutations(range(4))):
        drop, added = data.draw(st.integers(0, 11)), tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=9)))
        engine.extend(str(i), added, max_tokens=7, drop=drop)
        so_far = (*prompts[i], *first[str(i)][: 11 - drop], *added)
        alone, _ = run_all(_engine(model), [request(str(i), so_far, seed=seed + i, max_tokens=7)])
        expected[str(i)] = alone[str(i)]
        if data.draw(st.booleans()):  # company that may push resting rows out of the cache
            engine.submit(request(f"other{i}", random_prompts(i, [20], vocab=VOCAB)[0], max_tokens=5))
        if data.draw(st.booleans()):
            for output in engine.step():
                expected[output.request_id] = expected.get(output.request_id, [])
                first.setdefault(f"more{output.request_id}", []).extend(output.tokens)
    for name, tokens in _drain(engine).items():
        first.setdefault(f"more{name}", []).extend(tokens)
    for i in range(4):
        assert first[f"more{i}"] == expected[str(i)]
        engine.cancel(str(i))
    assert engine.step() == [], "an end that was reported is not reported again"
    assert engine.stats().kv_blocks_free == blocks


def test_pausing_changes_nothing_but_the_time(model: DecoderModel) -> None:
    (prompt,) = random_prompts(3, [10], vocab=VOCAB)
    whole, _ = run_all(_engine(model), [request("a", prompt, seed=4, max_tokens=20)])
    engine = _engine(model)
    engine.submit(_held("a", prompt, seed=4, max_tokens=20))
    outputs: list[StepOutput] = []
    for _ in range(5):
        outputs += engine.step()
    engine.pause("a")
    assert not engine.has_work
    engine.extend("a", (), max_tokens=15)
    while engine.has_work:
        outputs += engine.step()
    assert [token for output in outputs for token in output.tokens] == whole["a"]
    engine.cancel("a")
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_a_resting_row_keeps_its_cache_while_there_is_room(model: DecoderModel) -> None:
    (prompt,) = random_prompts(3, [40], vocab=VOCAB)
    engine = _engine(model)
    run_all(engine, [_held("a", prompt, max_tokens=30)])
    before = engine.stats().prefill_tokens
    engine.extend("a", (1, 2, 3), max_tokens=4)
    _drain(engine)
    # The token that was pending and the appended ones but the last: nothing else is computed again.
    assert engine.stats().prefill_tokens - before == 3


def test_what_cannot_rest_or_go_on_is_refused(model: DecoderModel) -> None:
    engine = _engine(model)
    (prompt,) = random_prompts(3, [10], vocab=VOCAB)
    engine.submit(request("plain", prompt, max_tokens=30))
    engine.submit(_held("a", prompt, max_tokens=3))
    engine.step()
    for name in ("plain", "nobody"):
        with pytest.raises(RequestError, match="only a held request"):
            engine.pause(name)
    with pytest.raises(RequestError, match="only a resting request"):
        engine.extend("a", (1,), max_tokens=3)
    engine.pause("a")
    with pytest.raises(RequestError, match="only a held request"):
        engine.pause("a")
    for words, arguments in {
        "drop 5": {"tokens": (1,), "max_tokens": 3, "drop": 5},
        "token id 99": {"tokens": (99,), "max_tokens": 3},
        "max_tokens 0": {"tokens": (1,), "max_tokens": 0},
        "the engine takes 256": {"tokens": (1,) * 300, "max_tokens": 3},
    }.items():
        with pytest.raises(RequestError, match=words):
            engine.extend("a", **arguments)
    with pytest.raises(RequestError, match="in use"):
        engine.submit(_held("a", prompt))
    engine.cancel("a")
    outputs = engine.step()
    assert [o.finish for o in outputs if o.request_id == "a"] == [FinishReason.CANCELLED], (
        "its end was not reported yet"
    )


def test_a_request_that_went_on_has_another_end_to_report(model: DecoderModel) -> None:
    (prompt,) = random_prompts(3, [10], vocab=VOCAB)
    engine = _engine(model)
    run_all(engine, [_held("a", prompt, max_tokens=2)])
    engine.extend("a", (1,), max_tokens=9)
    engine.step()
    engine.cancel("a")
    assert [(output.request_id, output.finish) for output in engine.step()] == [("a", FinishReason.CANCELLED)]
