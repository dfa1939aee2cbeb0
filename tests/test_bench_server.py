"""``trtkit bench --endpoint``: what a running server gives, counted like an engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.fakes import FakeEngine
from tests.serve.serving import serving
from trtkit.bench.endpoint import measure_server
from trtkit.bench.engines import BenchOptions, Timing, time_once
from trtkit.chat import load_chat
from trtkit.cli.app import run
from trtkit.errors import UsageError
from trtkit.runtime.api import Engine, StepOutput
from trtkit.runtime.endpoint.remote import connect
from trtkit.runtime.endpoint.server import endpoint_named
from trtkit.runtime.load import OpenOptions, open_engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine_dir(tmp_path_factory.mktemp("served") / "engine")
    save_chat_files(directory)
    return directory


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    options = OpenOptions(device="cpu", threads=1)
    with serving(lambda: open_engine(place, options), load_chat(place)) as (url, _):
        yield url


def test_every_batch_is_counted_whole(place: Path, url: str) -> None:
    """Ends of turns end nothing here: each count has all its tokens, and they take some time."""
    remote = connect(endpoint_named(url), str(place))
    options = BenchOptions(batches=(1, 3), prompt_tokens=8, new_tokens=20, repeats=2)
    points = list(measure_server(remote, options))
    assert [(point.batch, point.model, point.endpoint) for point in points] == [
        (1, "tiny", f"{url}/v1"), (3, "tiny", f"{url}/v1"),
    ]  # fmt: skip
    assert all(0 < point.tokens_per_second < 1e6 and point.first_token_seconds > 0 for point in points)
    with pytest.raises(UsageError, match="exceed the server's 256"):
        list(measure_server(remote, BenchOptions(batches=(1,), prompt_tokens=250, new_tokens=20)))


def test_the_first_count_warms_up_and_as_many_requests_are_open_as_are_counted(
    place: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def counted(engine: Engine, _prompts: object, batch: int, _options: BenchOptions, repeat: int) -> Timing:
        rows.append(engine.max_rows)
        return Timing(
            first_seconds=0.1 * repeat, prefill_tokens_per_second=0.0, tokens_per_second=float(repeat * batch),
            tokens_per_step=1.0, accepted_by_depth=(), phase_seconds={},
        )  # fmt: skip

    monkeypatch.setattr("trtkit.bench.endpoint.time_once", counted)
    remote = connect(endpoint_named(url), str(place))
    points = list(measure_server(remote, BenchOptions(batches=(1, 4), prompt_tokens=5, new_tokens=5, repeats=3)))
    assert [(point.tokens_per_second, point.first_token_seconds) for point in points] == [(2.0, 0.2), (8.0, 0.2)]
    assert rows == [1] * 4 + [4] * 4


def test_the_time_to_the_first_tokens_is_that_of_the_last_row() -> None:
    class Slow(FakeEngine):
        def step(self) -> list[StepOutput]:
            if self.steps == 0:
                time.sleep(0.05)
            return super().step()

    options = BenchOptions(batches=(3,), prompt_tokens=4, new_tokens=6)
    timing = time_once(Slow(lambda _: [7] * 20), [(1, 2, 3)], 3, options, 0)
    assert timing.first_seconds >= 0.05


def test_the_command_line(place: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "--endpoint", url, "--tokenizer", str(place), "--batch", "2", "--new-tokens", "6"]
    assert run([*asked, "--prompt-tokens", "5", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "batch", "decode", "per", "request", "first", "token"]
    assert lines[1].split()[:2] == ["tiny", "2"]
    assert lines[-2] == f"next: trtkit solve problems.jsonl --endpoint {url}/v1 --tokenizer {place}"
    (point,) = json.loads(lines[-1])["points"]
    assert point["batch"] == 2
    assert point["tokens_per_second"] > 0


def test_what_a_server_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    idle = ["--engine", "E", "--profile", "--suite", "--rounds", "2", "--tree", "1x3", "--threads", "1"]
    assert run(["bench", "--endpoint", "http://localhost:1", *idle]) == 2
    said = capsys.readouterr().err
    assert all(f"{name}: not with --endpoint" in said for name in idle if name.startswith("--"))
    assert run(["bench", "--tokenizer", "practice"]) == 2
    assert "--tokenizer: only with --endpoint" in capsys.readouterr().err
