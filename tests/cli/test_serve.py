"""``trtkit serve`` as a user runs it: ready when it says so, gone on Ctrl-C, and what it refuses before it loads."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.examples import slow
from tests.serve.serving import call, client, close_clients, wait_for
from tests.serve.test_engine_thread import Breaking, Fragile
from trtkit.chat import load_chat
from trtkit.cli import serve
from trtkit.cli.app import run
from trtkit.errors import EngineError
from trtkit.runtime.api import Request, StepOutput
from trtkit.runtime.load import OpenOptions
from trtkit.runtime.sources import DirectorySource
from trtkit.serve.run import ServeOptions, Serving, run_serve
from trtkit.solve.options import SolveOptions


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine_dir(tmp_path_factory.mktemp("built") / "engine")
    save_chat_files(directory)
    return directory


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGTERM)])
def test_it_serves_until_a_signal(engine: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "trtkit.cli", "serve", str(engine), "--port", "0", "--json", "--device", "cpu"]
    options = ["--threads", "1", "--samples", "4", "--max-tokens", "8", "--temperature", "0"]
    environment = {**os.environ, "TRTKIT_API_KEY": ""}
    child = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    with child:
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            if line.startswith("{"):
                break
        document = json.loads(lines[-1])
        assert document.keys() == {"url", "models", "engine", "rows", "total_tokens"}
        assert (document["models"], document["rows"], document["total_tokens"]) == (["tiny", "tiny:maj"], 16, 256)
        url = document["url"].removesuffix("/v1")
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8}
        texts = {call(url, "/v1/chat/completions", body)[1].partition('"choices"')[2] for _ in range(2)}
        assert len(texts) == 1  # the temperature of the command line, where the request names none
        status, reply = call(url, "/v1/chat/completions", {**body, "model": "tiny:maj"})
        assert status == 200
        assert json.loads(reply)["vote"]["samples"] + json.loads(reply)["vote"]["cancelled"] == 4
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert err.splitlines()[-1].startswith("stopped: ")
    assert "Traceback" not in err


def test_the_next_line_is_a_request_that_runs() -> None:
    serving = Serving(url="http://127.0.0.1:8000", models=("it's", "it's:maj"), rows=1, total_tokens=2)
    words = shlex.split(serve._example(serving, keyed=True))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "Authorization: Bearer $TRTKIT_API_KEY" in words
    assert json.loads(words[-1])["model"] == "it's:maj"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", str(engine), "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port}: cannot listen there" in err
    assert "--port 0" in err
    assert run(["serve", str(engine), "--host", "no.such.host.invalid"]) == 2
    assert "--host 'no.such.host.invalid'" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(engine), "--reasoning", "loud", "--name", "x:maj", "--api-key", "schlüssel"]) == 2
    err = capsys.readouterr().err
    assert [part for part in ("reasoning 'loud'", "name 'x:maj'", "the API key") if part not in err] == []
    assert run(["serve", str(engine), "--top-p", "0"]) == 2
    assert run(["serve", str(engine), "--api-key", ""]) == 2
    assert "the API key: is empty" in capsys.readouterr().err
    assert run(["serve", str(tmp_path)]) == 1
    assert "engine" in capsys.readouterr().err


def test_an_engine_that_is_gone_ends_the_server(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [Breaking(lambda _: [1])]
    monkeypatch.setattr("trtkit.runtime.load.open_engine", lambda *_: left.pop())
    ready: queue.Queue[str] = queue.Queue()
    ended: queue.Queue[Exception] = queue.Queue()

    def work() -> None:
        options = ServeOptions(name="tiny", port=0, voting=SolveOptions())
        try:
            source = DirectorySource.of(engine)
            run_serve(source, OpenOptions(), options, on_ready=lambda serving: ready.put(serving.url))
        except EngineError as problem:
            ended.put(problem)

    thread = threading.Thread(target=work)
    thread.start()
    assert call(ready.get(timeout=30), "/v1/completions", {"prompt": "x"})[0] == 500
    assert "illegal memory access" in str(ended.get(timeout=30))
    thread.join(30)


class Tired(Fragile):
    def step(self) -> list[StepOutput]:
        time.sleep(0.005)
        return super().step()


def test_the_options_reach_the_server(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = load_chat(engine)

    def answer(request: Request) -> Sequence[int]:
        if request.prompt == tuple(b"long"):
            return [97] * 4000
        return [*chat.encode("five</think>5"), *chat.eos_ids]

    left = [Tired(answer, rows=3)]
    monkeypatch.setattr("trtkit.runtime.load.open_engine", lambda *_: left.pop())
    ready: queue.Queue[Serving] = queue.Queue()

    def work() -> None:
        voting = SolveOptions(samples=4, max_tokens=8)
        options = ServeOptions(
            name="five", port=0, reasoning="separate", voting=voting, most_unfinished=2, key="secret"
        )  # fmt: skip
        with pytest.raises(EngineError, match="cannot be opened again"):
            run_serve(DirectorySource.of(engine), OpenOptions(), options, on_ready=ready.put)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    serving = ready.get(timeout=30)
    assert (serving.models, serving.rows, serving.total_tokens) == (("five", "five:maj"), 3, 4096)
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    assert call(serving.url, "/v1/chat/completions", ask)[0] == 401
    to = client(serving.url, "secret")
    message = to.chat.completions.create(model="five", messages=ask["messages"]).choices[0].message
    assert message.model_dump()["reasoning_content"] == "five"
    assert message.content == "5"
    with to.completions.create(model="five", prompt=list(b"long"), n=2, max_tokens=4000, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="at most 2 may"):
            to.completions.create(model="five", prompt="x")

    def broken() -> bool:
        with contextlib.suppress(openai.APIError):
            to.completions.create(model="five", prompt=list(b"break"))
        return not thread.is_alive()

    wait_for(broken)
    close_clients()


def test_missing_packages_are_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else real(name, *rest)
    )
    assert run(["serve", str(engine)]) == 1
    err = capsys.readouterr().err
    assert "not installed: uvicorn" in err
    assert "pip install 'trtkit[serve]'" in err
