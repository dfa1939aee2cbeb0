"""What every kind of server is told, and what is made of what it says.

The servers of these tests are scripted after the sources of the real ones; they refuse fields that those have not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.engines import request
from tests.runtime.endpoint.replies import FIELDS, STREAMS, event, frame, llamacpp, other, said, strict, trtllm, vllm
from tests.runtime.endpoint.running import Opened, drain, told
from tests.serve.serving import wait_for
from trtkit.chat import Chat
from trtkit.errors import EngineError, UsageError
from trtkit.runtime.api import FinishReason, Request
from trtkit.runtime.endpoint.dialects import DIALECTS, OTHER, complaint_of, read_chunk

EOS, THINK_END, END_OF_TEXT = 258, 260, 256
STOPS = (THINK_END, EOS)
PLAIN = {"skip_special_tokens": False, "repetition_penalty": 1.0}
KINDS = tuple(STREAMS)
WITH_IDS = ("vllm", "sglang", "tensorrt_llm")


def asked(**more: Any) -> Request:
    return request("a", (1, 2, 3), **{"seed": 5, "max_tokens": 9, "stop_ids": STOPS, "temperature": 0.7, **more})


def body_sent(opened: Opened, chat: Chat, kind: str, it: Request, **options: Any) -> dict[str, Any]:
    """What reaches a server of this kind."""
    answer = STREAMS[kind](chat, [[5, 6]], "length", scores=[-1.0, -2.0] if it.logprobs else None)
    engine, server = opened(strict(kind, lambda body: answer), dialect=kind, **options)
    engine.submit(it)
    assert told(drain(engine)) == ([5, 6], FinishReason.LENGTH)
    (body,) = server.bodies
    return body


COMMON = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 9, "stream": True, "temperature": 0.7, "top_p": 1.0,
          "seed": 5}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("vllm", {**PLAIN, "return_token_ids": True, "top_k": -1, "min_p": 0.0, "stop_token_ids": [260, 258]}),
        ("sglang", {**PLAIN, "return_token_ids": True, "top_k": -1, "min_p": 0.0, "stop_token_ids": [260, 258]}),
        ("tensorrt_llm", {**PLAIN, "detokenize": False, "top_k": 0, "min_p": 0.0, "stop_token_ids": [260, 258]}),
        ("llamacpp", {"cache_prompt": True, "repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0, "stop": ["</think>"]}),
        ("other", {"stop": ["</think>"]}),
    ],
)
def test_what_a_request_says(opened: Opened, chat: Chat, kind: str, own: dict[str, Any]) -> None:
    """Without cuts: also a server with cuts of its own by default must make none."""
    assert body_sent(opened, chat, kind, asked()) == {**COMMON, **own}


@pytest.mark.parametrize("kind", ["vllm", "sglang", "tensorrt_llm", "llamacpp"])
def test_cuts_are_passed_on(opened: Opened, chat: Chat, kind: str) -> None:
    body = body_sent(opened, chat, kind, asked(temperature=0.0, top_p=0.9, top_k=40, min_p=0.1))
    assert [body[name] for name in ("temperature", "top_p", "top_k", "min_p")] == [0.0, 0.9, 40, 0.1]


def test_a_server_of_no_known_kind_is_not_told_of_cuts_that_nobody_asked_for(opened: Opened, chat: Chat) -> None:
    body = body_sent(opened, chat, "other", asked(top_p=0.9))
    assert body.keys() <= FIELDS["other"]
    assert body["top_p"] == 0.9
    engine, server = opened(lambda body: other(chat, [[5]], "length"), dialect="other")
    engine.submit(asked(top_k=40, min_p=0.1))
    drain(engine)
    assert [server.bodies[0][name] for name in ("top_k", "min_p")] == [40, 0.1]


def test_this_projects_own_server_is_told_what_it_takes(opened: Opened, chat: Chat) -> None:
    engine, server = opened(lambda body: vllm(chat, [[5]], "length"), dialect="trtkit")
    engine.submit(replace(asked(seed=-1), logprobs=True))
    drain(engine)
    assert server.bodies == [{
        **COMMON, "return_token_ids": True, "top_k": 0, "min_p": 0.0, "stop_token_ids": [260, 258], "logprobs": 0,
        "seed": 2**64 - 1,
    }]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_are_such_as_the_server_takes(opened: Opened, chat: Chat, kind: str) -> None:
    for seed in (2**63 - 1, -1, 2**31, 2**200):
        sent = body_sent(opened, chat, kind, asked(seed=seed))["seed"]
        assert (0 <= sent < 2**31, sent) == (True, seed % 2**31)
    assert "seed" not in body_sent(opened, chat, kind, asked(), seeds=False)


@pytest.mark.parametrize(("kind", "words"), [("vllm", 0), ("sglang", 0), ("tensorrt_llm", 1)])
def test_how_logprobs_are_asked_for(opened: Opened, chat: Chat, kind: str, words: int) -> None:
    assert body_sent(opened, chat, kind, replace(asked(), logprobs=True))["logprobs"] == words
    assert "logprobs" not in body_sent(opened, chat, kind, asked())


def test_stop_texts_are_no_more_than_openai_allows(opened: Opened, chat: Chat) -> None:
    """The end of a turn is none of them: every server knows it."""
    stops = (EOS, *chat.encode("abcdef"))
    body = body_sent(opened, chat, "other", asked(stop_ids=stops))
    assert body["stop"] == ["a", "b", "c", "d"]
    assert "stop" not in body_sent(opened, chat, "other", asked(stop_ids=(EOS,)))
    assert "stop" not in body_sent(opened, chat, "llamacpp", asked(stop_ids=()))
    assert body_sent(opened, chat, "vllm", asked(stop_ids=stops))["stop_token_ids"] == list(stops)


def test_no_more_is_asked_for_than_fits(opened: Opened, chat: Chat) -> None:
    """Servers refuse what would be longer than their longest, though it might end before."""
    engine, server = opened(lambda body: vllm(chat, [[5, 6]], "length"), total_tokens=10)
    engine.submit(replace(asked(max_tokens=99), hold=True))
    drain(engine)
    engine.extend("a", [7], max_tokens=99)
    drain(engine)
    assert [it["max_tokens"] for it in server.bodies] == [7, 4]


def test_what_a_server_cannot_do_is_refused_here(opened: Opened, chat: Chat) -> None:
    engine, server = opened(lambda body: other(chat, [[5]], "length"), dialect="other")
    with pytest.raises(UsageError, match="no token ids"):
        engine.submit(replace(asked(), logprobs=True))
    assert not engine.has_work
    assert not server.asked


Case = tuple[Sequence[Sequence[int]], str, int | str | None, FinishReason]
CASES: dict[str, Case] = {
    "the limit": ([[5], [6, 7], [8]], "length", None, FinishReason.LENGTH),
    "a stop id": ([[5], [6, THINK_END]], "stop", THINK_END, FinishReason.STOP),
    "a stop id alone": ([[5, 6], [THINK_END]], "stop", THINK_END, FinishReason.STOP),
    "the end of a turn": ([[5], [6], [7, EOS]], "stop", None, FinishReason.STOP),
    "nothing but the end of a turn": ([[EOS]], "stop", None, FinishReason.STOP),
}


@pytest.mark.parametrize("kind", [*STREAMS])
def test_a_request_that_does_not_end_with_the_turn_goes_on_behind_it(opened: Opened, chat: Chat, kind: str) -> None:
    """Where the server can be told; without a stop at the end of a turn an engine goes on."""
    assert "ignore_eos" not in body_sent(opened, chat, kind, asked(stop_ids=(260, 258)))
    for stops in ((), (260,)):
        assert body_sent(opened, chat, kind, asked(stop_ids=stops)).get("ignore_eos", False) == (kind != "other")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", WITH_IDS)
def test_ids_are_taken_as_the_server_says_them(opened: Opened, chat: Chat, kind: str, case: str) -> None:
    """With the stop id where the server swallows it, and each once where it does not."""
    parts, finish, stop, ending = CASES[case]
    if kind == "sglang" and stop is None and finish == "stop":
        stop = EOS  # it names that one, too
    engine, _ = opened(strict(kind, lambda body: STREAMS[kind](chat, parts, finish, stop=stop)), dialect=kind)
    engine.submit(asked())
    outputs = drain(engine)
    assert told(outputs) == ([token for part in parts for token in part], ending)
    assert [it.finish for it in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert all(not it.logprobs for it in outputs)


@pytest.mark.parametrize(
    ("parts", "finish", "ending"),
    [
        ([[5], [6, 7], [8]], "length", FinishReason.LENGTH),
        ([[5], [6, THINK_END]], "stop", FinishReason.STOP),
        ([[5, 6], [THINK_END]], "stop", FinishReason.STOP),
        ([[127], [102, 5], [127], [102, THINK_END]], "stop", FinishReason.STOP),
        ([[5], [127]], "length", None),
    ],
)
@pytest.mark.parametrize("kind", ["llamacpp", "other"])
def test_text_is_put_into_tokens(
    opened: Opened, chat: Chat, kind: str, parts: list[list[int]], finish: str, ending: FinishReason | None
) -> None:
    """The first stop that has not been said is what ended it: the server does not tell, and cuts its text off."""
    engine, _ = opened(strict(kind, lambda body: STREAMS[kind](chat, parts, finish)), dialect=kind)
    engine.submit(asked())
    tokens, end = told(drain(engine))
    if ending is None:  # half of a character at the end is one that is no character to the server
        assert chat.decode(tokens) == chat.decode([5, 127])
    else:
        assert (tokens, end) == ([token for part in parts for token in part], ending)


def test_a_thought_that_ends_in_text_ends_the_sample(opened: Opened, chat: Chat) -> None:
    """A server that does not stop at the tag, which is a stop."""
    engine, _ = opened(lambda body: other(chat, [[5], [6, THINK_END, 7], [8, 9]], "length"), dialect="other")
    engine.submit(asked())
    assert told(drain(engine)) == ([5, 6, THINK_END], FinishReason.STOP)


def test_the_second_stop_of_a_text_server_is_the_end_of_the_turn(opened: Opened, chat: Chat) -> None:
    """The thought was closed in the prompt: what ends the sample now is not its tag."""
    for kind, stream in (("other", other), ("llamacpp", llamacpp)):
        engine, _ = opened(lambda body, stream=stream: stream(chat, [[5], [6, EOS]], "stop"), dialect=kind)
        engine.submit(replace(asked(), prompt=(1, THINK_END, 2)))
        assert told(drain(engine)) == ([5, 6, EOS], FinishReason.STOP)
        engine.submit(asked())
        assert told(drain(engine)) == ([5, 6, THINK_END], FinishReason.STOP)


def test_a_stop_text_that_the_server_names_is_that_one(opened: Opened, chat: Chat) -> None:
    """Some say ``stop_reason`` beside text."""
    (stop,) = chat.encode("b")
    choice = {"text": "x", "index": 0, "finish_reason": "stop", "stop_reason": "b"}
    engine, _ = opened(lambda body: said(event(frame([choice]))), dialect="other")
    engine.submit(asked(stop_ids=(*chat.encode("a"), stop, EOS)))
    assert told(drain(engine)) == ([*chat.encode("x"), stop], FinishReason.STOP)
    choice["stop_reason"] = "no stop of ours"
    engine.submit(asked(stop_ids=(*chat.encode("a"), stop, EOS)))
    assert told(drain(engine)) == ([*chat.encode("x"), EOS], FinishReason.STOP)


def test_an_end_that_nobody_asked_for_adds_no_token(opened: Opened, chat: Chat) -> None:
    engine, _ = opened(lambda body: trtllm(chat, [[5, EOS]], "stop"), dialect="tensorrt_llm")
    engine.submit(asked(stop_ids=(7,)))
    assert told(drain(engine)) == ([5], FinishReason.STOP)


def test_tokens_behind_a_stop_do_not_count(opened: Opened, chat: Chat) -> None:
    """A server that goes on is hung up on; what it has said behind the stop in the same event is left out."""
    engine, server = opened(
        lambda body: said(
            event(frame([{"index": 0, "text": "", "token_ids": [5, THINK_END, 6, 7], "finish_reason": None}])), "hold"
        )
    )
    engine.submit(asked(max_tokens=99))
    assert told(drain(engine)) == ([5, THINK_END], FinishReason.STOP)
    wait_for(lambda: server.hung_up == 1)


@pytest.mark.parametrize("kind", WITH_IDS)
def test_logprobs_come_one_to_a_token(opened: Opened, chat: Chat, kind: str) -> None:
    """That of a stop id which the server swallows is not known."""
    scores = [-0.5, -1.25, -2.0, -3.0]
    for stop, finish in ((None, "length"), (THINK_END, "stop")):
        parts = [[5], [6, 7], [stop or 8]]
        engine, _ = opened(
            lambda body, finish=finish, stop=stop, parts=parts: STREAMS[kind](
                chat, parts, finish, stop=stop, scores=scores
            ),
            dialect=kind,
        )
        engine.submit(replace(asked(), logprobs=True))
        outputs = drain(engine)
        assert told(outputs)[0] == [5, 6, 7, stop or 8]
        last = 0.0 if stop and kind == "tensorrt_llm" else -3.0
        assert [score for it in outputs for score in it.logprobs] == [-0.5, -1.25, -2.0, last]


def test_logprobs_of_what_is_cut_off_are_cut_off_with_it(opened: Opened, chat: Chat) -> None:
    engine, _ = opened(lambda body: vllm(chat, [[5, THINK_END, 7]], "length", scores=[-1.0, -2.0, -3.0]))
    engine.submit(replace(asked(), logprobs=True))
    (output,) = drain(engine)
    assert (output.tokens, output.logprobs) == ((5, THINK_END), (-1.0, -2.0))


def test_what_an_event_says() -> None:
    assert read_chunk(frame([])) is None
    it = read_chunk(frame([{"text": None, "token_ids": [1, 2], "logprobs": {"token_logprobs": [None, -1]}}]))
    assert it is not None
    assert (it.text, it.ids, it.logprobs, it.finish, it.stop) == ("", (1, 2), (0.0, -1.0), None, None)
    it = read_chunk(frame([{"text": "x", "stop_reason": 0, "matched_stop": 7}]))
    assert it is not None
    assert (it.ids, it.stop) == (None, 0)
    it = read_chunk(frame([{"text": "x", "matched_stop": 7}]))
    assert it is not None
    assert it.stop == 7
    for wrong in ({}, frame([{"token_ids": ["x"]}]), {"choices": 5}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            read_chunk(wrong)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"error": {"message": "too\\n long", "code": 400}}', "too long"),
        ('{"object": "error", "message": "too long"}', "too long"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"loc": ["body"]}]}', "[{'loc': ['body']}]"),
        ('{"error": "too long"}', "too long"),
        ('{"error": {"code": 5}}', '{"error": {"code": 5}}'),
        ("<html>\n  Bad Gateway", "<html> Bad Gateway"),
        ("", "no reason given"),
        ("x" * 900, "x" * 500),
    ],
)
def test_complaints_of_every_form_are_read(text: str, words: str) -> None:
    assert complaint_of(text, json.loads) == words


def test_a_strict_server_would_refuse_more(opened: Opened, chat: Chat) -> None:
    """The scripted servers notice: bodies of other kinds are no good for trtllm-serve."""
    engine, _ = opened(strict("tensorrt_llm", lambda body: vllm(chat, [[5]], "length")), dialect="vllm")
    engine.submit(asked())
    with pytest.raises(EngineError, match=r"400.*extra_forbidden"):
        drain(engine)
    assert DIALECTS.keys() == {"trtkit", *KINDS} - {OTHER.name}
