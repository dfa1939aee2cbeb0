"""What ``solve`` and ``serve`` refuse about a server, and how they say it."""

from __future__ import annotations

import builtins
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.fakes import FakeEngine
from tests.on_server import served
from trtkit.bundled import practice_dir
from trtkit.cli.app import run
from trtkit.recipe import read_manifest, write_manifest
from trtkit.runtime.endpoint.server import KEY_VARIABLE
from trtkit.solve.prompts import sample_seed

NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its server can be asked for its tokenizer; nothing here comes to a sample."""
    directory = tiny_engine_dir(tmp_path_factory.mktemp("built") / "engine")
    save_chat_files(directory)
    manifest = read_manifest(directory)
    recipe = dataclasses.replace(manifest.recipe, model=str(directory))
    write_manifest(directory, dataclasses.replace(manifest, recipe=recipe))
    return directory


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    with served(engine, lambda: FakeEngine(lambda _: [1])) as url:
        yield url


@pytest.fixture
def problems(tmp_path: Path) -> str:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "problem": "x", "answer": "7"}))
    return str(path)


ENGINES_OWN = [
    *(["--engine", "DIR"], ["--tree", "1x3"], ["--drafter", "practice"], ["--lookup"], ["--device", "auto"]),
    *(["--tp", "2"], ["--threads", "1"], ["--output-layer", "int8"]),
]
SERVERS_OWN = [["--endpoint-model", "x"], ["--endpoint-seeds"], ["--no-endpoint-seeds"], ["--tokenizer", "x"]]


def refused(capsys: pytest.CaptureFixture[str], line: list[str], *, code: int = 2) -> str:
    assert run(line) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_everything_that_the_server_decides_is_refused_at_once(
    problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all names, before the server is asked: there is none."""
    words = [word for option in ENGINES_OWN for word in option]
    error = refused(capsys, ["solve", problems, "--endpoint", NOWHERE, *words, "--out", str(tmp_path / "run")])
    named = [line.strip() for line in error.splitlines() if "not with --endpoint" in line]
    assert [one.removeprefix("- ").partition(":")[0] for one in named] == [option[0] for option in ENGINES_OWN]
    assert "options that would be ignored" in error
    error = refused(capsys, ["serve", "--endpoint", NOWHERE, *words[2:]])
    assert error.count("not with --endpoint") == len(ENGINES_OWN) - 1


@pytest.mark.parametrize("option", SERVERS_OWN, ids=lambda option: option[0])
def test_what_only_a_server_needs_is_refused_without_one(
    engine: Path, problems: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (["solve", problems, "--engine", str(engine)], ["serve", str(engine)]):
        assert f"{option[0]}: only with --endpoint" in refused(capsys, [*line, *option])


def test_a_directory_and_a_server_are_one_too_many(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, ["serve", str(engine), "--endpoint", NOWHERE])
    assert "an engine directory and --endpoint: one or the other" in error


@pytest.mark.parametrize("verb", ["solve", "serve"])
@pytest.mark.parametrize(
    ("address", "code", "said", "hint"),
    [
        (NOWHERE, 1, f"error: {NOWHERE}/v1: the server cannot be reached", "is it running, and has it loaded?"),
        ("127.0.0.1:8000", 2, "--endpoint 127.0.0.1:8000: is not the address of a server", "http://HOST:PORT/v1"),
        ("", 2, "is not the address of a server", "http://HOST:PORT/v1"),
    ],
)
def test_no_server_there(
    problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    verb: str, address: str, code: int, said: str, hint: str,
) -> None:  # fmt: skip
    more = [problems, "--out", str(tmp_path / "run")] if verb == "solve" else ["--port", "0"]
    lines = refused(capsys, [verb, *more, "--endpoint", address], code=code).splitlines()
    assert len(lines) == 2
    assert said in lines[0]
    assert lines[1] == f"hint:  {hint}"
    assert not (tmp_path / "run").exists()


def test_a_server_with_a_key(
    engine: Path, problems: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_end = 257  # <|im_end|> of the tiny tokenizer's 256 bytes and five specials
    with served(engine, lambda: FakeEngine(lambda _: [chat_end]), key="secret") as url:
        line = ["solve", problems, "-n", "1", "--endpoint", url, "--out", str(tmp_path / "run")]
        for wrong in ("", "guessed"):
            monkeypatch.setenv(KEY_VARIABLE, wrong)
            error = refused(capsys, line, code=1)
            assert f"error: {url}/v1: the server wants a key: the API key is missing or wrong" in error
            assert f"hint:  export {KEY_VARIABLE}=KEY" in error
            assert "guessed" not in error
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        assert run(line) == 0
    for written in (tmp_path / "run").iterdir():
        assert b"secret" not in written.read_bytes()


@pytest.mark.parametrize(
    ("more", "code", "said", "hint"),
    [
        ("--switch-penalty 3,600,Q", 2, "a server cannot penalize thought switches", "solve with an engine directory"),
        ("--endpoint-model tine", 2, "the server has no model 'tine'; did you mean 'tiny'?", "it has: tiny, tiny:maj"),
        ("--tokenizer NOWHERE", 1, "NOWHERE", ""),
        ("--tokenizer EMPTY", 1, "", ""),
        ("--out ENGINE", 2, "is an engine or a bundle, no place for a run", "choose another --out"),
        ("--out PROBLEMS", 1, "is a file, not a directory", "choose another --out"),
        ("--policy competition", 2, "--policy competition works under a clock", "--time-limit 5h"),
        ("--tools ruby", 2, "unknown tools 'ruby'", "python"),
    ],
)
def test_what_cannot_be_asked_of_it(
    engine: Path, url: str, problems: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: str, code: int, said: str, hint: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {"NOWHERE": str(tmp_path / "NOWHERE"), "EMPTY": str(tmp_path / "empty"), "ENGINE": str(engine),
              "PROBLEMS": problems}  # fmt: skip
    words = [places.get(word, word) for word in more.split()]
    out = [] if "--out" in words else ["--out", str(tmp_path / "run")]
    error = refused(capsys, ["solve", problems, "--endpoint", url, *out, *words], code=code)
    assert said in error
    assert hint in error
    assert not (tmp_path / "run").exists()
    assert not (engine / "journal.jsonl").exists()


def test_a_server_whose_checkpoint_is_not_here_takes_a_tokenizer(
    tmp_path: Path, problems: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_engine_dir(tmp_path / "engine")
    save_chat_files(directory)
    line = ["solve", problems, "-n", "1", "--out", str(tmp_path / "run")]
    with served(directory, lambda: FakeEngine(lambda _: [257])) as url:
        error = refused(capsys, [*line, "--endpoint", url])
        assert f"error: {url}/v1: the server serves tiny, whose tokenizer is not here" in error
        assert "hint:  name the checkpoint that it serves with --tokenizer" in error
        assert run([*line, "--endpoint", url, "--tokenizer", str(directory)]) == 0
        capsys.readouterr()
        error = refused(capsys, [*line, "--endpoint", url, "--tokenizer", str(practice_dir())])
        assert "this directory holds a different run" in error
        assert "engine.template: " in error


def test_wrong_problems_are_told_before_the_server_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "p.jsonl"
    wrong.write_text('{"id": "a"}\n')
    error = refused(capsys, ["solve", str(wrong), "--endpoint", NOWHERE], code=1)
    assert f"{wrong}" in error
    assert "cannot be reached" not in error
    # An engine directory is told first: without one there is nothing to say about problems.
    error = refused(capsys, ["solve", str(wrong), "--engine", str(tmp_path / "none")], code=1)
    assert str(tmp_path / "none") in error
    assert str(wrong) not in error


def test_without_aiohttp_it_says_what_to_install(
    url: str, problems: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def hidden(name: str, *rest: Any, **more: Any) -> Any:
        if name == "aiohttp":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", hidden)
    for line in (["solve", problems], ["serve", "--port", "0"]):
        error = refused(capsys, [*line, "--endpoint", url], code=1)
        assert error == "error: speaking to a server takes aiohttp\nhint:  pip install 'trtkit[endpoint]'\n"


def test_a_server_may_be_told_no_seeds(engine: Path, problems: str, tmp_path: Path) -> None:
    told = []

    def opening() -> FakeEngine:
        told.append(FakeEngine(lambda _: [257]))
        return told[-1]

    with served(engine, opening) as url:
        for number, option in enumerate(("--endpoint-seeds", "--no-endpoint-seeds")):
            line = ["--quiet", "solve", problems, "-n", "2", "--endpoint", url, "--no-force-close", option]
            assert run([*line, "--out", str(tmp_path / str(number))]) == 0
    seeds = [request.seed for request in told[0].submitted]
    own = {sample_seed(0, "a", index) for index in range(2)}
    assert set(seeds[:2]) == own
    assert len(set(seeds)) == 4
