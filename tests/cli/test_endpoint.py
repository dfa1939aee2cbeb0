"""``trtkit solve --endpoint`` as a user runs it: the journal of an engine directory, and what a server's end leaves."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.examples import slow
from tests.fakes import FakeEngine
from tests.on_server import (
    attempts,
    check_same,
    confidences,
    counted,
    impatient,
    journal,
    practice_engine,
    practice_problems,
    served,
)
from tests.serve.serving import wait_for
from trtkit.chat import load_chat
from trtkit.cli.app import run
from trtkit.runtime.api import Request, StepOutput


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return practice_engine(tmp_path_factory.mktemp("built") / "engine")


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    return practice_problems(tmp_path / "p.jsonl")


SAID = "It is \\boxed{35}. I think so.\n</think>"


def scripted(engine: Path, *, rows: int = 1, breaks_after: int | None = None, seconds: float = 0.0) -> FakeEngine:
    """Answers 35, a few tokens in a step of so many seconds; after so many steps it is gone."""
    chat = load_chat(engine)

    class Engine(FakeEngine):
        def step(self) -> list[StepOutput]:
            if self.steps == breaks_after:
                raise RuntimeError("CUDA error")
            time.sleep(seconds)
            return super().step()

    whole = (*chat.encode(SAID), *chat.eos_ids)

    def say(request: Request) -> Sequence[int]:
        """Goes on where the prompt ends."""
        return whole[
            next(n for n in range(len(whole), -1, -1) if request.prompt[len(request.prompt) - n :] == whole[:n]) :
        ]

    return Engine(say, rows=rows, burst=4)


CASES = {
    "stopped early": "--stop agree(2) --together 2 -n 8",
    "made to answer": "--max-tokens 24",
    "first box": "--stop-at first-box --prompt system",
    "to the end of the turn": "--stop-at eos --kill-loops",
    "no rule": "--stop none --no-kill-loops",
    "full vote": "--full-vote",
    "confidence": "--weights confidence+damped --save-confidence",
    "code": "--tools python --tools-unsafe",
    "cuts": "--temperature 0.7 --top-k 3 --top-p 0.5 --min-p 0 --batch 3",
    "greedy": "--temperature 0",
}


ALIKE = ("confidence", "cuts", "first box", "to the end of the turn", "no rule", "full vote", "greedy")


@pytest.mark.parametrize("case", [slow(case) if case in ALIKE else case for case in CASES])
def test_a_server_gives_the_journal_of_its_engine(
    engine: Path, url: str, problems: Path, tmp_path: Path, case: str
) -> None:
    if case == "code" and not sys.platform.startswith("linux"):
        pytest.skip("the sandbox needs Linux")
    line = ["--quiet", "solve", str(problems), "-n", "4", "--max-tokens", "140", "--save-text", *CASES[case].split()]
    assert run([*line, "--out", str(tmp_path / "here"), "--engine", str(engine), "--device", "cpu"]) == 0
    assert run([*line, "--out", str(tmp_path / "there"), "--endpoint", url]) == 0
    check_same(tmp_path / "here", tmp_path / "there")
    solved = counted(tmp_path / "there")
    assert len(solved) == 3
    samples = [sample for problem in solved.values() for sample in problem["samples"]]
    if case == "made to answer":
        assert any(sample.get("forced") for sample in samples)
    elif case == "stopped early":
        assert {problem["stopped_early"] for problem in solved.values()} == {"agree(2)"}
    elif case == "confidence":
        sure = confidences(tmp_path / "there")
        assert sure.keys() == attempts(tmp_path / "there").keys()
        assert all(confidence < 0 for confidence in sure.values())
    else:
        assert {sample["box"] for sample in samples} & {"35", "49"}
    heads = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("here", "there")]
    assert heads[0]["arguments"] == heads[1]["arguments"]
    lanes = [journal(tmp_path / name)[0]["lanes"] for name in ("here", "there")]
    assert lanes[0] == lanes[1]


def test_what_a_user_sees_of_a_run_on_a_server(
    url: str, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default directory, the summary, the document, the next lines, and what other verbs say of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    made = ["-n", "2", "--max-tokens", "120", "--full-vote", "--save-text", "--json"]
    assert run(["solve", "p.jsonl", "--endpoint", f"{url}/v1/", *made]) == 0
    said = capsys.readouterr()
    *lines, last = said.out.splitlines()
    document = json.loads(last)
    assert list(document) == [
        "problems", "answered", "accuracy", "pass_at_1", "maj_at_k", "samples", "tokens", "tokens_per_second",
        "seconds", "stopped_early", "run_dir", "defaulted", "answers_per_problem", "forced", "looped", "settled",
        "cancelled", "out_of_time", "loading_seconds", "share_seconds", "time_limit", "engine",
    ]  # fmt: skip
    out = Path("runs") / "p-tiny"  # as the server calls the model
    assert document["run_dir"] == str(out)
    assert document["engine"]["tokens_per_step"] is None
    assert lines[-1] == f"next: trtkit report {out}"
    facts = [line.split()[0] for line in lines if line.startswith("  ")]
    assert facts == ["answered", "accuracy", "stopped", "samples", "tokens", "files"]
    assert "note:" not in said.err
    head = json.loads((out / "run.json").read_text())
    assert (head["engine"]["path"], head["engine"]["model"]) == (f"{url}/v1", "tiny")
    assert len(head["engine"]["template"]) == 64

    assert run(["report", str(out), "--markdown"]) == 0
    capsys.readouterr()
    page, text = (out / "report.html").read_text("utf-8"), (out / "report.md").read_text("utf-8")
    assert f"Engine: tiny at {url}/v1." in page
    assert f"| engine | tiny at {url}/v1 |" in text
    figures = [line for line in text.splitlines() if line.startswith("| Tokens per step")]
    assert all("not recorded" in line for line in figures)
    assert [odd for odd in ("None", "nan", "{'") if odd in text] == []
    assert run(["inspect", str(out)]) == 0
    assert f"tiny at {url}/v1" in capsys.readouterr().out

    assert run(["revote", str(out)]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("next: trtkit ")
    assert f"solve p.jsonl --endpoint {url}/v1 --endpoint-model tiny" in advice
    assert run([*shlex.split(advice), "--max-tokens", "40"]) == 0
    # A server may die of a seed.
    (out / "run.json").write_text(json.dumps({**head, "engine": {**head["engine"], "seeds": "no"}}))
    assert run(["revote", str(out)]) == 0
    assert "--endpoint-model tiny --no-endpoint-seeds" in capsys.readouterr().out.splitlines()[-1]


class Going:
    """A server that ends when it is told to, in a thread that takes its time."""

    def __init__(self, engine: Path, *, port: int = 0, **options: Any) -> None:
        self._served = served(engine, lambda: scripted(engine, **options), port=port)
        self.url = self._served.__enter__()
        self.port = int(self.url.rpartition(":")[2])

    def end(self) -> None:
        self._served.__exit__(None, None, None)


def test_a_server_that_goes_away_ends_the_run_in_words_and_the_same_command_goes_on(
    engine: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impatient(monkeypatch)
    out = tmp_path / "run"
    first = Going(engine, seconds=0.1)
    line = ["--quiet", "solve", str(problems), "-n", "3", "--order", "sequential", "--stop", "none", "--out", str(out)]
    line += ["--endpoint", first.url]

    def ends_in_the_middle() -> None:
        seen = out / "journal.jsonl"
        wait_for(lambda: seen.exists() and '"attempt"' in seen.read_text())
        first.end()

    thread = threading.Thread(target=ends_in_the_middle)
    thread.start()
    codes = [run(line)]
    thread.join()
    error = capsys.readouterr().err
    assert codes == [1]
    assert "Traceback" not in error
    assert f"error: {first.url}/v1, model tiny: the server has not gone on with practice-00" in error
    assert "hint:  when it runs again, the same command goes on from here" in error
    kept = attempts(out)
    assert kept

    assert run(line) == 1  # while it is away, it is told at once
    assert f"error: {first.url}/v1: the server cannot be reached" in capsys.readouterr().err
    again = Going(engine, port=first.port)
    try:
        assert run(line) == 0
    finally:
        again.end()
    everything = [(row["problem"], row["index"]) for row in journal(out) if row["kind"] == "attempt"]
    assert len(everything) == len(set(everything)), "a sample was made twice"
    assert {name: attempts(out)[name] for name in kept} == kept
    assert {problem["answer"] for problem in counted(out).values()} == {"35"}


@pytest.mark.parametrize("most", [14, 200])
def test_an_engine_that_fails_behind_the_server_costs_a_sample_nothing(
    engine: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    most: int,
) -> None:  # fmt: skip
    """The server opens it anew, and the samples go on from where they were, to where they had to end."""
    impatient(monkeypatch, 20.0)
    opened: list[FakeEngine] = []

    def opening() -> FakeEngine:
        opened.append(scripted(engine, rows=4, breaks_after=None if opened else 3))
        return opened[-1]

    with served(engine, opening) as url:
        line = ["solve", str(problems), "-n", "3", "--out", str(tmp_path / "run"), "--endpoint", url, "--save-text"]
        assert run([*line, "--full-vote", "--max-tokens", str(most)]) == 0
    assert len(opened) == 2
    assert capsys.readouterr().err.count("the server let go of a sample") == 1
    chat, ended = load_chat(engine), attempts(tmp_path / "run").values()
    assert len(ended) == 9
    assert {row["text"] for row in ended} == {chat.decode(chat.encode(SAID)[:most])}
    assert {row["tokens"] for row in ended} == {min(most, len(chat.encode(SAID)))}


def test_batch_bounds_the_open_requests(engine: Path, problems: Path, tmp_path: Path) -> None:
    most = []

    class Watched(FakeEngine):
        def step(self) -> list[StepOutput]:
            most.append(len(self._left))
            time.sleep(0.03)
            return super().step()

    script = load_chat(engine).encode("hm " * 20 + "</think>")
    with served(engine, lambda: Watched(lambda _: script, rows=16, burst=16)) as url:
        line = ["--quiet", "solve", str(problems), "-n", "8", "--endpoint", url, "--full-vote"]
        assert run([*line, "--batch", "3", "--out", str(tmp_path / "few")]) == 0
        assert max(most) == 3
        assert run([*line, "--out", str(tmp_path / "all")]) == 0
    assert max(most) == 16  # as many as the server says that it runs, and no more
