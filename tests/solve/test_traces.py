from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.report.run_dirs import attempt, solution, write_run
from tests.solve.scripted import run, write_engine, write_problems
from trtkit.errors import InputError, UsageError
from trtkit.solve.answers import AnswerMode
from trtkit.solve.options import SolveOptions
from trtkit.solve.run import Places
from trtkit.solve.trace_files import parse_fields, read_trace_file
from trtkit.solve.traces import looks_like_journal, loops, merge, read_run, trace_of_text

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "r1distill_math.jsonl"


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_one_sample_per_row_grouped_by_problem(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"problem": "a?", "gold": "7", "text": "so \\boxed{7}</think>", "tokens": 5},
        {"problem": "b?", "gold": 8, "text": "no idea", "tokens": 6},
        {"problem": "a?", "gold": "7", "text": "\\boxed{1}, no, \\boxed{ 2 }", "tokens": 0},
    )
    found = read_trace_file(path)
    assert [(p.id, p.gold, len(p.traces)) for p in found.problems] == [("a?", "7", 2), ("b?", "8", 1)]
    first, second = found.problems[0].traces
    assert (first.box, first.tokens, first.closed, first.index) == ("7", 5, True, 0)
    assert (second.box, second.tokens, second.closed, second.index) == ("2", 1, False, 1)
    assert (found.count, found.number("closed"), found.number("boxed"), found.number("looped")) == (3, 1, 2, 0)
    assert not found.estimated


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"q": 3, "a": 7.0, "outs": ["\\boxed{7}", "none"], "n": [4, 9]}, "text=outs,tokens=n"),
        ({"q": 3, "a": "7", "outs": [{"t": "\\boxed{7}", "n": 4}, {"t": "none", "n": 9}]}, "text=outs.t,tokens=outs.n"),
        ({"q": 3, "a": "7", "o": {"u": {"t": ["\\boxed{7}", "none"], "n": [4, 9]}}}, "text=o.u.t,tokens=o.u.n"),
        ({"q": 3, "a": "7", "a.b": ["\\boxed{7}", "none"], "n": [4, 9]}, "text=a.b,tokens=n"),
    ],
)
def test_a_list_of_samples_in_each_row(row: dict[str, Any], fields: str, tmp_path: Path) -> None:
    found = read_trace_file(write(tmp_path / "t.jsonl", row), parse_fields([fields, "gold=a, problem=q"]))
    [problem] = found.problems
    assert (problem.id, problem.gold) == ("3", "7")
    assert [(trace.box, trace.tokens) for trace in problem.traces] == [("7", 4), (None, 9)]


def test_usual_names_are_found_and_tokens_estimated(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"id": "x", "expected_answer": "1", "generation": "x" * 300})
    found = read_trace_file(path)
    assert found.problems[0].gold == "1"
    assert found.problems[0].traces[0].tokens == 100
    assert found.estimated


def test_recorded_seconds_are_read_one_for_each_text(tmp_path: Path) -> None:
    row = {"problem": "a", "text": ["x" * 30, "y"], "seconds": [1.5, 2]}
    [problem] = read_trace_file(write(tmp_path / "t.jsonl", row, {"problem": "a", "text": "z"})).problems
    assert [trace.seconds for trace in problem.traces] == [1.5, 2, None]
    with pytest.raises(InputError, match=r"seconds: expected 2 number\(s\)"):
        read_trace_file(write(tmp_path / "t.jsonl", row | {"seconds": 3}))


@pytest.mark.parametrize(
    ("told", "read"),
    [({"gold": 7.0}, "7"), ({"gold": 7.5}, "7.5"), ({"gold": -3}, "-3"), ({"gold": " "}, None), ({"gold": None}, None)],
)
def test_a_known_answer_may_be_a_number(tmp_path: Path, told: dict[str, Any], read: str | None) -> None:
    rows = [{"problem": "a", "text": "x", **told}, {"problem": "b", "text": "y", "gold": "1"}]
    assert read_trace_file(write(tmp_path / "t.jsonl", *rows)).problems[0].gold == read


@pytest.mark.parametrize("told", [{"gold": True}, {"gold": ["7"]}, {"tokens": "5"}, {"tokens": True}, {"tokens": -1}])
def test_what_cannot_be_meant_is_refused(tmp_path: Path, told: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"t\.jsonl:1: {next(iter(told))}: "):
        read_trace_file(write(tmp_path / "t.jsonl", {"problem": "a", "text": "x", **told}))


def test_texts_of_a_trace_file_are_cut_where_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"problem": "a", "text": "\\boxed{1}</think>\\boxed{2}", "tokens": 26})
    for stop_at, found in (("eos", ("2", 26)), ("think", ("1", 17))):
        [problem] = read_trace_file(path, stop_at=stop_at).problems
        assert [(trace.box, trace.tokens) for trace in problem.traces] == [found]


def test_of_many_wrong_rows_the_first_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"25 thing\(s\) wrong") as caught:
        read_trace_file(write(tmp_path / "t.jsonl", *({"problem": "a", "text": place} for place in range(25))))
    shown = caught.value.offenders
    assert [line.split(": ")[0] for line in shown[:-1]] == [f"{tmp_path / 't.jsonl'}:{line}" for line in range(1, 21)]
    assert shown[-1] == "... and 5 more"


def test_one_row_may_say_what_another_leaves_out(tmp_path: Path) -> None:
    rows = [{"problem": "a", "text": "x" * 30}, {"problem": "a", "gold": "7", "text": "y", "tokens": 5}]
    for place, order in enumerate((rows, rows[::-1])):
        found = read_trace_file(write(tmp_path / f"{place}.jsonl", *order))
        assert found.problems[0].gold == "7"
        assert found.estimated


def test_columns_named_are_not_taken_for_something_else(tmp_path: Path) -> None:
    outs = [{"t": "\\boxed{7}", "took": 1.5}, {"t": "none", "took": 2}]
    path = write(tmp_path / "t.jsonl", {"id": "x", "answer": outs}, {"id": "y", "answer": [{"t": "late"}]})
    first, second = read_trace_file(path, {"text": "answer.t", "seconds": "answer.took"}).problems
    assert [(trace.box, trace.seconds) for trace in (*first.traces, *second.traces)] == [
        ("7", 1.5),
        (None, 2),
        (None, None),
    ]
    plain = write(tmp_path / "plain.jsonl", {"id": "x", "answer": "so \\boxed{7}"})
    assert read_trace_file(plain, {"text": "answer"}).problems[0].gold is None
    wrong = write(tmp_path / "wrong.jsonl", {"id": "x", "text": "y", "tokens": True})
    with pytest.raises(InputError, match=r"1 thing\(s\) wrong") as caught:
        read_trace_file(wrong)
    assert "tokens: expected 1 number" in caught.value.offenders[0]


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"problem": "a", "gold": "1", "text": "fine"},
        {"problem": "a", "gold": "2", "text": "fine"},
        {"problem": "b", "gold": "2", "text": [{"t": "deeper"}]},
        {"problem": "c", "gold": "2", "text": ["x", "y"], "tokens": [3]},
        {"problem": " ", "gold": "2", "text": "x"},
        {"problem": ["d"], "gold": "2", "text": []},
    )
    with pytest.raises(InputError) as caught:
        read_trace_file(path)
    text = str(caught.value)
    for said in (
        ":2: gold answer '2', but '1'", ":3: 'text' must be text", "e.g. text.text", ":4: tokens: expected 2 number",
        ":5: no 'problem'", ":6: 'text' must be text or a list of texts, found an empty list",
        ":6: problem: must be text",
    ):  # fmt: skip
        assert said in text, said


def test_columns_that_are_not_there_are_told_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"says": "x", "key": 1})
    with pytest.raises(InputError) as caught:
        read_trace_file(path, {"gold": "right"})
    text = str(caught.value)
    for said in (
        "no column for 'text'",
        "no column for 'problem'",
        "gold=right: no row has it",
        "columns are: says, key",
    ):
        assert said in text
    with pytest.raises(InputError, match="holds no trace"):
        read_trace_file(write(tmp_path / "empty.jsonl"))


def test_fields_are_checked() -> None:
    assert parse_fields(["text=a.b , gold=c", "problem=d"]) == {"text": "a.b", "gold": "c", "problem": "d"}
    with pytest.raises(UsageError) as caught:
        parse_fields(["txt=a,gold,tokens=,=c"])
    assert "did you mean 'text'" in str(caught.value)
    for part in ("gold", "tokens="):
        assert f"'{part}': write NAME=COLUMN" in str(caught.value)
    assert "'': no such field" in str(caught.value)


def test_cutting_at_the_end_of_the_thought() -> None:
    text = "hm \\boxed{1} " + "x" * 87 + "</think>" + "so \\boxed{2}" + " " * 96
    whole = trace_of_text(text, 0, tokens=50, seconds=8.0)
    cut = trace_of_text(text, 0, tokens=50, seconds=8.0, stop_at="think")
    assert (whole.box, whole.tokens, whole.seconds) == ("2", 50, 8.0)
    assert (cut.box, cut.tokens) == ("1", 25)
    assert cut.seconds == pytest.approx(4.0, rel=0.05)  # emitted at an even pace
    assert whole.closed
    assert cut.closed


def test_loops() -> None:
    start = "".join(f"step {number} is new; " for number in range(300))
    phrase = "But wait, let me check that once more from the beginning, because it may be wrong. " * 3
    assert not loops(start)
    assert not loops(start + phrase[:300])
    assert loops(start + phrase * 20)
    assert loops("ab" * 1000)
    assert not loops("ab" * 350), "too short to be checked"
    four = "".join(map(chr, range(1000, 1200))) * 4
    assert loops(four), "as often as it takes, and as long as it is asked for"
    assert not loops(four[:-1])
    numbers = "".join(f"case {number} gives nothing. " for number in range(500))
    assert not loops(numbers), "alike, but not the same"


def full_run(tmp_path: Path, **options: Any) -> Path:
    problems, engine = write_problems(tmp_path / "p.jsonl", 4), write_engine(tmp_path / "engine")
    out = tmp_path / "run"
    run(Places(problems=problems, engine=engine, out=out), SolveOptions(samples=5, **options))
    return out


def test_a_run_is_read_with_golds_and_answer_mode(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mode = AnswerMode(kind="integer", modulus=5)
    out = full_run(tmp_path, full_vote=True, save_text=True, mode=mode)
    with caplog.at_level(logging.WARNING, "trtkit"):
        found = read_run(out)
    assert not caplog.records
    assert {problem.id for problem in found.problems} == {"p0", "p1", "p2", "p3"}
    assert found.count == 20
    assert {problem.gold for problem in found.problems} == {"7"}
    assert found.mode == mode
    assert all([trace.index for trace in problem.traces] == [0, 1, 2, 3, 4] for problem in found.problems)
    rows = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    attempts = [row for row in rows if row["kind"] == "attempt"]
    assert found.number("boxed") == sum(row["box"] is not None for row in attempts)
    assert found.number("closed") == sum(row["finish"] == "stop" for row in attempts)
    assert {trace.tokens for problem in found.problems for trace in problem.traces} == {
        row["tokens"] for row in attempts
    }
    assert read_run(out / "journal.jsonl") == found

    assert merge([merge([]), found]).mode == mode

    write_problems(tmp_path / "p.jsonl", 3)  # another file by now: then the solutions say it
    assert read_run(out) == found
    (tmp_path / "p.jsonl").unlink()
    assert read_run(out) == found
    (out / "solutions.jsonl").unlink()
    assert {problem.gold for problem in read_run(out).problems} == {None}
    other = write_problems(tmp_path / "other.jsonl", 3)
    assert [p.gold for p in sorted(read_run(out, problems=other).problems, key=lambda p: p.id)] == ["7"] * 3 + [None]


def test_known_answers_are_those_of_the_problems_while_they_are_as_they_were(tmp_path: Path) -> None:
    """A run that was interrupted has no solutions.jsonl yet."""
    out = full_run(tmp_path, full_vote=True)
    (out / "solutions.jsonl").unlink()
    assert {problem.gold for problem in read_run(out).problems} == {"7"}
    rows = [{"id": "p0", "problem": "problem 0", "answer": "8"}, {"id": "p1", "problem": "problem 1"}]
    other = write(tmp_path / "other.jsonl", *rows)
    named = {problem.id: problem.gold for problem in read_run(out, problems=other).problems}
    assert named == {"p0": "8", "p1": None, "p2": None, "p3": None}, "these and no others"
    write(tmp_path / "p.jsonl", *rows)
    assert {problem.gold for problem in read_run(out).problems} == {None}, "not of other problems by now"


def test_known_answers_are_asked_for_where_a_run_does_not_name_its_problems(tmp_path: Path) -> None:
    rows = [attempt("a", 0, "7"), solution("a", "7"), attempt("b", 0, "7"), solution("b", "7")]
    out = write_run(tmp_path / "run", [{"id": "a", "problem": "x", "answer": "7"}], rows, full_vote=True)
    run_file = json.loads((out / "run.json").read_text())
    write(out / "solutions.jsonl", {"id": "a", "gold": "7"}, {"id": "b", "gold": None})
    for described in ({}, {"problems": {}}, {"problems": {"path": None}}):
        (out / "run.json").write_text(json.dumps({k: v for k, v in run_file.items() if k != "problems"} | described))
        assert [problem.gold for problem in read_run(out).problems] == ["7", None]


def test_a_recorded_text_is_read_and_cut_where_asked(tmp_path: Path) -> None:
    text = "\\boxed{1}</think>\\boxed{2}"
    rows = [attempt("a", 0, "2", 26, text=text), attempt("a", 1, None, 0), solution("a", "2")]
    out = write_run(tmp_path / "run", [{"id": "a", "problem": "x"}], rows, full_vote=True)
    for stop_at, found in (("eos", ("2", 26)), ("think", ("1", 17))):
        [problem] = read_run(out, stop_at=stop_at).problems
        assert [(trace.box, trace.tokens) for trace in problem.traces] == [found, (None, 1)]


def test_a_run_with_stop_rules_is_no_fair_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = full_run(tmp_path)
    with caplog.at_level(logging.WARNING, "trtkit"):
        read_run(out)
    assert "no fair draw" in caplog.text


def test_an_interrupted_run_gives_its_finished_problems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = full_run(tmp_path, full_vote=True)
    journal = out / "journal.jsonl"
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if '"kind": "solution"' in line)
    journal.write_text("".join(lines[: first + 1]), "utf-8")
    begun = len({row["problem"] for row in map(json.loads, lines[: first + 1]) if "problem" in row})
    with caplog.at_level(logging.WARNING, "trtkit"):
        found = read_run(out)
    assert [problem.id for problem in found.problems] == [json.loads(lines[first])["problem"]]
    assert f": {begun - 1} unfinished problem(s) left out" in caplog.text
    journal.write_text("".join(lines[:first]), "utf-8")
    with pytest.raises(InputError, match="no finished problem"):
        read_run(out)


@pytest.mark.parametrize("text", [{}, {"text": "hm"}], ids=["no text", "text"])
def test_how_a_recorded_sample_ended(tmp_path: Path, text: dict[str, str]) -> None:
    ends = [("stop", "think"), ("length", "loop"), ("length", "length")]
    rows = [
        attempt("a", 2 - n, None, 10 + n, finish=finish, ending=ending, seconds=1.5 + n, confidence=-0.5, **text)
        for n, (finish, ending) in enumerate(ends)
    ]
    out = write_run(tmp_path / "run", [{"id": "a", "problem": "x"}], [*rows, solution("a", None)], full_vote=True)
    [problem] = read_run(out).problems
    found = [(t.index, t.tokens, t.closed, t.looped, t.seconds, t.confidence) for t in problem.traces]
    assert found == [
        (0, 12, False, False, 3.5, -0.5),
        (1, 11, False, True, 2.5, -0.5),
        (2, 10, True, False, 1.5, -0.5),
    ]


def test_a_journal_is_told_from_traces(tmp_path: Path) -> None:
    out = full_run(tmp_path, full_vote=True)
    assert looks_like_journal(out / "journal.jsonl")
    assert not looks_like_journal(write(tmp_path / "t.jsonl", {"problem": "a", "text": "b"}))
    assert not looks_like_journal(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=r"no journal\.jsonl"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "journal"),
    [
        ('{"kind": "session", "started": "2026-01-01"}\n', True),
        ('\n  \n{"kind": "attempt"}\n{"kind": ', True),
        ('{"kind": "solution"}', True),
        ('{"kind": "exam", "problem": "a", "text": "b"}\n', False),
        ('["kind", "session"]\n', False),
        ("session\n", False),
        ("", False),
    ],
)
def test_a_journal_of_another_name_is_told_by_its_first_record(tmp_path: Path, text: str, journal: bool) -> None:
    path = tmp_path / "saved.jsonl"
    path.write_text(text, "utf-8")
    assert looks_like_journal(path) is journal


def test_several_files_are_put_together(tmp_path: Path) -> None:
    one = read_trace_file(write(tmp_path / "1.jsonl", {"problem": "a", "gold": "7", "text": "\\boxed{7}", "tokens": 3}))
    two = read_trace_file(write(tmp_path / "2.jsonl", {"problem": "a", "gold": "7", "text": "\\boxed{8}"}))
    both = merge([one, two])
    [problem] = both.problems
    assert (problem.id, [(trace.index, trace.box) for trace in problem.traces]) == ("a", [(0, "7"), (1, "8")])
    assert both.estimated
    three = read_trace_file(write(tmp_path / "4.jsonl", {"problem": "a", "text": "\\boxed{8}"}))
    assert [merge(order).problems[0].gold for order in ([one, three], [three, one])] == ["7", "7"]
    bad = read_trace_file(write(tmp_path / "3.jsonl", {"problem": "a", "gold": "9", "text": "\\boxed{8}"}))
    with pytest.raises(InputError, match="different gold answers"):
        merge([one, bad])


@pytest.mark.skipif(not PUBLIC.is_file(), reason="no public data beside the repository")
def test_public_traces() -> None:
    found = read_trace_file(PUBLIC)
    texts = [json.loads(line)["text"] for line in PUBLIC.read_text("utf-8").splitlines()]
    assert (len(found.problems), found.count) == (100, 200)
    assert {len(problem.traces) for problem in found.problems} == {2}
    assert found.number("closed") == sum("</think>" in text for text in texts) == 177
    assert found.number("boxed") == 178
    looping = 0
    for text in texts:  # the rule again, by walking through the text
        ends = range(800, len(text) + 1, 800)
        looping += any(_seen(text[:end], text[end - 200 : end]) >= 3 for end in ends)
    assert found.number("looped") == looping > 0


def _seen(text: str, part: str) -> int:
    """How often ``part`` stands in ``text``, without overlap."""
    count = place = 0
    while (place := text.find(part, place)) >= 0:
        count, place = count + 1, place + len(part)
    return count
