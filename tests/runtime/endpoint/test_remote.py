"""A server in the place of an engine directory: its tokenizer, what is told of it, and the engine that it opens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import request
from tests.runtime.endpoint.replies import refusal, vllm
from tests.runtime.endpoint.running import drain
from tests.runtime.endpoint.scripted_server import ScriptedServer, document, scripted
from tests.runtime.endpoint.test_server import vllm_card
from trtkit.chat import Chat
from trtkit.errors import CheckpointError, EngineError, TrtkitError, UsageError
from trtkit.files import write_json
from trtkit.runtime.api import SamplingParams, SwitchPenalty
from trtkit.runtime.endpoint.engine import ROWS
from trtkit.runtime.endpoint.remote import Remote, connect
from trtkit.runtime.endpoint.server import endpoint_named
from trtkit.runtime.load import OpenOptions


@pytest.fixture
def running() -> Iterator[ScriptedServer]:
    with scripted() as server:
        yield server


def serve(server: ScriptedServer, **card: Any) -> str:
    """Its address, once it has one model."""
    server.pages = {"/v1/models": document(200, {"object": "list", "data": [card]})}
    return server.root


def connected(server: ScriptedServer, tokenizer: str | None = None, **card: Any) -> Remote:
    return connect(endpoint_named(serve(server, **card)), tokenizer)


def test_the_tokenizer_is_that_of_the_checkpoint_which_the_server_names(
    running: ScriptedServer, tokenizer_dir: Path, chat: Chat
) -> None:
    it = connected(running, **vllm_card("m", root=str(tokenizer_dir)))
    assert it.chat.encode("né</think>") == chat.encode("né</think>")
    assert it.chat.template_digest == chat.template_digest


@pytest.mark.parametrize("root", ["/nowhere/at/all", "nobody/has-this-model", "no hub id"])
def test_a_checkpoint_that_is_not_here_is_asked_for(running: ScriptedServer, root: str, tokenizer_dir: Path) -> None:
    with pytest.raises(UsageError, match=f"serves {root}, whose tokenizer is not here") as caught:
        connected(running, **vllm_card("m", root=root))
    assert "--tokenizer" in str(caught.value.hint)
    assert caught.value.where == f"{running.root}/v1"
    assert connected(running, str(tokenizer_dir), **vllm_card("m", root=root)).card == {"root": root}


def test_a_server_that_names_no_checkpoint_needs_a_tokenizer(running: ScriptedServer, tokenizer_dir: Path) -> None:
    card = {"id": "m", "owned_by": "tensorrt_llm"}
    with pytest.raises(UsageError, match="does not say which checkpoint") as caught:
        connected(running, **card)
    assert "--tokenizer" in str(caught.value.hint)
    it = connected(running, str(tokenizer_dir), **card)
    assert (it.model, it.card) == ("m", {"root": "m"})


def test_a_tokenizer_that_is_none(running: ScriptedServer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer found"):
        connected(running, str(tmp_path), **vllm_card("m"))
    with pytest.raises(TrtkitError, match="no such directory"):
        connected(running, str(tmp_path / "none"), **vllm_card("m"))


def test_a_user_names_the_tokenizer_before_the_server_does(
    running: ScriptedServer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    assert connected(running, str(tokenizer_dir), **vllm_card("m", root=str(tmp_path))).chat.size == 261


def test_what_is_told_of_it(running: ScriptedServer, tokenizer_dir: Path, chat: Chat) -> None:
    it = connected(running, str(tokenizer_dir), **vllm_card("m"))
    url = f"{running.root}/v1"
    place = dict(it.place)
    assert len(place.pop("tokenizer")) == 64
    assert place == {"path": url, "model": "m", "template": chat.template_digest}
    assert (it.model, it.told, it.card, it.greedy) == ("m", f"m at {url} (vllm)", {"root": "org/m"}, False)
    plain = connected(running, str(tokenizer_dir), id="m")
    assert plain.told == f"m at {url}"


def test_what_is_said_before_a_run(running: ScriptedServer, tokenizer_dir: Path) -> None:
    it = connected(running, str(tokenizer_dir), **vllm_card("m"))
    assert it.notices(SamplingParams(), logprobs=True) == ()
    switch = SamplingParams(switch=SwitchPenalty(alpha=1.0, beta=2, tokens=(1,)))
    with pytest.raises(UsageError, match="thought switches"):
        it.notices(switch)
    plain = connected(running, str(tokenizer_dir), id="m")
    (notice,) = plain.notices(SamplingParams())
    assert "no token ids" in notice
    with pytest.raises(UsageError, match="log-probabilities"):
        plain.notices(SamplingParams(), logprobs=True)


@pytest.mark.parametrize(
    ("options", "named", "told", "rows"), [(3, 5, 7, 3), (None, 5, 7, 5), (None, None, 7, 7), (None, None, None, ROWS)]
)
def test_how_many_requests_are_open_at_once(
    running: ScriptedServer, tokenizer_dir: Path, options: int | None, named: int | None, told: int | None, rows: int
) -> None:
    """What the options say, else the user's address, else the server."""
    url = serve(running, **vllm_card("m", max_rows=told))
    it = connect(endpoint_named(url, rows=named), str(tokenizer_dir))
    with it.open(OpenOptions(rows=options)) as engine:
        assert engine.max_rows == rows
    with it.open() as engine:
        assert engine.max_rows == (named or told or ROWS)


@pytest.mark.parametrize(
    ("told", "config", "total"),
    [
        (500, {"max_position_embeddings": 700}, 500),
        (None, {"max_position_embeddings": 700}, 700),
        (None, {"max_position_embeddings": "many"}, 1 << 24),
        (None, {}, 1 << 24),
        (None, None, 1 << 24),
    ],
)
def test_the_longest_request(
    running: ScriptedServer, tokenizer_dir: Path, tmp_path: Path, told: int | None, config: Any, total: int
) -> None:
    """What the server says, else the checkpoint, else the server decides."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(tokenizer_dir, directory)
    if config is not None:
        write_json(directory / "config.json", config)
    with connected(running, str(directory), **vllm_card("m", max_model_len=told)).open() as engine:
        assert engine.max_total_tokens == total


def test_seeds_can_be_left_to_the_server(running: ScriptedServer, tokenizer_dir: Path) -> None:
    url = serve(running, **vllm_card("m"))
    for seeds in (True, False):
        it = connect(endpoint_named(url, seeds=seeds), str(tokenizer_dir))
        running.script = lambda body, it=it: vllm(it.chat, [[5]], "length")
        with it.open() as engine:
            engine.submit(request("a", (1,)))
            drain(engine)
        assert ("seed" in running.bodies[-1]) == seeds


def test_the_key_goes_along(running: ScriptedServer, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTKIT_ENDPOINT_KEY", "secret")
    it = connect(endpoint_named(serve(running, **vllm_card("m"))), str(tokenizer_dir))
    running.script = lambda body: refusal(401, "no")
    with it.open() as engine:
        engine.submit(request("a", (1,)))
        with pytest.raises(EngineError, match="401"):
            drain(engine)
    assert [it.headers["authorization"] for it in running.asked] == ["Bearer secret"] * 2
    assert "secret" not in repr(it)
