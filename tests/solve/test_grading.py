from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.examples import slow
from trtkit.errors import TrtkitError
from trtkit.solve import grading
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.grading import Grader


def answer(text: str) -> Answer:
    found = read_answer(text, AnswerMode())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_seconds=2.0) as shared:
        yield shared


@pytest.mark.parametrize(
    ("gold", "given", "equal"),
    [
        ("1/2", "0.5", True),
        ("\\sqrt{12}", "2\\sqrt{3}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", True),
        ("x \\in [-2,7]", "[-2,7]", True),
        ("\\frac{\\pi}{6}", "\\pi/6", True),
        ("(2,\\infty)", "[2,\\infty)", False),
        ("x^3+1", "x^2+1", False),
        ("\\text{even}", "even", True),
        ("\\text{even}", "odd", False),
        ("A", "B", False),
        ("3R^2", "R^2 \\cdot 3", True),
        ("3.14", "\\pi", False),
    ],
)
def test_equality(grader: Grader, gold: str, given: str, equal: bool) -> None:
    assert grader.equal(answer(gold), answer(given)) is equal
    if equal:
        assert grader.same(answer(gold), answer(given))


def test_numbers_words_and_long_text_need_no_process() -> None:
    with Grader() as grader:
        assert not grader.equal(answer("1/3"), answer("0.333"))
        assert not grader.equal(answer("3"), answer("three"))
        assert not grader.equal(answer("x+" * 200 + "x"), answer("200x"))
        assert grader._worker is None


@pytest.mark.parametrize("bomb", ["10^{10^{10}}", slow("9!!!!!!!!!!!!")])
def test_bombs_are_different_within_the_timeout(bomb: str) -> None:
    with Grader(timeout_seconds=0.5) as grader:
        gold = answer("\\sqrt{20}")
        began = time.monotonic()
        assert not grader.equal(gold, answer(bomb))
        assert time.monotonic() - began < 30, "a few starts of the worker and twice the timeout"
        began = time.monotonic()
        assert not grader.equal(answer("\\sqrt{7}"), answer(bomb))
        assert time.monotonic() - began < 0.1, "it is known by now"
        assert grader.equal(gold, answer("2\\sqrt{5}")), "the gold answer must not be blamed for it"


def test_a_worker_that_dies_is_replaced() -> None:
    with Grader() as grader:
        assert grader.equal(answer("\\sqrt{8}"), answer("2\\sqrt{2}"))
        assert grader._worker is not None
        os.kill(grader._worker.pid, signal.SIGKILL)
        grader._worker.wait()
        assert grader.equal(answer("\\sqrt{18}"), answer("3\\sqrt{2}"))


def test_nothing_is_left_running() -> None:
    grader = Grader()
    grader.equal(answer("x+1"), answer("1+x"))
    worker = grader._worker
    assert worker is not None
    grader.close()
    grader.close()
    assert worker.poll() is not None


def test_the_worker_ends_with_its_parent() -> None:
    script = (
        "from trtkit.solve.grading import Grader\n"
        "from trtkit.solve.answers import *\n"
        "grader, mode = Grader(), AnswerMode()\n"
        "grader.equal(read_answer('x+1', mode), read_answer('1+x', mode))\n"
        "print(grader._worker.pid, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    worker = int(done.stdout)
    deadline = time.monotonic() + 10
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_broken_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_STARTUP_SECONDS", 0.0)
    with Grader() as grader, pytest.raises(TrtkitError, match="cannot be used"):
        grader.equal(answer("x+1"), answer("1+x"))


def test_threads_share_a_grader(grader: Grader) -> None:
    """Each gets the reply to its own question."""
    questions = [(f"x^2+{number}", f"{number}+x^2" if number % 2 else f"x^2-{number}") for number in range(2, 42)]
    with ThreadPoolExecutor(max_workers=8) as threads:
        replies = list(threads.map(lambda pair: grader.equal(answer(pair[0]), answer(pair[1])), questions))
    assert replies == [bool(number % 2) for number in range(2, 42)]
