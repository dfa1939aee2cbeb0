"""What a server is found to be, and how its address may be written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest

from tests.runtime.endpoint.scripted_server import HOLD, Reply, document, free_socket, page, said, scripted
from trtkit.errors import EngineError, UsageError
from trtkit.runtime.endpoint import server as endpoint_server
from trtkit.runtime.endpoint.server import KEY_VARIABLE, Server, endpoint_named, look_at


def vllm_card(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": f"org/{name}", "parent": None,
        "max_model_len": 32768, "permission": [{"id": "modelperm-1"}], **more,
    }  # fmt: skip


def found(*cards: object, model: str | None = None, pages: Mapping[str, Reply] | None = None) -> Server:
    """What is made of a server with these models."""
    listed = {"/v1/models": document(200, {"object": "list", "data": list(cards)}), **(pages or {})}
    with scripted(pages=listed) as server:
        return look_at(endpoint_named(server.root, model=model))


@pytest.mark.parametrize(
    ("card", "kind", "source", "total"),
    [
        (vllm_card("m"), "vllm", "org/m", 32768),
        ({"id": "m", "object": "model", "created": 1, "owned_by": "sglang", "root": "/models/m", "parent": None,
          "max_model_len": 4096}, "sglang", "/models/m", 4096),
        ({"id": "m", "object": "model", "created": 1, "owned_by": "tensorrt_llm"}, "tensorrt_llm", None, None),
        ({"id": "m", "object": "model", "created": 1, "owned_by": "library"}, "other", None, None),
        ({"id": "m", "owned_by": None, "root": 7, "max_model_len": "long"}, "other", None, None),
        ({"id": "m", "max_model_len": True}, "other", None, None),
        ({"id": "m", "owned_by": "vLLM", "max_model_len": 0}, "vllm", None, None),
    ],
)  # fmt: skip
def test_kinds_of_servers(card: dict[str, Any], kind: str, source: str | None, total: int | None) -> None:
    it = found(card)
    assert (it.model, it.dialect.name, it.source, it.total_tokens, it.rows) == ("m", kind, source, total, None)


def test_this_projects_own_says_how_many_rows_it_runs() -> None:
    """Its second model answers by vote."""
    card = {"id": "tiny", "owned_by": "trtkit", "root": "org/tiny", "max_model_len": 256, "max_rows": 16}
    it = found(card, {**card, "id": "tiny:maj"})
    assert it == Server(model="tiny", dialect=it.dialect, source="org/tiny", total_tokens=256, rows=16)
    assert it.dialect.name == "trtkit"
    assert it.dialect.exact
    with pytest.raises(UsageError, match="no model 'tiny:mai'"):
        found(card, {**card, "id": "tiny:maj"}, model="tiny:mai")


LLAMA = {
    "id": "m.gguf", "aliases": [], "tags": [], "object": "model", "created": 1, "owned_by": "llamacpp",
    "meta": {"n_vocab": 151936, "n_ctx_train": 131072},
}  # fmt: skip


@pytest.mark.parametrize(
    ("props", "rows", "total"),
    [
        (document(200, {"default_generation_settings": {"n_ctx": 8192, "params": {}}, "total_slots": 4}), 4, 8192),
        (document(200, {"total_slots": 4}), 4, None),
        (document(200, {"default_generation_settings": None, "total_slots": "4"}), None, None),
        (document(200, []), None, None),
        (document(200, {"default_generation_settings": 5}), None, None),
        (page("hello"), None, None),
        (document(404, {"total_slots": 4}), None, None),
    ],
)
def test_llama_cpp_says_its_slots_beside_the_models(props: Reply, rows: int | None, total: int | None) -> None:
    it = found(LLAMA, pages={"/props": props})
    assert (it.dialect.name, it.rows, it.total_tokens) == ("llamacpp", rows, total)


def test_other_servers_are_not_asked_for_slots() -> None:
    it = found(vllm_card("m"), pages={"/props": document(200, {"total_slots": 4})})
    assert it.rows is None


def test_one_of_several_models_must_be_chosen() -> None:
    cards = [vllm_card("first"), vllm_card("second")]
    with pytest.raises(UsageError, match="has 2 models") as caught:
        found(*cards)
    assert caught.value.offenders == ("first", "second")
    assert "--endpoint-model" in str(caught.value.hint)
    assert found(*cards, model="second").source == "org/second"


def test_adapters_are_not_what_is_meant_where_nobody_says() -> None:
    cards = [vllm_card("lora", parent="base", root="/loras/x"), vllm_card("base")]
    assert found(*cards).model == "base"
    assert found(*cards, model="lora").source == "/loras/x"


def test_a_model_that_is_not_there_names_its_neighbour() -> None:
    with pytest.raises(UsageError, match=r"no model 'qwen3-8'.*qwen3-8b"):
        found(vllm_card("qwen3-8b"), vllm_card("other"), model="qwen3-8")
    with pytest.raises(UsageError) as caught:
        found(vllm_card("qwen3-8b"), vllm_card("other"), model="zzz")
    assert "it has: qwen3-8b, other" in str(caught.value.hint)


@pytest.mark.parametrize(
    "models",
    [
        page("<html>hello</html>"), page("Not Found", 404), document(500, {"data": [vllm_card("m")]}),
        document(200, []), document(200, {"data": []}), document(200, {"data": None}), document(200, {"data": 5}),
        document(200, {"data": ["m", {"name": "m"}, {"id": ""}]}), document(200, {"models": []}),
        document(200, {"data": {"id": "m"}}), document(200, None),
    ],
)  # fmt: skip
def test_what_is_no_such_server_is_told(models: Reply) -> None:
    with scripted(pages={"/v1/models": models}) as server, pytest.raises(EngineError, match="list any model") as caught:
        look_at(endpoint_named(server.root))
    assert f"status {models.status}" in caught.value.message
    assert caught.value.where == f"{server.root}/v1/models"
    assert "http://HOST:PORT/v1" in str(caught.value.hint)


def test_odd_entries_of_a_list_are_passed_over() -> None:
    assert found(None, "m", {"name": "x"}, vllm_card("m")).model == "m"


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_is_asked_for_and_shown(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = document(status, {"error": {"message": "who are you?"}})
    with scripted(pages={"/v1/models": wanted}) as server:
        with pytest.raises(EngineError, match=r"wants a key: who are you\?") as caught:
            look_at(endpoint_named(server.root))
        assert KEY_VARIABLE in str(caught.value.hint)
        server.pages = {"/v1/models": document(200, {"data": [vllm_card("m")]})}
        monkeypatch.setenv(KEY_VARIABLE, "secret")
        endpoint = endpoint_named(server.root)
        look_at(endpoint)
        assert [it.headers.get("authorization") for it in server.asked] == [None, "Bearer secret"]
        assert "secret" not in repr(endpoint)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(free_socket()) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(EngineError, match="cannot be reached: Connect call failed") as caught:
            look_at(endpoint_named(url))
    assert caught.value.where == f"{url}/v1"
    assert "is it running" in str(caught.value.hint)
    monkeypatch.setattr(endpoint_server, "_PATIENCE_SECONDS", 0.05)
    with (
        scripted(pages={"/v1/models": said(HOLD)}) as server,
        pytest.raises(EngineError, match="cannot be reached: no answer in time"),
    ):
        look_at(endpoint_named(server.root))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        (" http://localhost:8000/v1\n", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/completions/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/models", "http://localhost:8000/v1"),
        ("https://api.example.com/llm", "https://api.example.com/llm/v1"),
        ("https://api.example.com/llm/v1", "https://api.example.com/llm/v1"),
        ("HTTP://Host", "http://Host/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
        ("http://me:word@host:8000", "http://me:word@host:8000/v1"),
    ],
)
def test_addresses(written: str, meant: str) -> None:
    assert endpoint_named(written).url == meant


@pytest.mark.parametrize(
    "written",
    [
        "localhost:8000", "localhost", "", "ftp://host", "http://", "http://:8000", "http://host:port",
        "http://host:99999", "http://[::1", "http://host/v1?key=1", "http://host/v1#models", "unix:///tmp/socket",
    ],
)  # fmt: skip
def test_what_is_no_address(written: str) -> None:
    with pytest.raises(UsageError, match="is not the address of a server") as caught:
        endpoint_named(written)
    assert caught.value.where == f"--endpoint {written}"
    assert caught.value.exit_code == 2


def test_what_else_a_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    it = endpoint_named("http://host", model="m", rows=3, seeds=False)
    assert (it.model, it.rows, it.seeds, it.key) == ("m", 3, False, None)
    assert endpoint_named("http://host").seeds
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert endpoint_named("http://host").key is None
