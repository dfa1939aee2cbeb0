"""Words in places where a verb reads none, and options made of what stands bare."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from trtkit.cli.app import app, run


@pytest.mark.parametrize(
    ("typed", "where", "hint"),
    [
        ("solve engine p.jsonl", "p.jsonl", "trtkit solve p.jsonl --engine engine"),
        ("solve p.jsonl engine", "engine", "trtkit solve p.jsonl --engine engine"),
        ("solve p.txt engine", "engine", "trtkit solve p.txt --engine engine"),
        ("solve engine p.txt", "p.txt", "trtkit solve p.txt --engine engine"),
        ("solve missing p.CSV", "p.CSV", "trtkit solve p.CSV --engine missing"),
        ("solve engine p.jsonl 16", "p.jsonl 16", "trtkit solve p.jsonl --engine engine --samples 16"),
        ("solve engine p.jsonl --samples 4", "p.jsonl", "trtkit solve p.jsonl --engine engine ..."),
        ("build practice", "practice", "trtkit build --model practice"),
        ("build int4 practice 2xL4", "int4 practice 2xL4", "trtkit build --model practice --precision int4 --gpu 2xL4"),
        ("build practice omr.jsonl", "practice omr.jsonl", "trtkit build --model practice --calibration omr.jsonl"),
        ("serve engine 8080", "8080", "trtkit serve engine --port 8080"),
        ("train-drafter practice p.csv", "practice p.csv", "trtkit train-drafter --model practice --problems p.csv"),
        ("train-difficulty --data a b c", "b c", "trtkit train-difficulty --data b --data c ..."),
        ("plan practice h100", "practice h100", "trtkit plan --model practice --gpu h100"),
        ("compile bundle out", "out", "trtkit compile bundle --out out"),
        ("export engine out", "out", "trtkit export engine --out out"),
        ("export engine out trtllm", "out trtllm", "trtkit export engine --format trtllm --out out"),
        ("export engine out --format trtllm", "out", "trtkit export engine --out out ..."),
        ("bench engine", "engine", "trtkit bench --engine engine"),
    ],
)
def test_a_word_too_many_is_told_where_it_belongs(
    typed: str, where: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine").mkdir()
    assert run(typed.split()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {where}: `trtkit {typed.split()[0]}` takes ")
    assert second == f"hint:  did you mean: {hint}"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("solve a.jsonl b.jsonl", "call it once for each, or see: trtkit solve --help"),
        ("solve a.jsonl --engine x y", "call it once for each, or see: trtkit solve --help"),
        ("inspect a b", "call it once for each, or see: trtkit inspect --help"),
        ("build --model x y z", "see: trtkit build --help"),
        ("doctor some/engine", "it looks at this machine; a directory is looked at by: trtkit inspect some/engine"),
    ],
)
def test_a_word_without_a_place_is_not_guessed_about(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed.split()) == 2
    assert capsys.readouterr().err.splitlines()[1] == f"hint:  {hint}"


def test_the_word_that_was_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run(["inspect", "first", "second one"])
    said = "error: 'second one': `trtkit inspect` takes one DIRECTORY, and that is first\n"
    assert capsys.readouterr().err.startswith(said)


def test_a_pasted_problem_is_a_word_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "p.jsonl", "What is 1 + 1? " * 1000]) == 2
    assert "takes one PROBLEMS" in capsys.readouterr().err


def test_every_verb_tells_of_a_word_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, command in typer.main.get_group(app).commands.items():
        bare = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        if any(parameter.nargs < 0 for parameter in bare):
            continue
        needed = [option for p in command.params if p.param_type_name == "option" and p.required for option in p.opts]
        options = [word for option in needed for word in (option, "hf" if option == "--format" else "x")]
        assert run([verb, *("w" for _ in bare), *options, "w", "w", "w"]) == 2
        assert f"`trtkit {verb}` takes " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("serve --engine x", "trtkit serve ENGINE"),
        ("solve --problems p.jsonl", "trtkit solve PROBLEMS"),
        ("compile --bundle x", "trtkit compile BUNDLE"),
        ("inspect --directory x", "trtkit inspect DIRECTORY"),
    ],
)
def test_an_option_made_of_what_stands_bare(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed.split()) == 2
    said = f"error: No such option: {typed.split()[1]}\nhint:  it stands without an option: {hint}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("typed", "missing"),
    [("", "--out and --format"), (" --out b", "--format"), (" --format trtllm", "--out")],
)
def test_what_an_export_needs_is_told_at_once(typed: str, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"export a{typed}".split()) == 2
    said = f"error: trtkit export a: {missing}: missing\nhint:  trtkit export a --format unified-hf|trtllm|"
    assert capsys.readouterr().err.startswith(said)


def test_another_wrong_option_is_told_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "p.jsonl", "--sample", "3"]) == 2
    err = capsys.readouterr().err
    assert "--samples" in err
    assert err.endswith("hint:  see: trtkit solve --help\n")


def test_a_verb_with_the_right_words_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", "--", "-odd-"]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
