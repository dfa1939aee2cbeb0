"""Text as it comes: the same as all tokens decoded at once, however they were cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import FakeChat
from tests.reference.text_stream import split_thought, stopped_text
from trtkit.bundled import practice_dir
from trtkit.chat import Thought, load_chat
from trtkit.serve.text_stream import TextStream, ThoughtSplitter

CHAT = FakeChat()
T = TypeVar("T")
PIECES = st.sampled_from(
    ["a", "b", "ab", "\n", "\n\n", "<", "<think>", "</think>", "</thi", "nk>", "é", "∞", "🧮", "\\boxed{7}"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
CUTS = st.lists(st.integers(1, 5), min_size=1, max_size=8)


def cut(items: Sequence[T], sizes: list[int]) -> list[Sequence[T]]:
    parts, place = [], 0
    while place < len(items):
        size = sizes[len(parts) % len(sizes)]
        parts.append(items[place : place + size])
        place += size
    return parts


@given(
    text=TEXTS, cuts=CUTS, stops=st.lists(st.sampled_from(["ab", "b\n", "</think>", "∞", "ba", "aba", "a"]), max_size=3)
)
def test_pieces_are_the_text_up_to_the_first_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    tokens = list(text.encode())  # characters of several bytes are torn between tokens
    stream = TextStream(CHAT.decode, stops)
    got = "".join(stream.push(part) for part in cut(tokens, cuts)) + stream.finish()
    expected, used, stopped = stopped_text(tokens, stops, CHAT.decode)
    assert (got, stream.stopped) == (expected, stopped)
    assert (stream.stop in stops) == stopped
    if stops:
        assert stream.tokens == used
        assert CHAT.decode(tokens[:used]).startswith(expected + (stream.stop or ""))


TORN = st.sampled_from(
    [b"a", b"\x80", b"\x80" * 30, b"\xe2\x88", b"\xe2" * 30, "∞".encode(), "🧮".encode(), b"\xf0\x9f\xa7" * 30]
)


@given(tokens=st.lists(TORN, max_size=8).map(b"".join), cuts=CUTS, stops=st.sampled_from([[], ["a∞"], ["∞", "🧮a"]]))
def test_pieces_are_the_text_of_what_is_no_text_too(tokens: bytes, cuts: list[int], stops: list[str]) -> None:
    stream = TextStream(CHAT.decode, stops)
    got = "".join(stream.push(part) for part in cut(list(tokens), cuts)) + stream.finish()
    assert got == stopped_text(list(tokens), stops, CHAT.decode)[0]


def test_a_sample_that_is_no_text_is_not_decoded_over_and_over() -> None:
    """The server decodes between requests: everybody waits for it."""
    decoded = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return CHAT.decode(tokens)

    stream = TextStream(decode)
    shown = "".join(stream.push([0x80]) for _ in range(3000))
    assert len(shown) > 2900
    assert decoded < 3000 * 50


def test_nothing_that_may_become_a_stop_is_shown_early() -> None:
    stream = TextStream(CHAT.decode, ["</think>"])
    assert stream.push(list(b"so </thi")) == "so "
    assert stream.push(list(b"s")) == "</this"
    assert stream.push(list(b" </think> more")) == " "
    assert stream.stopped
    assert stream.finish() == stream.push(list(b"more")) == ""


def test_of_stops_that_come_at_once_the_first_and_shortest_counts() -> None:
    for stops in (["thin", "</thin", "</thi"], ["</thi", "</thin", "thin"]):
        stream = TextStream(CHAT.decode, stops)
        assert stream.push([*b"so ", *CHAT.encode("</think>")]) == "so "
        assert stream.stop == "</thi"


def test_half_a_character_waits_and_is_shown_as_such_at_the_end() -> None:
    stream = TextStream(CHAT.decode)
    first, rest = "∞".encode()[:2], "∞".encode()[2:]
    assert stream.push([*b"x", *first]) == ""
    assert stream.push(list(rest)) == "x∞"
    assert stream.push(list(first)) == ""
    assert stream.finish() == "�"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_real_tokenizer(size: int) -> None:
    chat = load_chat(Path(practice_dir()))
    text = "17/6:17=2*6+5->2 r5\n8+6=14\nSo the answer is \\boxed{12}.\n</think>\n\nThe answer is é∞ \\boxed{12}."
    tokens = list(chat.encode(text))
    stream = TextStream(chat.decode)
    assert "".join(stream.push(part) for part in cut(tokens, [size])) + stream.finish() == chat.decode(tokens)


@given(text=TEXTS, cuts=CUTS, opened=st.booleans())
def test_the_thought_is_split_off_the_same_in_any_pieces(text: str, cuts: list[int], opened: bool) -> None:
    splitter = ThoughtSplitter(Thought(), opened=opened)
    pieces = [splitter.push(part) for part in map("".join, cut(text, cuts))] + [splitter.finish()]
    assert ("".join(it[0] for it in pieces), "".join(it[1] for it in pieces)) == split_thought(text, opened=opened)


@pytest.mark.parametrize(
    "whole", ["<think>\n\na</think>\n\nb\n\nc", " \n<think>a\n</think>b", "\na</think>\nb", "</think>\n"]
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_line_ends_behind_a_tag_go_with_it(whole: str, size: int) -> None:
    for opened in (False, True):
        splitter = ThoughtSplitter(Thought(), opened=opened)
        pieces = [splitter.push(part) for part in cut(whole, [size])] + [splitter.finish()]
        got = "".join(it[0] for it in pieces), "".join(it[1] for it in pieces)
        assert got == split_thought(whole, opened=opened)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_thought_in_other_words(size: int) -> None:
    opens, closes = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
    splitter = ThoughtSplitter(Thought(opens=opens, closes=closes), opened=False)
    pieces = [splitter.push(part) for part in cut(f"{opens}a<|end|>b{closes}c", [size])] + [splitter.finish()]
    assert ("".join(it[0] for it in pieces), "".join(it[1] for it in pieces)) == ("a<|end|>b", "c")


def test_only_what_may_become_a_tag_is_held_back() -> None:
    splitter = ThoughtSplitter(Thought(), opened=False)
    assert splitter.push(" <thi") == ("", "")
    assert splitter.push("s") == ("", " <this"), "an answer, from here on as it comes"
    assert splitter.push("</think>") == ("", "</think>")
    splitter = ThoughtSplitter(Thought(), opened=False)
    assert splitter.push("<think>a") == ("a", "")
    assert splitter.push("b</th") == ("b", "")
    assert splitter.push("ink>c") == ("", "c")
    assert splitter.finish() == ("", "")
