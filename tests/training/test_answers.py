"""The target's own answers: each once, and kept through interruptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import EOS_ID, FakeChat, FakeEngine
from trtkit.chat import VARIANTS
from trtkit.errors import InputError, UsageError
from trtkit.runtime.api import Request, SamplingParams, StepOutput
from trtkit.training.answers import Asking, own_answers

TWO = (VARIANTS["solve"], VARIANTS["reason"])
PROBLEMS = ("1+1", "x" * 60, "2+2", "3+3")


def asking(**changes: Any) -> Asking:
    whole = Asking(
        checkpoint="of weights", problems=PROBLEMS,
        prompts=tuple(FakeChat().prompt(problem, TWO[n % 2]) for n, problem in enumerate(PROBLEMS)),
        stop_ids=FakeChat.eos_ids, sampling=SamplingParams(), max_tokens=50, seed=7,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def test_the_target_answers_each_problem_once_with_noise_of_its_own(tmp_path: Path) -> None:
    def script(request: Request) -> list[int]:
        return [*f"{request.seed}!".encode(), EOS_ID, *b"never"]

    engine = FakeEngine(script, burst=4, max_total_tokens=50)
    made = own_answers(asking(), engine, tmp_path / "answers.jsonl")
    asked = {"1+1": b"solve|1+1", "2+2": b"solve|2+2", "3+3": b"reason|3+3"}  # in turns; one does not fit
    assert [sample.problem for sample in made] == list(asked)
    answers = [sample.tokens[sample.prompt :] for sample in made]
    assert [bytes(sample.tokens[: sample.prompt]) for sample in made] == list(asked.values())
    assert all(answer[-1] == EOS_ID and EOS_ID not in answer[:-1] for answer in answers)
    assert len(set(answers)) == 3, "samples of one seed share their noise"


class Breaking(FakeEngine):
    """Ends like a process that is interrupted."""

    def step(self) -> list[StepOutput]:
        if self.steps == 10:
            raise KeyboardInterrupt
        return super().step()


def _script(request: Request) -> list[int]:
    return [*f"{request.seed} of {len(request.prompt)}".encode(), EOS_ID]


def test_answers_outlive_an_interruption_and_are_those_of_an_unbroken_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = own_answers(asking(), FakeEngine(_script, max_total_tokens=50), tmp_path / "whole.jsonl")
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        own_answers(asking(), Breaking(_script, rows=1, max_total_tokens=50), path)
    assert len(path.read_bytes().splitlines()) == 1 + 1, "the first answer takes eight steps"
    with path.open("ab") as stream:
        stream.write(b'{"index": 2, "tokens": [49, 50, 5')  # torn by a power cut
    engine = FakeEngine(_script, max_total_tokens=50)
    with caplog.at_level("INFO", "trtkit"):
        assert own_answers(asking(), engine, path) == whole
    assert [request.id for request in engine.submitted] == ["2", "3"]
    assert "1 of 3 are there already" in caplog.text
    again = FakeEngine(_script, max_total_tokens=50)
    assert own_answers(asking(), again, path) == whole, "what was written behind the torn line can be read"
    assert not again.submitted


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("checkpoint_sha256", {"checkpoint": "of other weights"}),
        ("prompts_sha256", {"prompts": ((1, 2), (3,), (4,), (5,))}),
        ("seed", {"seed": 8}),
        ("sampling", {"sampling": SamplingParams(temperature=0.5)}),
        ("max_tokens", {"max_tokens": 49}),
    ],
)
def test_answers_of_another_asking_are_refused(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    path = tmp_path / "answers.jsonl"
    own_answers(asking(), FakeEngine(_script), path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="for something else") as refused:
        own_answers(asking(**changes), FakeEngine(_script), path)
    assert [offender.split(":")[0] for offender in refused.value.offenders] == [name]
    assert path.read_bytes() == before


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    whole = own_answers(asking(), FakeEngine(_script), path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:-5] + "\n", *lines[3:]]))
    assert own_answers(asking(), FakeEngine(_script), path) == whole
    assert "answers.jsonl:3: not a whole answer" in caplog.text
    path.write_text("damaged\n")
    with pytest.raises(InputError, match="damaged"):
        own_answers(asking(), FakeEngine(_script), path)
