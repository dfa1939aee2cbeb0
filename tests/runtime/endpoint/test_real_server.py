"""Against this project's own server: what an engine on it says is what the same directory says when it is opened here.

Its noise depends on seed and position alone, so that nothing that a request goes through may change a token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.engines import mixed_requests, random_prompts, request, run_all
from tests.fakes import FakeEngine
from tests.runtime.endpoint.running import drain, told
from tests.serve.serving import CHAT, Slow, serving, wait_for
from tests.serve.test_engine_thread import GatedEngine
from trtkit.chat import Chat, load_chat
from trtkit.errors import EngineError, RequestError, UsageError
from trtkit.runtime.api import Engine, FinishReason, Request, StepOutput, SwitchPenalty
from trtkit.runtime.endpoint.engine import EndpointEngine, open_endpoint
from trtkit.runtime.endpoint.remote import connect
from trtkit.runtime.endpoint.server import endpoint_named, look_at
from trtkit.runtime.load import OpenOptions, open_engine

OPTIONS = OpenOptions(device="cpu", threads=1, dtype="float32")
EOS, THINK_END = 258, 260
VOCAB = 261


@pytest.fixture(scope="module")
def real(model_dir: Path) -> Iterator[str]:
    with serving(lambda: open_engine(model_dir, OPTIONS), load_chat(model_dir)) as (url, _):
        yield url


@pytest.fixture
def there(real: str, model_dir: Path) -> Iterator[EndpointEngine]:
    with connect(endpoint_named(real), str(model_dir)).open() as engine:
        yield engine


@pytest.fixture
def here(model_dir: Path) -> Iterator[Engine]:
    with open_engine(model_dir, OPTIONS) as engine:
        yield engine


def ended(requests: Sequence[Request]) -> list[Request]:
    """Every second one with the end of a turn among the stops; the others go on behind it."""
    return [replace(it, stop_ids=(*it.stop_ids, EOS)) if place % 2 else it for place, it in enumerate(requests)]


def outputs_of(engine: Engine, requests: Sequence[Request]) -> dict[str, list[StepOutput]]:
    found: dict[str, list[StepOutput]] = {it.id: [] for it in requests}
    for it in requests:
        engine.submit(it)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tokens_are_those_of_the_directory(there: EndpointEngine, here: Engine, seed: int) -> None:
    wanted = run_all(here, ended(mixed_requests(seed, VOCAB)))
    assert run_all(there, ended(mixed_requests(seed, VOCAB))) == wanted
    assert run_all(there, ended(mixed_requests(seed, VOCAB)), arrivals_per_step=2) == wanted


def test_every_cut_and_every_seed(there: EndpointEngine, here: Engine) -> None:
    (prompt,) = random_prompts(5, [12], vocab=VOCAB)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 1.0}, {"temperature": 5.0},
        {"top_p": 0.3}, {"top_p": 0.99}, {"top_k": 1}, {"top_k": 7}, {"min_p": 0.02}, {"min_p": 0.5},
        {"temperature": 2.0, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    ]  # fmt: skip
    asked = [request(f"sampling {i}", prompt, seed=i, **sampling) for i, sampling in enumerate(samplings)]
    seeds = [0, 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, -1]
    asked += [request(f"seed {seed}", prompt, seed=seed) for seed in seeds]
    wanted, _ = run_all(here, ended(asked))
    assert run_all(there, ended(asked))[0] == wanted
    assert len({tuple(wanted[f"seed {seed}"]) for seed in seeds}) == len(seeds)


def test_stops_and_limits(there: EndpointEngine, here: Engine) -> None:
    (prompt,) = random_prompts(6, [8], vocab=VOCAB)
    free, _ = run_all(here, [request("a", prompt, max_tokens=60)])
    early, late = free["a"][0], next(token for token in free["a"][20:] if token not in free["a"][:20])
    asked = ended([
        request("the first token", prompt, stop_ids=(early,)),
        request("a late one", prompt, max_tokens=60, stop_ids=(late,)),
        request("several", prompt, max_tokens=60, stop_ids=(THINK_END, late, 7)),
        request("one token", prompt, max_tokens=1),
        request("the whole room", prompt[:1] * 250, max_tokens=1000),
        request("room for one", prompt[:1] * 255, max_tokens=1000),
    ])  # fmt: skip
    wanted = run_all(here, asked)
    assert run_all(there, asked) == wanted
    assert wanted[0]["the first token"] == [early]
    assert wanted[1]["a late one"] is FinishReason.STOP
    assert [len(wanted[0][name]) for name in ("the whole room", "room for one", "one token")] == [6, 1, 1]
    assert there.max_total_tokens == here.max_total_tokens == 256
    assert there.max_rows == here.max_rows


def test_logprobs_are_those_of_the_directory(there: EndpointEngine, here: Engine) -> None:
    """Also of a stop id. The last digits depend on what else is in the batch."""
    prompts = random_prompts(7, [5, 9], vocab=VOCAB)
    free, _ = run_all(here, [request("0", prompts[0], max_tokens=20)])
    asked = [replace(request("0", prompts[0], stop_ids=(free["0"][9],)), logprobs=True),
             replace(request("1", prompts[1], temperature=0.5, top_k=4), logprobs=True),
             request("2", prompts[1])]  # fmt: skip
    wanted, found = outputs_of(here, ended(asked)), outputs_of(there, ended(asked))
    for name in "012":
        scores = [score for output in wanted[name] for score in output.logprobs]
        assert [score for output in found[name] for score in output.logprobs] == pytest.approx(scores, abs=1e-4)
        assert all(len(it.logprobs) == len(it.tokens) * (name != "2") for it in found[name])
    assert wanted["0"][-1].finish is FinishReason.STOP


def continued(engine: Engine) -> list[int]:
    """A held answer at temperature 1, cut back and pushed on, paused in the middle and pushed on again."""
    tokens: list[int] = []

    def run(until: int = 1 << 30) -> None:
        while engine.has_work and len(tokens) < until:
            tokens.extend(token for output in engine.step() for token in output.tokens)

    engine.submit(replace(request("a", (5, 6, 7, 8), seed=11, max_tokens=10, stop_ids=(EOS,)), hold=True))
    run()
    assert len(tokens) == 10
    engine.extend("a", [9, 10], max_tokens=60, drop=3)
    del tokens[7:]
    run(until=15)
    assert engine.has_work, "it is paused in the middle"
    engine.pause("a")
    assert not engine.has_work
    engine.extend("a", [], max_tokens=15, drop=len(tokens) - 13)
    del tokens[13:]
    run()
    engine.extend("a", [11], max_tokens=4)
    run()
    engine.extend("a", [], max_tokens=6, drop=5)  # what was appended, too
    del tokens[-4:]
    run()
    with pytest.raises(RequestError, match=r"drop 1000: \d+ tokens"):
        engine.extend("a", [], max_tokens=6, drop=1000)
    engine.cancel("a")
    assert not engine.step()
    return tokens


def test_held_requests_go_on_like_the_directorys(there: EndpointEngine, here: Engine) -> None:
    assert continued(there) == continued(here)


def test_a_paused_sample_goes_on_as_if_it_had_not_been(there: EndpointEngine, here: Engine) -> None:
    wanted, _ = run_all(here, [request("a", (1, 2, 3), seed=4, max_tokens=80, stop_ids=(EOS,))])
    there.submit(replace(request("a", (1, 2, 3), seed=4, max_tokens=80, stop_ids=(EOS,)), hold=True))
    tokens: list[int] = []
    pauses = 0
    while there.has_work:
        tokens += [token for output in there.step() for token in output.tokens]
        if there.has_work and tokens:
            there.pause("a")
            there.extend("a", [], max_tokens=80 - len(tokens))
            pauses += 1
    assert tokens == wanted["a"]
    assert pauses


def script(request: Request) -> Sequence[int]:
    return list(b"abc" * 900)


@contextlib.contextmanager
def on(make: Callable[[], Engine], **options: Any) -> Iterator[EndpointEngine]:
    """An engine on the real server with an engine of the test's."""
    with serving(make, CHAT) as (url, _):
        endpoint = endpoint_named(url)
        with open_endpoint(endpoint, look_at(endpoint), CHAT, **options) as engine:
            yield engine


def test_the_server_stops_what_is_cancelled_or_paused() -> None:
    below = Slow(script)
    with on(lambda: below) as engine:
        engine.submit(replace(request("held", (1,), max_tokens=2000), hold=True))
        engine.submit(request("other", (1,), max_tokens=2000))
        heard: set[str] = set()
        while len(heard) < 2:
            heard |= {output.request_id for output in engine.step()}
        engine.cancel("other")
        engine.pause("held")
        outputs = list(engine.step())
        assert [(it.request_id, it.tokens, it.finish) for it in outputs] == [("other", (), FinishReason.CANCELLED)]
        assert not engine.has_work
        wait_for(lambda: len(below.cancelled) == 2 and not below.has_work)
        engine.submit(request("other", (2,), max_tokens=3))
        assert told(drain(engine)) == (list(b"abc"), FinishReason.LENGTH)
        engine.cancel("held")
        assert not engine.step(), "it rested"


def test_the_server_stops_everything_when_the_engine_is_closed() -> None:
    below = Slow(script)
    with on(lambda: below) as engine:
        for name in "abc":
            engine.submit(request(name, (1,), max_tokens=2000))
        while not engine.step():
            pass
        assert [it for it in threading.enumerate() if it.name == "endpoint"]
        engine.close()
        engine.close()
        assert not [it for it in threading.enumerate() if it.name == "endpoint"]
        wait_for(lambda: len(below.cancelled) == 3 and not below.has_work)


def test_no_more_requests_are_open_than_it_has_rows() -> None:
    """The server says how many it runs at once; fewer may be asked for."""
    for options, most in (({}, 4), ({"rows": 2}, 2)):
        below = Counting(script, rows=4, burst=3)
        with on(lambda below=below: below, **cast(Any, options)) as engine:
            assert engine.max_rows == most
            tokens, _ = run_all(engine, [request(str(i), (1,), max_tokens=20) for i in range(12)])
            assert engine.stats().peak_rows == most
        assert all(it == list(b"abc" * 7)[:20] for it in tokens.values())
        assert below.most <= most


class Counting(FakeEngine):
    """How many requests it has had at once."""

    most = 0

    def step(self) -> list[StepOutput]:
        self.most = max(self.most, len(self._left))
        return super().step()


def test_requests_that_cannot_run(there: EndpointEngine) -> None:
    there.submit(request("a", (1,), max_tokens=200))
    for bad, words in (
        (request("a", (1,)), "in use"), (request("b", ()), "empty"), (request("b", (1, 261)), "261 lies outside"),
        (request("b", (-1,)), "-1 lies outside"), (request("b", (1,) * 256), "256 tokens"),
        (request("b", (1,), max_tokens=0), "at least 1"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=words):
            there.submit(bad)
    switch = SwitchPenalty(alpha=1.0, beta=2, tokens=(1,))
    with pytest.raises(UsageError, match="thought switches"):
        there.submit(request("b", (1,), switch=switch))
    for name in ("a", "b"):
        with pytest.raises(RequestError, match="only a held request"):
            there.pause(name)
        with pytest.raises(RequestError, match="only a resting request"):
            there.extend(name, [1], max_tokens=1)
    there.cancel("b")
    there.cancel("a")
    assert there.has_work, "its end is still to be reported"
    assert [it.request_id for it in there.step()] == ["a"]
    assert not there.has_work
    assert run_all(there, [request("b", (1,), max_tokens=2)])[1] == {"b": FinishReason.LENGTH}


def test_a_resting_request_is_extended_by_what_fits(there: EndpointEngine) -> None:
    run_all(there, [replace(request("a", (1,) * 9, max_tokens=3), hold=True)])
    with pytest.raises(RequestError, match="only a held request"):
        there.pause("a")
    for words, arguments in {
        "drop 4: 3 tokens": {"tokens": (1,), "max_tokens": 3, "drop": 4},
        "drop -1": {"tokens": (1,), "max_tokens": 3, "drop": -1},
        "token id 261": {"tokens": (261,), "max_tokens": 3},
        "max_tokens 0": {"tokens": (1,), "max_tokens": 0},
        "takes 256": {"tokens": (1,) * 250, "max_tokens": 3},
    }.items():
        with pytest.raises(RequestError, match=words):
            there.extend("a", **cast(Any, arguments))
    there.extend("a", (1,) * 243, max_tokens=100)
    tokens, finish = told(drain(there))
    assert (len(tokens), finish) == (1, FinishReason.LENGTH)
    with pytest.raises(RequestError, match="in use"):
        there.submit(request("a", (1,)))


def test_counters(there: EndpointEngine) -> None:
    tokens, _ = run_all(there, [request(name, (1,) * size, max_tokens=9) for name, size in (("a", 5), ("b", 7))])
    stats = there.stats()
    assert (stats.prompt_tokens, stats.new_tokens, stats.peak_rows) == (12, sum(map(len, tokens.values())), 2)
    assert stats.steps > 0


def test_a_step_without_events_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that clocks and Ctrl-C are heard while a server thinks."""
    below = GatedEngine(script)
    with on(lambda: below) as engine:
        assert engine.step() == []
        engine.submit(request("a", (1,), max_tokens=3))
        for _ in range(3):
            assert engine.step() == []
        for _ in range(9):
            below.gate.release()
        assert told(drain(engine))[0] == list(b"abc")


def test_what_the_server_refuses_names_its_words(real: str, chat: Chat) -> None:
    """A prompt that it does not take, for which the engine had no reason of its own."""
    endpoint = endpoint_named(real)
    server = replace(look_at(endpoint), total_tokens=None)
    with open_endpoint(endpoint, server, chat, total_tokens=1000) as engine:
        engine.submit(request("a", (1,) * 300, max_tokens=5))
        with pytest.raises(EngineError, match=r"refuses a request \(400\).*the engine takes 256") as caught:
            drain(engine)
        assert real in str(caught.value.where)
        assert not engine.has_work
        assert run_all(engine, [request("b", (1,), max_tokens=2)])[1] == {"b": FinishReason.LENGTH}
