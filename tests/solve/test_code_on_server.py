"""Samples that write code on a server, whose words come in pieces of any size."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fakes import FakeEngine
from tests.on_server import CHAT, attempts, check_same, remote
from tests.serve.serving import serving
from tests.solve.scripted import places_in
from trtkit.runtime.api import FinishReason, Request, SamplingParams
from trtkit.solve.options import SolveOptions
from trtkit.solve.run import run_solve
from trtkit.solve.sandbox import SandboxOptions


def coding(request: Request) -> Sequence[int]:
    """Has a product worked out, and answers with what it reads."""
    heard = CHAT.decode(request.prompt).split("```output\n")
    if len(heard) == 1:
        return CHAT.encode(f"Compute.\n```python\nprint({request.seed % 3 + 1} * 7)\n```\nand so" + " on" * 20)
    return CHAT.encode(f"So \\boxed{{{heard[-1].partition(chr(10))[0]}}}.</think>")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
@pytest.mark.parametrize("burst", [2, 500])
def test_code_runs_as_with_the_engine_itself(tmp_path: Path, burst: int) -> None:
    places = places_in(tmp_path, 3)
    options = SolveOptions(samples=3, save_text=True, tools=SandboxOptions(seconds=30, unsafe=True))
    run_solve(places, lambda: FakeEngine(coding, rows=6, burst=5), CHAT, options)
    with serving(lambda: FakeEngine(coding, rows=6, burst=burst), CHAT) as (url, _):
        there, out = remote(url), tmp_path / "there"
        run_solve(dataclasses.replace(places, engine=there.place, out=out), there.open, CHAT, options)
    check_same(places.out, out)
    samples = attempts(out).values()
    assert all(sample["tool_calls"] == 1 for sample in samples)
    assert {sample["box"] for sample in samples} <= {"7", "14", "21"}


def test_a_step_tells_of_a_sample_once() -> None:
    """Who pauses a sample after its first words of a step must have seen all of them, and whether it has ended."""
    asked = Request(id="a", prompt=(65,), sampling=SamplingParams(), max_tokens=40, seed=0, hold=True)
    with serving(lambda: FakeEngine(lambda _: [98] * 60), CHAT) as (url, _), remote(url).open() as engine:
        engine.submit(asked)
        time.sleep(0.5)  # all of it has come by then, a token at a time
        [output] = engine.step()
    assert (output.tokens, output.finish) == ((98,) * 40, FinishReason.LENGTH)
