"""Ends of a sample on a byte vocabulary: where they lie must not depend on how tokens arrive."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeChat
from trtkit.runtime.api import FinishReason
from trtkit.solve.answers import AnswerMode, extract_box
from trtkit.solve.ends import End, Ending, EndRules, Stream, is_looping

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "r1distill_math.jsonl"


def rules(chat: Any = None, mode: AnswerMode | None = None, **options: bool) -> EndRules:
    defaults = {"at_think": True, "at_box": False, "loops": False}
    return EndRules(chat or FakeChat(), mode or AnswerMode(), **(defaults | options))


def feed(ends: EndRules, tokens: list[int], bursts: list[int]) -> tuple[End | None, Stream]:
    """The tokens in steps of the given sizes, again and again; an engine would stop at the stop ids."""
    stream, at, step = Stream(), 0, 0
    while at < len(tokens):
        burst = tokens[at : at + bursts[step % len(bursts)]]
        stop = next((place for place, token in enumerate(burst) if token in ends.stop_ids), None)
        burst = burst if stop is None else burst[: stop + 1]
        at, step = at + len(burst), step + 1
        end = ends.add(stream, burst, FinishReason.STOP if stop is not None else None)
        if end is not None:
            return end, stream
    return None, stream


def everywhere(ends: EndRules, text: str, chat: FakeChat | None = None) -> tuple[End | None, str]:
    """The end and the text up to it, the same however the tokens are cut."""
    tokens = [*list((chat or FakeChat()).encode(text)), EOS_ID]
    draw, found = random.Random(1), []
    for bursts in ([1], [3], [64], [1000], [draw.randint(1, 9) for _ in range(50)]):
        end, stream = feed(ends, tokens, bursts)
        found.append((end, ends.text(stream)))
    assert all(one == found[0] for one in found)
    return found[0]


def test_think_and_end_of_turn() -> None:
    end, text = everywhere(rules(), "so \\boxed{5}</think> babble")
    assert end is not None
    assert (end.ending, text) == (Ending.THINK, "so \\boxed{5}</think>")
    end, _ = everywhere(rules(), "no tag at all")
    assert end is not None
    assert end.ending is Ending.EOS


def test_the_first_box_ends_a_sample_only_when_asked() -> None:
    text = "x" * 100 + "the answer is \\boxed{42}. Wait, let me check that again" + "y" * 200 + "\\boxed{43}</think>"
    end, said = everywhere(rules(at_box=True), text)
    assert end is not None
    assert end.ending is Ending.BOX
    assert extract_box(said) == "42"
    assert len(said) <= text.index("\\boxed{42}") + len("\\boxed{42}") + 16
    end, said = everywhere(rules(), text)
    assert end is not None
    assert end.ending is Ending.THINK
    assert extract_box(said) == "43"


@pytest.mark.parametrize("shift", range(16))
def test_a_box_without_braces_is_not_cut_in_the_middle(shift: int) -> None:
    end, said = everywhere(rules(at_box=True), "x" * shift + "so \\boxed 1234567890123 and so on, on and on")
    assert end is not None
    assert end.ending is Ending.BOX
    assert extract_box(said) == "1234567890123"


def test_boxes_that_are_no_answers_do_not_end_a_sample() -> None:
    text = "put it in \\boxed{} or \\boxed{answer}, say \\boxed{x+1} or so " + "z" * 40 + "\\boxed{7} and more and more"
    end, said = everywhere(rules(mode=AnswerMode(kind="integer"), at_box=True), text)
    assert end is not None
    assert (end.ending, extract_box(said)) == (Ending.BOX, "7")


def test_a_loop_ends_a_sample() -> None:
    head = "".join(chr(97 + random.Random(place).randrange(26)) for place in range(500))
    end, said = everywhere(rules(loops=True), head + "Wait, let me check. " * 200)
    assert end is not None
    assert (end.ending, end.finish) == (Ending.LOOP, FinishReason.CANCELLED)
    assert 500 + 600 <= len(said) <= 500 + 600 + 256
    end, _ = everywhere(rules(loops=True), "".join(f"{n} is {n * n}, " for n in range(500)) + "</think>")
    assert end is not None
    assert end.ending is Ending.THINK


def test_is_looping() -> None:
    assert not is_looping("ab" * 200)
    assert is_looping("ab" * 300)
    assert not is_looping("x" * 200 + "y" * 200 + "x" * 200)
    assert is_looping("x" * 200 + "y" * 300 + "x" * 200 + "z" + "x" * 200)
    assert is_looping("abc" * 3, characters=3, times=3)


@pytest.mark.parametrize("single", [True, False])
def test_a_sample_that_is_made_to_answer(single: bool) -> None:
    chat = FakeChat(single_think_end=single)
    ends, stream = rules(chat), Stream()
    assert ends.add(stream, chat.encode("hm, 6 times 7 is"), FinishReason.LENGTH) is not None
    assert ends.answer(stream) is None
    appended = ends.close(stream, Ending.LENGTH)
    assert chat.decode(appended) == "\n</think>\n\nThe answer is \\boxed{"
    assert ends.add(stream, chat.encode("4"), None) is None
    end = ends.add(stream, chat.encode("2}. That is it"), None)
    assert end is not None
    assert (end.ending, end.finish) == (Ending.LENGTH, FinishReason.LENGTH)
    answer = ends.answer(stream)
    assert answer is not None
    assert answer.key == "42"
    assert ends.text(stream).endswith("\\boxed{42}")
    assert stream.forced
    assert stream.generated == len("hm, 6 times 7 is") + len("42}"), "what we wrote is not counted as generated"


def test_a_box_in_the_thought_is_not_taken_for_the_forced_answer() -> None:
    ends, stream = rules(mode=AnswerMode(kind="integer")), Stream()
    ends.add(stream, b"in general it is \\boxed{x+1}, so here", FinishReason.LENGTH)
    assert ends.answer(stream) is None
    ends.close(stream, Ending.DEADLINE)
    assert ends.add(stream, b"4", None) is None
    assert ends.add(stream, b"2}", None) is not None
    answer = ends.answer(stream)
    assert answer is not None
    assert answer.key == "42"


def test_a_thought_that_is_over_is_not_ended_again() -> None:
    ends, stream = rules(at_think=False), Stream()
    chat = FakeChat()
    ends.add(stream, chat.encode("thought</think>The answer is surely"), FinishReason.LENGTH)
    assert "</think>" not in chat.decode(ends.close(stream, Ending.LENGTH))


def test_an_answer_that_never_comes_ends_with_the_engine() -> None:
    ends, stream = rules(), Stream()
    ends.close(stream, Ending.DEADLINE)
    end = ends.add(stream, b"no idea", FinishReason.LENGTH)
    assert end is not None
    assert end.ending is Ending.DEADLINE
    assert ends.answer(stream) is None


@pytest.mark.skipif(not TRACES.is_file(), reason="no public data beside the repository")
def test_loops_in_real_traces() -> None:
    """Of 200 R1-Distill traces most of those that never close their thought loop, and few of the others."""
    caught = never_closed = closed = wrongly = 0
    for line in TRACES.read_text("utf-8").splitlines():
        text = json.loads(line)["text"]
        looped = any(is_looping(text[:length]) for length in range(800, len(text) + 1, 800))
        if "</think>" in text:
            closed, wrongly = closed + 1, wrongly + looped
        else:
            never_closed, caught = never_closed + 1, caught + looped
    assert (caught, never_closed) == (19, 23)
    assert (wrongly, closed) == (5, 177)


def test_a_stream_that_is_cut_and_added_to_keeps_its_loop_check() -> None:
    chat, ends = FakeChat(), rules(loops=True)
    for seed in range(20):
        rng, stream = random.Random(seed), Stream()
        for _ in range(30):
            ends.add(stream, [rng.randrange(32, 127) for _ in range(rng.randrange(200))], None)
            if rng.random() < 0.4:
                inserted = [rng.randrange(32, 127) for _ in range(rng.randrange(300))]
                ends.replace(stream, max(0, len(stream.tokens) - rng.randrange(100)), inserted)
        text = chat.decode(stream.tokens)
        assert stream.chunks == [text[at : at + 256] for at in range(0, len(text) // 256 * 256, 256)]
        assert len(text) > 1000
