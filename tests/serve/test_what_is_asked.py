"""What a body says is what the engine is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeEngine
from tests.serve.serving import CHAT, call, serving
from trtkit.runtime.api import Request, SamplingParams
from trtkit.solve.options import SolveOptions

DEFAULTS = SamplingParams(temperature=0.5, top_p=0.75, top_k=3, min_p=0.25)


class Asking:
    """A server whose engine remembers what it was asked for."""

    def __init__(self, url: str, engine: FakeEngine) -> None:
        self._url, self._engine = url, engine

    def __call__(self, path: str, **body: Any) -> list[Request]:
        self._engine.submitted.clear()
        status, text = call(self._url, f"/v1/{path}", body)
        assert status == 200, text
        return list(self._engine.submitted)

    def chat(self, content: Any = "x", **body: Any) -> list[Request]:
        return self("chat/completions", messages=[{"role": "user", "content": content}], **body)


@pytest.fixture(scope="module")
def asking() -> Iterator[Asking]:
    engine = FakeEngine(lambda _: CHAT.encode("\\boxed{7}</think>"), rows=16)
    voting = SolveOptions(samples=4, max_tokens=100, sampling=DEFAULTS)
    with serving(lambda: engine, CHAT, voting=voting) as (url, _):
        yield Asking(url, engine)


def test_prompts(asking: Asking) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [bytes(it.prompt) for it in asking.chat(parts)] == [b"user:ab|>"]
    turns = [{"role": "system", "content": "be"}, {"role": "user"}]
    assert [bytes(it.prompt) for it in asking("chat/completions", messages=turns)] == [b"system:be|user:|>"]
    assert [bytes(it.prompt) for it in asking("completions", prompt=["a", "b"], n=2)] == [b"a", b"a", b"b", b"b"]
    assert [it.prompt for it in asking("completions", prompt=[5, 6])] == [(5, 6)]
    assert [it.prompt for it in asking("completions", prompt=[[5, 6], [7]])] == [(5, 6), (7,)]


@pytest.mark.parametrize("model", ["tiny", "tiny:maj"])
@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, DEFAULTS),
        (dict.fromkeys(("temperature", "top_p", "top_k", "min_p")), DEFAULTS),
        ({"temperature": 0, "top_k": 0, "min_p": 0}, SamplingParams(temperature=0, top_p=0.75, top_k=0, min_p=0)),
        ({"top_p": 0.9, "top_k": -1}, SamplingParams(temperature=0.5, top_p=0.9, top_k=0, min_p=0.25)),
        ({"top_k": 7, "min_p": 0.1}, SamplingParams(temperature=0.5, top_p=0.75, top_k=7, min_p=0.1)),
    ],
)
def test_sampling(asking: Asking, model: str, given: dict[str, Any], sampling: SamplingParams) -> None:
    assert {it.sampling for it in asking.chat(model=model, **given)} == {sampling}


@pytest.mark.parametrize(
    ("given", "longest"),
    [({}, 4096 - len("user:x|>")), ({"max_tokens": 9}, 9), ({"max_completion_tokens": 8}, 8),
     ({"max_tokens": 9, "max_completion_tokens": 8}, 8), ({"max_tokens": 7, "max_completion_tokens": 8}, 7)],
)  # fmt: skip
def test_budgets(asking: Asking, given: dict[str, Any], longest: int) -> None:
    assert [it.max_tokens for it in asking.chat(**given)] == [longest]
    assert {it.max_tokens for it in asking.chat(model="tiny:maj", **given)} == {longest if given else 100}


def test_what_ends_a_sample(asking: Asking) -> None:
    """Stop texts of one token end it in the engine, the end of turn unless it is to be ignored."""
    more = {"stop": ["</think>", "long"], "stop_token_ids": [5, 6]}
    think_id = CHAT.encode("</think>")[0]
    assert set(asking.chat(**more)[0].stop_ids) == {EOS_ID, think_id, 5, 6}
    assert set(asking.chat(**more, ignore_eos=True)[0].stop_ids) == {think_id, 5, 6}
    assert asking.chat(stop="long")[0].stop_ids == (EOS_ID,)


def test_seeds(asking: Asking) -> None:
    for model in ("tiny", "tiny:maj"):
        drawn = [[it.seed for it in asking.chat(model=model, seed=seed)] for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
    votes = [it.seed for it in asking.chat(model="tiny:maj")]
    assert votes == [it.seed for it in asking.chat(model="tiny:maj", seed=0)]
    assert asking.chat()[0].seed != asking.chat()[0].seed
    several = [it.seed for it in asking("completions", prompt=["a", "a"], n=3, seed=5)]
    assert len(set(several)) == 6
    assert several[0] == 5


@pytest.mark.parametrize("seed", [2**63 - 1, 2**64 - 1, 2**64, -1, -(2**63), 10**30])
def test_any_whole_number_is_a_seed(asking: Asking, seed: int) -> None:
    drawn = asking.chat(seed=seed, n=2)
    assert drawn[0].seed == seed % 2**64  # which the engine takes for the same
    for model in ("tiny", "tiny:maj"):
        assert asking.chat(model=model, seed=seed)[0].seed != asking.chat(model=model, seed=seed + 1)[0].seed


def test_a_vote_has_as_many_samples_as_it_is_asked_for(asking: Asking) -> None:
    assert [len(asking.chat(model="tiny:maj", **more)) for more in ({}, {"samples": 1}, {"samples": 7})] == [4, 1, 7]
