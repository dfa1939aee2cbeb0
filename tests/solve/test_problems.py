from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from trtkit.chat import VARIANTS
from trtkit.errors import ConfigError, InputError
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.prompts import sample_seed, variant_of
from trtkit.solve.traces import looks_like_journal


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_both_spellings_and_kinds_of_values(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"id": "a", "problem": "1+1?", "answer": "2"},
        "",
        {"id": 7, "question": "2+2?", "expected_answer": 4},
        {"id": "c", "problem": "no gold", "answer": None},
        {"id": "d", "problem": "float gold", "answer": 1e3, "level": "ignored"},
        {"id": "0", "problem": "zero", "answer": 0},
    )
    assert read_problems(path) == [
        Problem(id="a", text="1+1?", answer="2"),
        Problem(id="7", text="2+2?", answer="4"),
        Problem(id="c", text="no gold"),
        Problem(id="d", text="float gold", answer="1000"),
        Problem(id="0", text="zero", answer="0"),
    ]


def test_a_table_is_read_like_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "reference.csv"
    path.write_bytes(
        "\ufeffid, problem ,answer,level\r\n"
        'a,"Let $x,y$ be\n""two"" numbers.",042,1\r\n\r\n7,1+1?,,\r\nc,"last, without an end",-1'.encode()
    )
    assert read_problems(path) == [
        Problem(id="a", text='Let $x,y$ be\n"two" numbers.', answer="042"),
        Problem(id="7", text="1+1?"),
        Problem(id="c", text="last, without an end", answer="-1"),
    ]
    path.write_text('question\n"x\ny"\n\nz\n')
    assert [(problem.id, problem.text) for problem in read_problems(path)] == [("2", "x\ny"), ("5", "z")]


def test_every_offender_of_a_table_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "reference.CSV"
    path.write_text('id,problem\na,"two\nlines"\nb,let x, y be\n\na,again\nc,\n,d\ne,"never ends\n')
    with pytest.raises(InputError, match="wrong with the problems") as caught:
        read_problems(path)
    assert [offender.removeprefix(f"{path}:") for offender in caught.value.offenders] == [
        "4: more values than columns (a comma outside quotes?)",
        "9: not valid CSV from here on: unexpected end of data",
        "6: id 'a' was already used in line 2",
        "7: no problem (or question) field",
        "8: no id",
    ]
    path.write_text("id,text\na,x\n")
    with pytest.raises(InputError) as caught:
        read_problems(path)
    assert "no column is named problem or question: 'id', 'text'" in caught.value.offenders[0]
    path.write_text("id,problem,note,note, problem\na,x,,,y\n")
    with pytest.raises(InputError) as caught:
        read_problems(path)
    assert caught.value.offenders == (f"{path}:1: several columns are named problem",)
    path.write_text("")
    with pytest.raises(InputError, match="holds no problem") as caught:
        read_problems(path)
    assert "id,problem,answer" in str(caught.value.hint)


def test_without_any_id_the_line_is_the_id(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"problem": "x"}, "", {"problem": "y"})
    assert [problem.id for problem in read_problems(path)] == ["1", "3"]


def test_every_offender_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"id": "a", "problem": "fine"},
        "{not json",
        {"id": "a", "problem": "again"},
        {"problem": "no id"},
        {"id": "b"},
        {"id": "c", "problem": "  "},
        {"id": "d", "problem": ["x"]},
        {"id": True, "problem": "x"},
        {"id": "e", "problem": "x", "answer": {"value": 3}},
        "[1, 2]",
        '{"id": "f", "problem": "half \\ud800 pair"}',
        {"id": "", "problem": "x"},
        "[" * 100_000,
        '{"id": "g", "problem": "x", "answer": NaN}',
    )
    with pytest.raises(InputError) as caught:
        read_problems(path)
    text = str(caught.value)
    for line, word in {
        2: "not valid JSON",
        3: "already used in line 1",
        4: "no id",
        5: "no problem",
        6: "empty",
        7: "must be text",
        8: "id True",
        9: "answer must be",
        10: "expected a JSON object",
        11: "surrogate",
        12: "non-empty string",
        13: "not usable JSON",
        14: "is no number",
    }.items():
        assert any(f"p.jsonl:{line}: " in o and word in o for o in caught.value.offenders), (line, text)
    assert "p.jsonl:1:" not in text
    assert "hint:" in text


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="holds no problem"):
        read_problems(tmp_path / "p.jsonl")


def test_not_utf8_and_missing(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "a", "problem": "x"}\n{"id": "b", "problem": "\xff"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl:2: not UTF-8"):
        read_problems(tmp_path / "p.jsonl")
    with pytest.raises(InputError, match="no such file"):
        read_problems(tmp_path / "absent.jsonl")


def test_long_lists_of_offenders_are_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_problems(write(tmp_path / "p.jsonl", *["{"] * 500))
    assert len(caught.value.offenders) == 21
    assert "480 more" in caught.value.offenders[-1]


def test_ten_megabytes_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "big", "problem": "x" * 10_000_000}, {"id": "b", "problem": "y"})
    began = time.monotonic()
    assert len(read_problems(path)[0].text) == 10_000_000
    assert time.monotonic() - began < 5


def test_variants_take_turns() -> None:
    assert [variant_of(("solve", "reason", "solve"), i).name for i in range(5)] == [
        "solve",
        "reason",
        "solve",
        "solve",
        "reason",
    ]
    assert variant_of(("system",), 9) is VARIANTS["system"]
    with pytest.raises(ConfigError, match="did you mean 'reason'"):
        variant_of(("reson",), 0)


def test_seeds_are_stable_and_distinct() -> None:
    seeds = {
        sample_seed(run, problem, index) for run in (0, 1) for problem in ("1", "11", "p/1") for index in range(20)
    }
    assert len(seeds) == 2 * 3 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down: a change here would make every interrupted run resume with other samples.
    assert sample_seed(0, "p", 0) == 6802306895010170043


def test_a_pipe_is_refused_and_not_found_empty(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody writes: reading it would wait forever
    for path in (pipe, Path("-"), Path("/dev/null")):
        with pytest.raises(InputError, match="read") as refused:
            read_problems(path)
        assert "in a file" in (refused.value.hint or "")
    with pytest.raises(InputError, match="read"):
        looks_like_journal(pipe)


def test_hints_fit_what_is_wrong(tmp_path: Path) -> None:
    same = {"id": "a", "problem": "x"}
    with pytest.raises(InputError) as twice:
        read_problems(write(tmp_path / "twice.jsonl", same, same))
    assert "an id of its own" in (twice.value.hint or "")
    with pytest.raises(InputError) as both:
        read_problems(write(tmp_path / "both.jsonl", same, same, "{"))
    assert "one JSON object" in (both.value.hint or "")
    with pytest.raises(InputError) as absent:
        read_problems(tmp_path / "absent.jsonl")
    assert read_problems(Path((absent.value.hint or "").rpartition(": ")[2])), "the hint names problems to try"


def test_a_directory_is_told_as_what_it_is(tmp_path: Path) -> None:
    def hint(*files: str) -> str:
        for name in files:
            (tmp_path / name).touch()
        with pytest.raises(InputError, match="not a file of problems") as refused:
            read_problems(tmp_path)
        return refused.value.hint or ""

    assert "no .jsonl or .csv" in hint("notes.txt")
    assert hint("b.jsonl", "a.CSV").endswith("name a file in it: a.CSV, b.jsonl")
    assert "trtkit report" in hint("run.json", "journal.jsonl")
    assert f"trtkit solve problems.jsonl --engine {tmp_path}" in hint("engine.json")
