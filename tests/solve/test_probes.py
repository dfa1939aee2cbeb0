"""Samples that are asked on their way: what they write stays the same, and saved answers say what asking would save."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from tests.examples import slow
from tests.on_server import practice_engine, practice_problems, remote, served
from trtkit.chat import Chat, load_chat
from trtkit.errors import InputError, UsageError
from trtkit.runtime.api import Engine, FinishReason, SamplingParams
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.solve import probes
from trtkit.solve.answers import AnswerMode
from trtkit.solve.ends import Ending, Probe
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal, read_history
from trtkit.solve.options import SolveOptions
from trtkit.solve.probe_options import ProbeOptions, read_probe
from trtkit.solve.probe_replay import asked, check_probes
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.replay import parse_policy
from trtkit.solve.run import Outcome, Places, run_solve
from trtkit.solve.solver import Solver
from trtkit.solve.traces import Trace, TracedProblem, Traces, read_run
from trtkit.solve.tradeoff import ReplayOptions, trade_offs

MODE = AnswerMode()
PLAIN = OpenOptions(device="cpu", threads=1, speculative=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return practice_engine(tmp_path_factory.mktemp("built") / "engine")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[Problem]:
    return read_problems(practice_problems(tmp_path_factory.mktemp("asked") / "problems.jsonl", (0, 9)))


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


def options(probe: str | None, **more: Any) -> SolveOptions:
    sampling = SamplingParams(temperature=1.0)
    asking = None if probe is None else read_probe(probe)
    return SolveOptions(**{"samples": 4, "sampling": sampling, "stop": ("none",), "probe": asking, **more})


def solve(
    engine: Engine, chat: Chat, problems: Sequence[Problem], grader: Grader, wanted: SolveOptions, **more: Any
) -> list[Solution]:
    return Solver(engine, chat, wanted, grader, **more).solve(problems)


def attempts(solutions: Sequence[Solution]) -> dict[tuple[str, int], Attempt]:
    return {(each.problem_id, each.index): replace(each, seconds=0.0) for one in solutions for each in one.attempts}


@pytest.fixture(scope="module")
def saved(directory: Path, problems: list[Problem], grader: Grader) -> dict[tuple[str, int], Attempt]:
    """All samples, asked every 16 tokens and never ended for it."""
    with open_engine(directory, PLAIN) as engine:
        found = solve(engine, load_chat(directory), problems, grader, options("16,0", full_vote=True))
    together = attempts(found)
    said = sum(probe.tokens for each in together.values() for probe in each.probes)
    assert sum(solution.tokens for solution in found) >= sum(each.tokens for each in together.values()) + said
    return together


@pytest.mark.parametrize("lookup", [False, slow(True)], ids=["plain", "drafting from the text"])
def test_a_sample_that_was_asked_writes_what_it_would_have_written(
    directory: Path, problems: list[Problem], grader: Grader, saved: dict[tuple[str, int], Attempt], lookup: bool
) -> None:
    """Tokens, box and end of every sample; the batch is smaller than the samples, and some rows draft."""
    drafting = replace(PLAIN, speculative=True, lookup=True, tree=TreeShape(beams=1, length=3))
    with open_engine(directory, drafting if lookup else PLAIN) as engine:
        chat = load_chat(directory)
        never = attempts(solve(engine, chat, problems, grader, options(None, full_vote=True)))
        again = attempts(solve(engine, chat, problems, grader, options("16,0", full_vote=True))) if lookup else saved
    assert {name: replace(each, probes=()) for name, each in again.items()} == never
    assert again == saved
    assert len({each.box for each in saved.values()}) > 1
    for each in saved.values():
        assert [probe.at for probe in each.probes] == list(range(16, each.tokens, 16))
        assert sum(probe.box is not None for probe in each.probes) > len(each.probes) / 2


def test_what_was_saved_says_what_asking_would_do(
    directory: Path, problems: list[Problem], grader: Grader, saved: dict[tuple[str, int], Attempt]
) -> None:
    """Sample for sample: a run that ends settled ones, and that worked out from the answers of one that does not."""
    wanted = ProbeOptions(every=16, times=2)
    with open_engine(directory, PLAIN) as engine:
        found = attempts(solve(engine, load_chat(directory), problems, grader, options(str(wanted))))
    settled = 0
    for name, each in found.items():
        trace = Trace(index=0, box=saved[name].box, tokens=saved[name].tokens, closed=True, looped=True,
                      probes=saved[name].probes)  # fmt: skip
        expected = asked(trace, wanted, MODE, grader.same)
        assert each.box == expected.box
        assert each.tokens + sum(probe.tokens for probe in each.probes) - _last(each) == expected.tokens
        assert (each.ending is Ending.SETTLED) == (not expected.looped), "which only those that settle are not"
        assert not each.forced
        settled += each.ending is Ending.SETTLED
    assert 0 < settled < len(found)


def _last(attempt: Attempt) -> int:
    """Of a settled sample, the last answer is part of its tokens."""
    return attempt.probes[-1].tokens if attempt.ending is Ending.SETTLED else 0


@pytest.mark.slow
def test_revote_on_saved_answers_is_the_run(directory: Path, tmp_path: Path, grader: Grader) -> None:
    """Accuracy with ``probe(16,2)``, from what was said every 8 tokens, against a run with ``--probe 16,2``."""
    file = practice_problems(tmp_path / "problems.jsonl", (0, 1, 9))

    def run(name: str, wanted: SolveOptions) -> Outcome:
        places = Places(problems=file, engine=directory, out=tmp_path / name)
        return run_solve(places, lambda: open_engine(directory, PLAIN), load_chat(directory), wanted)

    run("saved", options("8,0", full_vote=True))
    traces = read_run(tmp_path / "saved")
    check_probes(traces, [ProbeOptions(every=16, times=2)])
    rules = [parse_policy(text) for text in ("full", "full+probe(16,2)", "full+probe(16,0)")]
    full, settling, watching = trade_offs(traces, rules, ReplayOptions(samples=(4,), draws=1), grader)
    summary = run("settling", options("16,2")).summary
    assert settling.accuracy is not None
    assert settling.accuracy.value == summary.accuracy
    assert summary.settled > 0
    spent = [
        probe.tokens for one in traces.problems for trace in one.traces for probe in trace.probes if probe.at % 16 == 0
    ]
    assert watching.tokens.value - full.tokens.value == sum(spent)
    assert watching.accuracy == full.accuracy


def test_answers_survive_in_the_journal(
    directory: Path, problems: list[Problem], grader: Grader, saved: dict[tuple[str, int], Attempt], tmp_path: Path
) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal, open_engine(directory, PLAIN) as engine:
        solve(engine, load_chat(directory), problems[:1], grader, options("16,0", full_vote=True), journal=journal)
    history = read_history(tmp_path / "journal.jsonl")
    found = {each.index: each.probes for each in history.attempts[problems[0].id]}
    assert found == {index: saved[problems[0].id, index].probes for index in range(4)}


def test_on_a_server(directory: Path, problems: list[Problem], grader: Grader) -> None:
    """There a question is a request of its own, and what comes after it is drawn with another seed."""
    with served(directory) as url:
        there = remote(url)
        with there.open(PLAIN) as engine:
            found = solve(engine, load_chat(directory), problems[:2], grader, options("16,3"))
    for each in attempts(found).values():
        assert [probe.at for probe in each.probes] == [16 * (place + 1) for place in range(len(each.probes))]
        assert each.ending in (Ending.THINK, Ending.SETTLED)
        assert each.box is not None


def test_time_that_is_up_while_a_sample_is_asked(
    directory: Path, problems: list[Problem], grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says then is its answer. A clock that ticks with each step, and all limits that end within some steps."""
    adopted: list[bool] = []
    adopt = probes.Probes.adopt

    def counting(self: probes.Probes, sample: Any, ending: Ending) -> bool:
        adopted.append(done := adopt(self, sample, ending) and ending is Ending.DEADLINE)
        return done or ending is Ending.SETTLED

    monkeypatch.setattr(probes.Probes, "adopt", counting)
    with open_engine(directory, PLAIN) as engine:
        chat = load_chat(directory)
        for limit in range(44, 64, 2):
            ticks = itertools.count()
            wanted = options("16,3", time_limit=float(limit), reserve=0.0, samples=2)
            (found,) = solve(engine, chat, problems[:1], grader, wanted, clock=lambda ticks=ticks: float(next(ticks)))
            for each in found.attempts:
                assert each.box is not None
                assert each.forced == (each.ending is Ending.DEADLINE)
            assert not engine.has_work
    assert any(adopted)


def test_no_room_for_a_question(directory: Path, problems: list[Problem], grader: Grader) -> None:
    """Nobody is asked beyond the budget, and one token before it is enough."""
    with open_engine(directory, PLAIN) as engine:
        for budget, places in ((16, []), (17, [16])):
            wanted = options("16,0", full_vote=True, max_tokens=budget)
            found = solve(engine, load_chat(directory), problems[:1], grader, wanted)
            for each in attempts(found).values():
                assert (each.tokens, each.finish) == (budget, FinishReason.LENGTH)
                assert [probe.at for probe in each.probes] == places


# ---- options and rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "512", "512,3,4", "a,b", "0,3", "512,1", "512,-1", "-5,3"])
def test_what_is_no_probe(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_probe(text)
    assert "512,3" in str(refused.value.hint)


def test_options_that_do_not_go_together() -> None:
    for more in ({"full_vote": True}, {"force_close": False}):
        with pytest.raises(UsageError):
            options("16,3", **more)
        assert options("16,0", **more).probe == ProbeOptions(every=16, times=0)


def test_rules_name_their_probe() -> None:
    assert parse_policy("full + probe(32, 3)").text == "full+probe(32,3)"
    assert parse_policy("probe(32,3)+agree(4)").text == "agree(4)+probe(32,3)"
    assert parse_policy("probe(32,3)").text == "unassailable+probe(32,3)"
    for text in ("probe(32)", "probe(1,1)", "probe(8,2)+probe(8,3)", "full+probes(8,2)"):
        with pytest.raises(UsageError):
            parse_policy(text)


def _traces(*probes: Probe) -> Traces:
    trace = Trace(index=0, box="7", tokens=100, closed=True, looped=False, seconds=10.0, probes=probes)
    return Traces(problems=(TracedProblem(id="p", gold="7", traces=(trace,)),))


def test_samples_that_were_not_asked_like_that() -> None:
    every_20 = _traces(Probe(20, 2, "5"), Probe(40, 2, "7"), Probe(60, 2, "7"))
    check_probes(every_20, [ProbeOptions(every=40, times=2)])
    check_probes(_traces(), [])
    with pytest.raises(InputError, match="every 20 tokens"):
        check_probes(every_20, [ProbeOptions(every=30, times=2)])
    with pytest.raises(InputError, match="not asked"):
        check_probes(_traces(), [ProbeOptions(every=20, times=2)])


@pytest.mark.parametrize(
    ("boxes", "times", "box", "tokens"),
    [
        (["5", "5"], 2, "5", 44),
        (["5", "7", "7.0"], 2, "7.0", 66),
        (["5", None, "5", "5"], 2, "5", 88),
        (["5", "7", "5", "7"], 2, "9", 108),
        (["5", "5"], 0, "9", 104),
        ([], 2, "9", 100),
    ],
)
def test_where_a_saved_sample_settles(
    boxes: list[str | None], times: int, box: str, tokens: int, grader: Grader
) -> None:
    said = tuple(Probe(20 * (place + 1), 2, each) for place, each in enumerate(boxes))
    trace = Trace(index=0, box="9", tokens=100, closed=False, looped=True, seconds=10.0, probes=said)
    found = asked(trace, ProbeOptions(every=20, times=times), MODE, grader.same)
    assert (found.box, found.tokens, found.seconds) == (box, tokens, pytest.approx(tokens / 10))
    assert found.looped == (box == "9")
