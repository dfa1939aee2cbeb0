"""The tokenizer of the servers, a real server, and engines that are closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chat_files import save_chat_files
from tests.engines import tiny_engine_dir
from tests.runtime.endpoint.running import Opened
from tests.runtime.endpoint.scripted_server import Script, ScriptedServer, scripted
from tests.serve.serving import wait_for
from trtkit.chat import Chat, load_chat
from trtkit.runtime.endpoint import engine as endpoint_engine
from trtkit.runtime.endpoint.client import Client
from trtkit.runtime.endpoint.dialects import DIALECTS, OTHER
from trtkit.runtime.endpoint.engine import EndpointEngine
from trtkit.runtime.endpoint.server import Server


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies, no waits between tries, and no thread is left."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "TRTKIT_ENDPOINT_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint_engine, "_FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(endpoint_engine, "_LONGEST_DELAY_SECONDS", 0.002)
    yield
    wait_for(lambda: not [it for it in threading.enumerate() if it.name == "endpoint"], 5)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_chat_files(directory)
    return directory


@pytest.fixture(scope="session")
def chat(tokenizer_dir: Path) -> Chat:
    """Ids of bytes, 256..260 are special: 258 ends a turn, 260 is ``</think>``."""
    return load_chat(tokenizer_dir)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine all of whose tokens the tokenizer knows."""
    directory = tiny_engine_dir(tmp_path_factory.mktemp("served") / "engine", vocab_size=261)
    save_chat_files(directory)
    return directory


@pytest.fixture
def opened(chat: Chat) -> Iterator[Opened]:
    """``opened(script, dialect="vllm", ...)``: an engine on a scripted server, and that."""
    with contextlib.ExitStack() as stack:

        def open_one(
            script: Script, *, dialect: str = "vllm", rows: int = 8, total_tokens: int = 4096, key: str | None = None,
            server: ScriptedServer | None = None, url: str | None = None, **more: Any,
        ) -> tuple[EndpointEngine, ScriptedServer]:  # fmt: skip
            running = stack.enter_context(scripted(script)) if server is None else server
            client = Client(url or f"{running.root}/v1", key=key, most=rows)
            seen = Server(model="tiny", dialect=DIALECTS.get(dialect, OTHER))
            engine = EndpointEngine(client, seen, chat, rows=rows, total_tokens=total_tokens, **more)
            return stack.enter_context(engine), running

        yield open_one
