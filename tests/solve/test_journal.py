from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from trtkit.errors import InputError, OutputError
from trtkit.runtime.api import EngineStats, FinishReason
from trtkit.solve.ends import Ending
from trtkit.solve.journal import Journal, read_history
from trtkit.solve.journal_rows import engine_row, read_engine
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.vote import Tally


def attempt(problem: str, index: int, box: str | None = "7", text: str | None = None) -> Attempt:
    return Attempt(
        problem_id=problem,
        index=index,
        variant="solve",
        tokens=10 + index,
        finish=FinishReason.STOP,
        box=box,
        seconds=1.5,
        text=text,
    )


def solution(problem: str, error: str | None = None) -> Solution:
    return Solution(
        problem_id=problem,
        tally=Tally(),
        attempts=(),
        tokens=99,
        seconds=2.5,
        stopped_early=None if error else "unassailable",
        error=error,
    )


def test_every_counter_of_the_engine_is_read_back() -> None:
    counts = {field.name: 1 + place for place, field in enumerate(fields(EngineStats)) if field.type == "int"}
    stats = EngineStats(**counts, accepted_by_depth=(5, 2), seconds={"verify": 1.5})
    assert read_engine(json.loads(json.dumps(engine_row(stats)))) == stats


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    attempts = [
        attempt("p/1", 0),
        attempt("p/1", 3, None),
        attempt("é", 1, "\\frac{1}{2}", "text\n\u2028 <b>"),
    ]
    with Journal(path) as journal:
        assert not path.exists(), "a run that is refused leaves no trace"
        journal.begin()
        journal.record(attempts[:2], [])
        journal.record(attempts[2:], [solution("p/1"), solution("q", "prompt too long")])
    history = read_history(path)
    assert history.attempts == {"p/1": tuple(attempts[:2]), "é": (attempts[2],)}
    assert history.settled["p/1"].stopped_early == "unassailable"
    assert (history.settled["p/1"].tokens, history.settled["p/1"].seconds) == (99, 2.5)
    assert history.settled["q"].error == "prompt too long"


def test_what_came_later_is_read_back_and_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    forced = replace(attempt("p", 0), ending=Ending.DEADLINE, forced=True, confidence=-0.25, used_seconds=0.75)
    settled = replace(
        solution("p"), share_seconds=9.5, used_seconds=4.5, bank_seconds=100.25, cancelled=3, stopped_early="deadline"
    )
    stats = EngineStats(steps=3, new_tokens=7, row_steps=5, accepted_by_depth=(2, 1), seconds={"verify": 0.5})
    with Journal(path) as journal:
        journal.begin(loading_seconds=12.5)
        journal.record([forced], [settled])
        journal.record_engine(stats)
    history = read_history(path)
    assert history.attempts["p"] == (forced,)
    found = history.settled["p"]
    assert (found.share_seconds, found.used_seconds, found.bank_seconds, found.cancelled) == (9.5, 4.5, 100.25, 3)
    assert history.engines == (stats,)
    assert history.loading_seconds == 12.5
    assert history.spent_seconds >= 12.5
    # A journal as version 0.1 wrote it.
    path.write_text(
        '{"kind": "session", "started": "2026-01-01T00:00:00+00:00"}\n'
        '{"kind": "attempt", "problem": "p", "index": 0, "variant": "solve", "tokens": 5, "finish": "length", "box": '
        'null, "seconds": 1.0, "clock": 1.0}\n'
        '{"kind": "solution", "problem": "p", "answer": null, "votes": [], "tokens": 5, "seconds": 1.0, '
        '"stopped_early": null, "error": null, "clock": 1.0}\n'
        '{"kind": "stats", "steps": 3, "prompt_tokens": 1, "prefill_tokens": 1, "new_tokens": 7, "row_steps": 5, '
        '"preemptions": 0, "peak_rows": 1, "kv_blocks": 9, "kv_blocks_free": 9, "accepted_by_depth": [2, 1], '
        '"seconds": {"verify": 0.5}, "clock": 1.0}\n'
    )
    history = read_history(path)
    assert (history.attempts["p"][0].ending, history.attempts["p"][0].forced) == (None, False)
    assert (history.settled["p"].share_seconds, history.settled["p"].cancelled) == (None, 0)
    assert (history.settled["p"].stopped_early, history.settled["p"].error) == (None, None)
    assert [(engine.steps, engine.drafted_row_steps, engine.discarded_row_steps) for engine in history.engines] == [
        (3, 0, 0)
    ]
    assert (history.loading_seconds, history.seconds) == (0.0, 1.0)


def test_time_adds_up_over_sessions(tmp_path: Path) -> None:
    now = [100.0]
    for _ in range(3):
        with Journal(tmp_path / "journal.jsonl", clock=lambda: now[0]) as journal:
            before = journal.seconds
            now[0] += 50  # loading the engine does not count
            journal.begin()
            now[0] += 10
            journal.record([attempt("p", int(now[0]))], [])
            assert journal.seconds == before + 10
            now[0] += 3  # lost: nothing was written after it
    assert read_history(tmp_path / "journal.jsonl").seconds == 30


def test_every_way_to_tear_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.begin()
        journal.record([attempt("p", 0), attempt("p", 1, "é ü")], [])
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path) as journal:
            kept = len(journal.history.attempts["p"])
            assert kept == (2 if cut == len(whole) - 1 else 1)
            journal.begin()
            journal.record([attempt("p", 7)], [])
        assert [a.index for a in read_history(path).attempts["p"]] == [0, 1, 7][: 3 if kept == 2 else 1] + (
            [7] if kept == 1 else []
        )


def test_garbage_lines_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.begin()
        journal.record([attempt("p", 0)], [])
    garbage = [
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"kind": "attempt"}',
        b'{"kind": "attempt", "problem": 3, "index": "x"}',
    ]
    path.write_bytes(b"\n".join([*garbage, b"\0" * 50, b""]) + path.read_bytes())
    assert len(read_history(path).attempts["p"]) == 1
    assert sum("skipped" in record.message for record in caplog.records) == 6
    assert f"{path}:1" in caplog.text


def test_the_first_of_two_equal_attempts_counts(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.begin()
        journal.record([attempt("p", 0, "1"), attempt("p", 0, "2")], [])
    assert [a.box for a in read_history(path).attempts["p"]] == ["1"]


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(OutputError, match="being worked on already"):
        Journal(tmp_path / "journal.jsonl")
    Journal(tmp_path / "journal.jsonl").close()


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl")


def test_a_journal_that_cannot_be_read_is_said_and_not_locked(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="cannot be read"):
            Journal(tmp_path / "journal.jsonl")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.begin()
        journal._path = Path("/dev/full")
        with pytest.raises(OutputError, match="No space left"):
            journal.record([attempt("p", 0)], [])


def test_lines_are_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.begin()
        journal.record([attempt("p", 2)], [])
    kinds = [json.loads(line)["kind"] for line in path.read_text("utf-8").splitlines()]
    assert kinds == ["session", "attempt"]


def test_attempts_of_older_journals_have_no_calls() -> None:
    plain = {"problem_id": "p", "index": 0, "variant": "solve", "tokens": 1, "finish": FinishReason.STOP}
    assert Attempt(**plain, box=None, seconds=0.0).tool_calls == 0
