"""Votes by confidence: from the engine's log-probabilities to the journal and the winner."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.solve.scripted import CHAT
from trtkit.errors import UsageError
from trtkit.runtime.api import Request, StepOutput
from trtkit.runtime.trtllm_sampling import EngineKind, check_sampling
from trtkit.solve.ends import CONFIDENCE_TOKENS, EndRules, Stream
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal, read_history
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.solver import Solver


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


class Sure(FakeEngine):
    """Every token of sample i has log-probability -(i + 1)."""

    def __init__(self, boxes: Sequence[str], burst: int) -> None:
        super().__init__(lambda request: self._script_of(request), burst=burst)
        self._boxes = boxes

    def _script_of(self, request: Request) -> Sequence[int]:
        return [*CHAT.encode(f"\\boxed{{{self._boxes[self._index(request.id)]}}}</think>"), *b" and so on"]

    @staticmethod
    def _index(name: str) -> int:
        return int(name.rpartition("/")[2])

    def step(self) -> list[StepOutput]:
        asked = {request.id: request.logprobs for request in self.submitted}
        return [
            dataclasses.replace(
                output, logprobs=tuple(-1.0 - self._index(output.request_id) for _ in output.tokens)
            )
            if asked[output.request_id]
            else output
            for output in super().step()
        ]  # fmt: skip


@pytest.mark.parametrize("burst", [1, 50])
def test_the_surer_samples_win(grader: Grader, burst: int, tmp_path: Path) -> None:
    def winner(**options: object) -> tuple[str, list[float | None]]:
        path = tmp_path / f"{len(options)}-{options.get('weighting')}.jsonl"
        with Journal(path) as journal:
            chosen = SolveOptions(samples=3, stop=(), **options)
            engine = Sure(("7", "8", "8"), burst)
            [solution] = Solver(engine, CHAT, chosen, grader, journal).solve([Problem(id="p", text="x")])
        assert solution.answer is not None
        written = sorted(read_history(path).attempts["p"], key=lambda attempt: attempt.index)
        return solution.answer.key, [attempt.confidence for attempt in written]

    assert winner() == ("8", [None, None, None])
    assert winner(save_confidence=True) == ("8", [-1.0, -2.0, -3.0])
    # exp(-1) against exp(-2) + exp(-3)
    assert winner(weighting="confidence") == ("7", [-1.0, -2.0, -3.0])


def test_what_is_taken_back_does_not_count() -> None:
    rules = EndRules(CHAT, SolveOptions().mode, at_think=True, at_box=False, loops=False)
    stream = Stream()
    rules.add(stream, [1, 2, 3, 4], None, [-1.0, -2.0, -3.0, -4.0])
    rules.replace(stream, 2, (9, 9, 9))
    rules.add(stream, [5], None, [-6.0])
    assert (stream.tokens, stream.logprobs) == ([1, 2, 9, 9, 9, 5], [-1.0, -2.0, -6.0])
    assert stream.confidence == -3.0


def test_only_the_tail_counts() -> None:
    stream = Stream(logprobs=[-9.0] * 5 + [-1.0] * CONFIDENCE_TOKENS)
    assert stream.confidence == -1.0
    assert Stream().confidence is None


def test_tensorrt_llm_engines_refuse() -> None:
    sampling = SolveOptions().sampling
    with pytest.raises(UsageError, match="no log-probabilities"):
        check_sampling(sampling, EngineKind(redrafter=False, greedy=False), logprobs=True)
