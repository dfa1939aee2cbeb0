"""Samples that write code: with an engine that follows a script, and the real sandbox or one that keeps you waiting."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import run_all
from tests.fakes import EOS_ID, FakeChat, FakeEngine
from tests.tiny import save_tiny
from trtkit.chat import Chat, PromptVariant
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import RequestError
from trtkit.runtime.api import FinishReason, Request, StepOutput
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import Drafting, TorchLimits
from trtkit.solve import code_rows
from trtkit.solve.ends import Ending
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal, read_history
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.prompts import sample_seed
from trtkit.solve.records import Solution
from trtkit.solve.sandbox import Call, CallResult, Sandbox, SandboxOptions
from trtkit.solve.solver import Solver
from trtkit.solve.tools import CodeCall

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

OPTIONS = SandboxOptions(seconds=30, unsafe=True)
CHAT = cast(Chat, FakeChat())


class SlowSandbox:
    """Answers each call after ``polls`` questions."""

    def __init__(self, polls: float, options: SandboxOptions = OPTIONS) -> None:
        self.options = options
        self.calls: list[Call] = []
        self.dropped: list[str] = []
        self._polls = polls
        self._left: dict[str, float] = {}

    @property
    def pending(self) -> int:
        return len(self._left)

    def submit(self, call: Call) -> None:
        self.calls.append(call)
        self._left[call.id] = self._polls

    def drop(self, call_id: str) -> None:
        self.dropped.append(call_id)
        self._left.pop(call_id, None)

    def ready(self, seconds: float = 0.0) -> list[CallResult]:
        self._left = {name: left - 1 for name, left in self._left.items()}
        done = [name for name, left in self._left.items() if left <= 0]
        for name in done:
            del self._left[name]
        return [CallResult(id=name, status="ok", output="42\n") for name in done]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(OPTIONS, workers=2) as shared:
        yield shared


def solve(
    grader: Grader, engine: FakeEngine, sandbox: Any, chat: Any = CHAT, journal: Journal | None = None, **options: Any
) -> Solution:
    chosen = SolveOptions(**{"samples": 1, "tools": OPTIONS, "save_text": True, **options})
    solver = Solver(engine, chat, chosen, grader, journal)
    return solver.solve([Problem(id="p", text="What is 6 * 7?")], sandbox=sandbox)[0]


def speaker(*turns: str, chat: Any = CHAT, tail: str = " and on" * 30) -> Any:
    """Says ``turns`` one after the other, each after it has read a reply; {} is what the last output block held."""

    def script(request: Request) -> Sequence[int]:
        heard = chat.decode(request.prompt).split("```output\n")
        output = heard[-1].partition("```")[0].strip()
        said = turns[min(len(heard), len(turns)) - 1].replace("{}", "{" + output + "}")
        return [*chat.encode(said + tail), EOS_ID]

    return script


CODE = "Compute.\n```python\nprint(6 * 7)\n```"
ANSWER = "So \\boxed{}.</think>"


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("burst", [1, 3, 500])
def test_the_output_goes_back_into_the_row(grader: Grader, sandbox: Sandbox, single: bool, burst: int) -> None:
    chat = FakeChat(single_think_end=single)
    engine = FakeEngine(speaker(CODE, ANSWER, chat=chat), burst=burst)
    [attempt] = solve(grader, engine, sandbox, chat).attempts
    assert attempt.text == f"{CODE}\n```output\n42\n```\nSo \\boxed{{42}}.</think>"
    assert (attempt.box, attempt.tool_calls, attempt.ending, attempt.forced) == ("42", 1, Ending.THINK, False)
    generated = len(CODE) + len("So \\boxed{42}.") + len(chat.think_end)
    assert attempt.tokens == generated, "what it read is not what it wrote"
    [(request_id, tokens, drop)] = engine.extended
    assert (request_id, chat.decode(tokens)) == ("p/0", "\n```output\n42\n```\n")
    assert drop == {1: 0, 3: -len(CODE) % 3, 500: len(" and on" * 30) + 1}[burst]
    assert not engine.has_work


def test_later_calls_know_the_names_of_earlier_ones(grader: Grader, sandbox: Sandbox) -> None:
    turns = (
        "```python\nx = 40\nprint('unseen again')\n```\n",
        "<tool_call>\ny = 1 / 0\n</tool_call>",
        "```python\nx + 2\n```",
        ANSWER,
    )
    [attempt] = solve(grader, FakeEngine(speaker(*turns, tail="")), sandbox).attempts
    assert attempt.tool_calls == 3
    assert attempt.box == "42"
    assert attempt.text is not None
    assert attempt.text.count("unseen again\n```") == 1
    assert "</tool_call>\n```output\nZeroDivisionError: division by zero\n  line 1: y = 1 / 0\n```\n" in attempt.text


CRASHES = {
    "os._exit(0)": "it ended Python itself, with exit code 0",
    "os._exit(1)": "it ended Python itself, with exit code 1",
    "import ctypes; ctypes.string_at(0)": "SIGSEGV",
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_block_that_ends_the_interpreter_is_told_and_does_not_silence_later_ones(
    grader: Grader, sandbox: Sandbox, crash: str
) -> None:
    turns = (
        "```python\nimport os\nx = 40\n```\n",
        f"```python\nz = 1\nprint('so far')\n{crash}\n```",
        "```python\nprint(x + 2, 'z' in globals())\n```",
        "So \\boxed{42}.</think>",
    )
    [attempt] = solve(grader, FakeEngine(speaker(*turns, tail="")), sandbox).attempts
    assert attempt.text is not None
    said = f"```output\nso far\nthe code crashed ({CRASHES[crash]}); what this block defined is lost\n```\n"
    assert said in attempt.text
    assert "```output\n42 False\n```\n" in attempt.text


@pytest.mark.parametrize("trap", ["1 / (not again)", "again and os._exit(0)"])
def test_blocks_that_do_not_end_well_again_are_left_out_and_the_model_is_told(
    grader: Grader, sandbox: Sandbox, trap: str
) -> None:
    """A block that goes well once, and fails when it is run again, in silence, before a later one."""
    turns = (
        "```python\nx = 40\n```",
        f"```python\nimport os\nagain = os.fstat(1).st_rdev != 0\n{trap};\n```",
        "```python\nprint('x' in globals())\n```",
        "```python\ny = 2\n```",
        "```python\nprint(y)\n```",
        "So \\boxed{2}.</think>",
    )
    [attempt] = solve(grader, FakeEngine(speaker(*turns, tail="")), sandbox).attempts
    assert attempt.text is not None
    assert "```output\nFalse\nPython was started anew: what earlier blocks defined is lost\n```\n" in attempt.text
    assert attempt.text.count("started anew") == 1
    assert "```output\n2\n```\n" in attempt.text
    assert attempt.tool_calls == 5


def test_calls_are_counted_and_limited(grader: Grader, sandbox: Sandbox, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        turn = "```python\nprint(5)\n```\n"
        engine = FakeEngine(speaker(turn, tail=turn), burst=4)
        solution = solve(grader, engine, sandbox, journal=journal, max_tokens=400)
    [attempt] = solution.attempts
    assert attempt.tool_calls == OPTIONS.calls == 6
    assert attempt.text is not None
    assert attempt.text.count("```output") == 6
    assert attempt.text.count("No code calls are left") == 1
    assert read_history(tmp_path / "journal.jsonl").attempts["p"][0].tool_calls == 6


class Steps(FakeEngine):
    """Remembers in which step each request ended."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.ended: dict[str, int] = {}

    def step(self) -> list[StepOutput]:
        outputs = super().step()
        for output in outputs:
            if output.finish is not None:
                self.ended.setdefault(output.request_id, self.steps)
        return outputs


def test_a_row_that_waits_does_not_hold_up_the_others(grader: Grader) -> None:
    def script(request: Request) -> Sequence[int]:
        if request.id == "p/0":
            return speaker(CODE, ANSWER)(request)
        return CHAT.encode("Thinking. " * 20 + "\\boxed{7}</think>")

    ended = []
    for polls in (1, 10_000):
        engine, slow = Steps(script, rows=4), SlowSandbox(polls)
        # Under a clock samples count as they arrive; without one the decision would wait for p/0.
        solution = solve(grader, engine, slow, samples=4, stop=("agree(3)",), time_limit=3600.0)
        assert len(slow.calls) == 1
        assert solution.answer is not None
        assert solution.answer.key == "7"
        ended.append({name: step for name, step in engine.ended.items() if name != "p/0"})
        assert slow.dropped == (["p/0"] if polls > 1 else []), "nobody wants it any more"
        assert not engine._resting
    assert ended[0] == ended[1] == dict.fromkeys(("p/1", "p/2", "p/3"), len("Thinking. ") * 20 + len("\\boxed{7}") + 1)


def test_all_rows_may_wait_at_once(grader: Grader) -> None:
    engine, slow = FakeEngine(speaker(CODE, ANSWER)), SlowSandbox(50)
    solution = solve(grader, engine, slow, samples=3, full_vote=True)
    assert [attempt.box for attempt in solution.attempts] == ["42"] * 3
    assert engine.steps >= len(CODE) + 49


def test_what_was_said_after_the_call_is_taken_back(grader: Grader) -> None:
    """A fast row may have ended before the code block is noticed; that end does not count."""
    tail = " The answer is \\boxed{13}</think>"
    for burst in (7, 500):
        engine = FakeEngine(speaker(CODE, ANSWER, tail=tail), burst=burst)
        [attempt] = solve(grader, engine, SlowSandbox(1)).attempts
        assert attempt.box == "42"
        assert attempt.text is not None
        assert "13" not in attempt.text


def test_an_end_before_the_call_counts(grader: Grader) -> None:
    engine = FakeEngine(speaker("\\boxed{1}</think>" + CODE), burst=500)
    slow = SlowSandbox(1)
    assert solve(grader, engine, slow).attempts[0].box == "1"
    assert slow.calls == []


def test_replies_do_not_count_against_the_budget(grader: Grader) -> None:
    enough = len(CODE) + len("So \\boxed{42}.") + 1
    for budget, ending in ((enough, Ending.THINK), (enough - 1, Ending.LENGTH)):
        engine = FakeEngine(speaker(CODE, ANSWER, tail=""))
        [attempt] = solve(grader, engine, SlowSandbox(1), max_tokens=budget, force_close=False).attempts
        assert (attempt.ending, attempt.tokens) == (ending, budget)


def test_a_call_with_the_last_token_is_not_run(grader: Grader) -> None:
    slow = SlowSandbox(1)
    [attempt] = solve(grader, FakeEngine(speaker(CODE)), slow, max_tokens=len(CODE), force_close=False).attempts
    assert (attempt.ending, attempt.tool_calls, slow.calls) == (Ending.LENGTH, 0, [])


@pytest.mark.parametrize(("limit", "calls", "replies"), [(120, 0, 0), (130, 1, 0), (170, 1, 1)])
def test_room_is_left_to_be_made_to_answer(grader: Grader, limit: int, calls: int, replies: int) -> None:
    """The engine's total length: no room for the code, for the reply, and for what comes after it."""

    def script(request: Request) -> Sequence[int]:
        heard = CHAT.decode(request.prompt)
        if heard.endswith("\\boxed{"):
            return CHAT.encode("42} and")
        return CHAT.encode("and so on " * 99) if "```output" in heard else CHAT.encode(CODE + " and so on" * 99)

    engine = FakeEngine(script, max_total_tokens=limit)
    [attempt] = solve(grader, engine, SlowSandbox(1), max_tokens=1000).attempts
    assert (attempt.ending, attempt.forced, attempt.box) == (Ending.LENGTH, True, "42")
    assert attempt.text is not None
    assert (attempt.tool_calls, attempt.text.count("```output")) == (calls, replies)
    assert len(engine.submitted[0].prompt) + len(CHAT.encode(attempt.text)) <= limit


def test_an_engine_that_cannot_extend_ends_the_row(grader: Grader) -> None:
    class Refusing(FakeEngine):
        def extend(self, request_id: str, tokens: Sequence[int], *, max_tokens: int, drop: int = 0) -> None:
            raise RequestError("too long")

    [attempt] = solve(grader, Refusing(speaker(CODE, ANSWER)), SlowSandbox(2)).attempts
    assert (attempt.ending, attempt.finish, attempt.tool_calls) == (Ending.LENGTH, FinishReason.LENGTH, 1)


def test_the_deadline_of_a_waiting_row_goes_on(grader: Grader) -> None:
    """Its code is given up, and it is made to answer with what was generated too much taken back."""
    now = 0.0
    engine, slow = FakeEngine(speaker(CODE, "unused"), burst=len(CODE) + 5), SlowSandbox(10_000)

    def clock() -> float:
        nonlocal now
        now += 0.5
        return now

    options = SolveOptions(samples=1, tools=OPTIONS, save_text=True, time_limit=30.0)
    solver = Solver(engine, CHAT, options, grader, clock=clock)
    [solution] = solver.solve([Problem(id="p", text="x")], sandbox=cast(Sandbox, slow))
    assert slow.dropped == ["p/0"]
    assert engine.steps < 200
    [(_, tokens, drop)] = engine.extended
    assert drop == 5
    assert CHAT.decode(tokens).startswith("\n</think>")
    assert solution.stopped_early == "deadline" or solution.attempts[0].ending is Ending.DEADLINE


def test_without_tools_code_is_text(grader: Grader) -> None:
    engine = FakeEngine(speaker(CODE + " is \\boxed{1}</think>"))
    [attempt] = solve(grader, engine, None, tools=None, force_close=False).attempts
    assert (attempt.box, attempt.tool_calls) == ("1", 0)
    assert not engine.submitted[0].hold


def test_a_sample_says_the_same_whatever_the_batch(grader: Grader) -> None:
    def script(request: Request) -> Sequence[int]:
        rng = random.Random(f"{request.seed}{len(request.prompt)}")
        text = "hm " * rng.randint(1, 30) + (CODE if rng.random() < 0.7 else "") + "ok " * rng.randint(0, 9)
        return CHAT.encode(text + f"\\boxed{{{rng.randint(1, 3)}}}</think>")

    said = set()
    for rows, burst, polls in ((1, 1, 1), (8, 3, 5), (3, 50, 20)):
        solution = solve(
            grader, FakeEngine(script, rows=rows, burst=burst), SlowSandbox(polls), samples=8, full_vote=True
        )
        by_index = sorted(solution.attempts, key=lambda attempt: attempt.index)
        said.add(tuple((attempt.text, attempt.tokens, attempt.tool_calls) for attempt in by_index))
        assert sum(attempt.tool_calls for attempt in by_index) > 3
    assert len(said) == 1


class WideChat(FakeChat):
    """One character for each id of the tiny models."""

    def prompt(self, problem: str, variant: PromptVariant) -> tuple[int, ...]:
        return tuple(problem.encode())

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(ord(letter) if ord(letter) < 128 else ord(letter) - 0x4E00 for letter in text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token if token < 128 else token + 0x4E00) for token in tokens)


@pytest.mark.parametrize("tree", [None, TreeShape(beams=2, length=3)])
def test_a_real_row_goes_on_in_its_cache(
    grader: Grader, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: TreeShape | None
) -> None:
    """The reference: a new request whose prompt is everything so far, the output included. Whatever the tiny model
    says at its tenth token is taken for a call."""

    def tenth(tokens: Sequence[int], seen: int, decode: Any, *, since: int = 0) -> tuple[int, CodeCall] | None:
        return (10, CodeCall(code="print(6 * 7)", end=0)) if since == 0 and seen < 10 <= len(tokens) else None

    monkeypatch.setattr(code_rows, "end_of_call", tenth)
    chat, reply = WideChat(), "\n```output\n42\n```\n"
    chat.eos_ids, chat.think_end = (), (0, 0)
    model = DecoderModel(
        open_unified(save_tiny(tmp_path)), device=torch.device("cpu"), dtype=torch.float32, max_tokens=300
    )
    drafting = None
    if tree is not None:
        torch.manual_seed(5)
        drafting = Drafting(head=Drafter(DrafterConfig(hidden_size=256, vocab_size=320, exit_dim=32)), trees=(tree,))
    limits = TorchLimits(rows=4, total_tokens=256, kv_blocks=200, block_size=4)
    options = SolveOptions(samples=3, max_tokens=30, save_text=True, tools=OPTIONS, full_vote=True)
    with TorchEngine(model, limits, drafting) as engine:
        solver = Solver(engine, cast(Chat, chat), options, grader)
        [solution] = solver.solve([Problem(id="p", text="What is 6 * 7?")], sandbox=sandbox)
        prefilled = engine.stats().prefill_tokens
    submitted = {f"p/{attempt.index}": attempt for attempt in solution.attempts}
    assert len(submitted) == 3
    for name, attempt in submitted.items():
        assert attempt.text is not None
        assert attempt.tokens == 30
        assert attempt.text[10:].startswith(reply)
        so_far = (*b"What is 6 * 7?", *chat.encode(attempt.text[:10] + reply))
        seed = sample_seed(options.seed, "p", attempt.index)
        again = Request(id=name, prompt=so_far, sampling=options.sampling, max_tokens=20, seed=seed)
        with TorchEngine(model, limits) as fresh:
            tokens, _ = run_all(fresh, [again])
        assert chat.decode(tokens[name]) == attempt.text[10 + len(reply) :]
    assert prefilled <= len("What is 6 * 7?") + 3 * (len(reply) + 2), "nothing was computed twice"
