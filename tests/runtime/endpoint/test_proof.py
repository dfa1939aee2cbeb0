"""Another tokenizer than the server's is noticed, and the same one never takes for another.

Text lags behind ids: half of a character is not said, and what a stream said before is not said again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tests.engines import request, run_all
from tests.examples import examples
from tests.runtime.endpoint.replies import DONE, Voice, event, frame, trtllm, vllm
from tests.runtime.endpoint.running import Opened, drain, told
from tests.runtime.endpoint.scripted_server import CUT, Reply, in_turn, said, scripted
from trtkit.chat import Chat
from trtkit.errors import EngineError
from trtkit.runtime.api import FinishReason
from trtkit.runtime.endpoint.client import Client
from trtkit.runtime.endpoint.dialects import DIALECTS
from trtkit.runtime.endpoint.engine import EndpointEngine
from trtkit.runtime.endpoint.server import Server

EOS, THINK_END = 258, 260
HALVES = (127, 102)
"""Of ``é``."""


def words(ids: Sequence[int], text: str, finish: str | None = None) -> bytes:
    return event(frame([{"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}]))


class Shifted:
    """A tokenizer with the same size and other ids."""

    def __init__(self, chat: Chat, by: int = 1) -> None:
        self._chat, self._by = chat, by

    def decode(self, tokens: Sequence[int]) -> str:
        return self._chat.decode([(token + self._by) % 90 for token in tokens])


def in_parts(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("dialect", ["vllm", "sglang", "trtkit"])
def test_another_tokenizer_is_noticed(opened: Opened, chat: Chat, dialect: str, size: int) -> None:
    ids = [(7 * i) % 80 for i in range(60)]
    engine, server = opened(lambda body: vllm(Shifted(chat), in_parts(ids, size), "length"), dialect=dialect)
    engine.submit(request("a", (1, 2), max_tokens=99))
    with pytest.raises(EngineError, match="it has another tokenizer") as caught:
        drain(engine)
    here, there = caught.value.offenders
    assert chat.decode(ids)[:9] in here.replace("'", "")
    assert Shifted(chat).decode(ids)[:9] in there.replace("'", "")
    assert "--tokenizer" in str(caught.value.hint)
    assert server.root in str(caught.value.where)


def test_one_other_word_is_enough(opened: Opened, chat: Chat) -> None:
    """Tokenizers of a family differ in a few ids only."""
    ids = list(chat.encode("x" * 30 + "y" + "x" * 30))
    text = "x" * 30 + "z" + "x" * 30
    engine, _ = opened(lambda body: said(words(ids, text, "length"), DONE))
    engine.submit(request("a", (1, 2), max_tokens=99))
    with pytest.raises(EngineError, match="another tokenizer"):
        drain(engine)


LETTERS = [*range(40, 90)] * 2


@pytest.mark.parametrize(
    "ids",
    [
        [*HALVES * 40],
        [5, *HALVES * 40],
        [HALVES[0], *range(80)],
        [HALVES[1], *range(80)],
        [THINK_END, 5, 256, 257, 259, *LETTERS],
        [220, 220, 198, *LETTERS, 220, 198],
        [*range(94, 188), *range(94, 188)],
    ],
    ids=["two bytes", "odd", "half in front", "other half in front", "special", "spaces", "no characters"],
)
@pytest.mark.parametrize("size", [1, 2, 3, 47, 48, 1000])
def test_the_same_tokenizer_is_never_another(opened: Opened, chat: Chat, ids: list[int], size: int) -> None:
    engine, _ = opened(lambda body: vllm(chat, in_parts(ids, size), "length"))
    engine.submit(request("a", (1, 2), max_tokens=999))
    assert told(drain(engine)) == (ids, FinishReason.LENGTH)


@pytest.mark.parametrize("length", [1, 46, 47, 48, 60])
def test_nor_where_the_stop_id_is_no_text(opened: Opened, chat: Chat, length: int) -> None:
    for size in (1, 1000):
        ids = [*LETTERS[:length], THINK_END]
        engine, _ = opened(lambda body, ids=ids, size=size: vllm(chat, in_parts(ids, size), "stop", stop=THINK_END))
        engine.submit(request("a", (1, 2), max_tokens=999, stop_ids=(THINK_END, EOS)))
        assert told(drain(engine)) == (ids, FinishReason.STOP)


def test_nor_where_there_is_no_text_at_all(opened: Opened, chat: Chat) -> None:
    """As of trtllm-serve."""
    engine, _ = opened(lambda body: trtllm(chat, in_parts(LETTERS, 3), "length"), dialect="tensorrt_llm")
    engine.submit(request("a", (1, 2), max_tokens=999))
    assert told(drain(engine))[0] == LETTERS


def test_nor_where_bytes_that_are_no_character_are_left_out(opened: Opened, chat: Chat) -> None:
    for ids in ([HALVES[0], *LETTERS], [*LETTERS[:9], HALVES[1], *LETTERS[9:]]):
        text = chat.decode(LETTERS)
        engine, _ = opened(lambda body, ids=ids, text=text: said(words(ids, text, "length")))
        engine.submit(request("a", (1, 2), max_tokens=999))
        assert told(drain(engine))[0] == ids


def test_text_that_comes_by_itself_belongs_to_the_ids_before(opened: Opened, chat: Chat) -> None:
    first, rest = LETTERS[:20], LETTERS[20:]
    engine, _ = opened(
        lambda body: said(words(first, ""), words([], chat.decode(first)), words(rest, chat.decode(rest), "length"))
    )
    engine.submit(request("a", (1, 2), max_tokens=999))
    assert told(drain(engine))[0] == LETTERS


def test_a_short_first_stream_proves_nothing_and_the_next_one_does(opened: Opened, chat: Chat) -> None:
    wrong = vllm(Shifted(chat), in_parts(LETTERS, 9), "length")
    engine, _ = opened(in_turn(*[vllm(Shifted(chat), [[40, 41, 42]], "length")] * 3, wrong))
    for name in "abc":
        engine.submit(request(name, (1, 2), max_tokens=999))
        assert told(drain(engine))[0] == [40, 41, 42]
    engine.submit(request("d", (1, 2), max_tokens=999))
    with pytest.raises(EngineError, match="another tokenizer"):
        drain(engine)


def test_a_stream_in_the_middle_of_a_character_proves_nothing(opened: Opened, chat: Chat) -> None:
    """The first one ends early, while another has said half of a character, whose text comes with the other half."""
    first_ends, goes_on, second_comes = threading.Event(), threading.Event(), threading.Event()
    rest = [HALVES[1], *LETTERS]

    def script(body: dict[str, Any]) -> Reply:
        if body["prompt"] == [1]:
            return said(words([5], chat.decode([5])), first_ends, words([6], chat.decode([6]), "length"))
        text = "é" + chat.decode(LETTERS)
        return said(second_comes, words([HALVES[0]], ""), goes_on, words(rest, text, "length"))

    engine, _ = opened(script)
    tokens: dict[str, list[int]] = {"first": [], "second": []}

    def run_until(name: str, count: int) -> None:
        while len(tokens[name]) < count:
            for output in engine.step():
                tokens[output.request_id] += output.tokens

    engine.submit(request("first", (1,), max_tokens=999))
    engine.submit(request("second", (2,), max_tokens=999))
    run_until("first", 1)
    second_comes.set()
    run_until("second", 1)
    first_ends.set()
    run_until("first", 2)
    goes_on.set()
    run_until("second", 2 + len(LETTERS))
    assert tokens == {"first": [5, 6], "second": [*HALVES, *LETTERS]}


def test_nor_does_one_whose_prompt_ends_in_the_middle_of_a_character(opened: Opened, chat: Chat) -> None:
    """Some servers begin with the whole of it then, and more."""
    whole = '"#é' + chat.decode(LETTERS)
    rest = words([HALVES[1], *LETTERS], whole, "length")
    engine, _ = opened(in_turn(said(words([1, 2, HALVES[0]], '"#'), CUT), rest_of(rest), rest_of(rest)))
    engine.submit(request("a", (7,), max_tokens=999))
    assert told(drain(engine))[0] == [1, 2, *HALVES, *LETTERS]
    engine.submit(replace(request("b", (7, 1, 2, HALVES[0]), max_tokens=999)))
    assert told(drain(engine))[0] == [HALVES[1], *LETTERS]


def rest_of(*events: bytes) -> Reply:
    return said(*events, DONE)


def test_what_is_proven_is_not_looked_at_again(opened: Opened, chat: Chat) -> None:
    """One stream is enough; text costs time at every event."""
    wrong = vllm(Shifted(chat), in_parts(LETTERS, 9), "length")
    engine, _ = opened(in_turn(vllm(chat, in_parts(LETTERS, 9), "length"), wrong))
    for name in "ab":
        assert run_all(engine, [request(name, (1, 2), max_tokens=999)])[0] == {name: LETTERS}


@pytest.fixture(scope="module")
def rust(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))


def as_vllm_does(rust: Tokenizer, prompt: Sequence[int], parts: Sequence[Sequence[int]]) -> list[bytes]:
    """Text by the library's own stream, which has seen the prompt."""
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=False)
    return [words(part, "".join(stream.step(rust, token) or "" for token in part)) for part in parts]


TOKENS = st.lists(st.integers(0, 260) | st.sampled_from((*HALVES, 220)), min_size=1, max_size=90)


@examples(60)
@given(prompt=TOKENS, ids=TOKENS, cuts=st.lists(st.integers(1, 30), min_size=1), lost=st.booleans())
def test_no_text_of_the_same_tokenizer_is_another(
    rust: Tokenizer, chat: Chat, prompt: list[int], ids: list[int], cuts: list[int], lost: bool
) -> None:
    """Whatever is said, and however it is cut; with a loss in the middle, too."""
    parts, left = [], list(ids)
    while left:
        size = cuts[len(parts) % len(cuts)]
        parts.append(left[:size])
        left = left[size:]
    seen = len(parts) // 2 if lost else len(parts)
    before = [token for part in parts[:seen] for token in part]
    end = event(frame([{"index": 0, "text": "", "token_ids": [], "finish_reason": "length"}]))
    replies = [said(*as_vllm_does(rust, prompt, parts[:seen]), *([CUT] if lost else [end]))]
    replies.append(said(*as_vllm_does(rust, [*prompt, *before], parts[seen:]), end))
    with scripted(in_turn(*replies)) as server:
        client = Client(f"{server.root}/v1", key=None, most=1)
        found = Server(model="tiny", dialect=DIALECTS["vllm"])
        with EndpointEngine(client, found, chat, rows=1, total_tokens=4096) as engine:
            tokens, _ = run_all(engine, [request("a", tuple(prompt), max_tokens=999)])
    assert tokens == {"a": ids}


def test_the_voice_of_the_scripted_servers_lags(chat: Chat) -> None:
    assert list(Voice(chat, [[5, 127], [102], [127], [5]]).texts()) == ["&", "é", "", "\ufffd&"]
