"""Servers that several tests speak to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.fakes import FakeEngine
from tests.serve.serving import CHAT, close_clients, recite, serving
from trtkit.chat import load_chat
from trtkit.runtime.load import OpenOptions, open_engine


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_clients()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(lambda: FakeEngine(recite, burst=3), CHAT) as (url, _):
        yield url


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine_dir(tmp_path_factory.mktemp("served") / "engine")
    save_chat_files(directory)
    return directory


@pytest.fixture(scope="module")
def real(model_dir: Path) -> Iterator[str]:
    options = OpenOptions(device="cpu", threads=1, dtype="float32")
    with serving(lambda: open_engine(model_dir, options), load_chat(model_dir)) as (url, _):
        yield url
