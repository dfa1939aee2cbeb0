"""Models with other words around their thought than ``<think>``: small tokenizers with their special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.chat_files import save_chat_files
from tests.fakes import FakeChat, FakeEngine
from trtkit.chat import Chat, load_chat
from trtkit.runtime.api import Request
from trtkit.solve.ends import Ending
from trtkit.solve.grading import Grader
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Attempt
from trtkit.solve.solver import Solver

HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
FILES: dict[str, tuple[Sequence[str], str, str]] = {
    # What the chat templates of these models say of a thought, in short.
    "seed": (
        ("<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>"),
        TURNS + "{% if thinks %}<seed:think>{{ thought }}</seed:think>{% endif %}<seed:bos>assistant\n",
        "<seed:eos>",
    ),
    "magistral": (
        ("[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"),
        "First draft: [THINK]Your thoughts[/THINK]" + TURNS + "[/INST]",
        "</s>",
    ),
    "harmony": (
        HARMONY,
        TURNS + "{% if thinks %}<|channel|>analysis<|message|>{{ thought }}<|end|>{% endif %}<|start|>assistant",
        "<|return|>",
    ),
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


def chat_of(name: str, directory: Path) -> Chat:
    special, template, end = FILES[name]
    save_chat_files(directory, special=special, template=template, end=end)
    return load_chat(directory)


def ended(
    grader: Grader, chat: Chat | FakeChat, said: str, forced: str = "8}", *, burst: int = 1, **options: Any
) -> tuple[Attempt, FakeEngine]:
    """A sample that says ``said``, and ``forced`` when it is made to answer."""

    def script(request: Request) -> Sequence[int]:
        asked = chat.decode(request.prompt).endswith("The answer is \\boxed{")
        return chat.encode(forced if asked else said)

    engine = FakeEngine(script, burst=burst)
    settings = SolveOptions(samples=1, save_text=True, **options)
    [solution] = Solver(engine, chat, settings, grader).solve([Problem(id="p", text="1?")])
    assert not engine.has_work
    assert engine._resting == {}
    return solution.attempts[0], engine


@pytest.mark.parametrize(
    ("name", "opens", "closes"), [("seed", "<seed:think>", "</seed:think>"), ("magistral", "[THINK]", "[/THINK]")]
)
def test_a_tag_of_its_own_ends_a_sample(grader: Grader, tmp_path: Path, name: str, opens: str, closes: str) -> None:
    chat = chat_of(name, tmp_path)
    assert not chat.thinking(chat.encode("so"))
    assert chat.thinking(chat.encode(f"so{opens}\n"))
    sample, engine = ended(grader, chat, f"{opens}\\boxed{{7}}{closes}It is \\boxed{{9}}")
    assert (sample.ending, sample.box, sample.forced) == (Ending.THINK, "7", False)
    assert engine.submitted[0].stop_ids == (*chat.encode(closes), *chat.eos_ids)
    sample, _ = ended(grader, chat, f"{opens}hm hm hm", max_tokens=9)
    assert (sample.ending, sample.box) == (Ending.LENGTH, "8")
    assert sample.text is not None
    assert sample.text.endswith(f"{closes}\n\nThe answer is \\boxed{{8}}")


def test_harmony_answers_in_its_last_message(grader: Grader, tmp_path: Path) -> None:
    """So a sample does not end before that, and one without it is made to write it."""
    chat = chat_of("harmony", tmp_path)
    analysis = "<|channel|>analysis<|message|>"
    sample, engine = ended(grader, chat, f"{analysis}Say \\boxed{{1}}.{FINAL}It is \\boxed{{7}}.<|return|>")
    assert (sample.ending, sample.box, sample.forced) == (Ending.EOS, "7", False)
    assert engine.submitted[0].stop_ids == chat.eos_ids
    sample, _ = ended(grader, chat, f"{analysis}hm hm hm", max_tokens=len(chat.encode(f"{analysis}hm hm")))
    assert sample.text == f"{analysis}hm hm\n{FINAL}\n\nThe answer is \\boxed{{8}}"
    said = f"{analysis}hm{FINAL}Well,"
    sample, _ = ended(grader, chat, said, max_tokens=len(chat.encode(said)))
    assert sample.text == f"{said}\n\nThe answer is \\boxed{{8}}", "the last message is there"


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("burst", [1, 5, 50])
def test_a_thought_that_ends_without_an_answer_is_made_to_answer(grader: Grader, single: bool, burst: int) -> None:
    chat = FakeChat(single_think_end=single)
    sample, engine = ended(grader, chat, "hm</think>It is \\boxed{9} and more", burst=burst)
    assert (sample.ending, sample.box, sample.forced) == (Ending.THINK, "8", True)
    assert sample.text == "hm</think>\n\nThe answer is \\boxed{8}"
    assert sample.tokens == len("hm8}") + len(chat.think_end)
    ((_, _, drop),) = engine.extended
    assert drop == (0 if single else -len("hm</think>") % burst if burst < 50 else len("It is \\boxed{9} and more"))
    sample, _ = ended(grader, chat, "hm</think>It is \\boxed{9}", burst=burst, force_close=False)
    assert (sample.ending, sample.box) == (Ending.THINK, None)
