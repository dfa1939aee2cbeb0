"""The TensorRT-LLM backend through the double: what the executor hears, and what comes out of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drafter.config import TreeShape
from tests.engines import random_prompts, request, run_all
from tests.trtllm_double.install import forget_double, install_double, install_gpu
from tests.trtllm_double.model import EOS, make_recipe, save_head, save_model, sources
from trtkit.build.bundle import build_trtllm
from trtkit.build.native import build_native
from trtkit.errors import EngineError, MissingDependency, RequestError, UsageError
from trtkit.runtime.api import Engine, FinishReason
from trtkit.runtime.draft_head import HeadOptions
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.trtllm_engine import ExecutorOptions, main, open_compiled, serve_rank
from trtkit.runtime.trtllm_sampling import EngineKind, notices

PLAIN = EngineKind(redrafter=False, greedy=False)
GREEDY = EngineKind(redrafter=True, greedy=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Engine directories of one tiny model: torch, and tensorrt-llm plain (two ranks) and with a greedy ReDrafter."""
    place = tmp_path_factory.mktemp("engines")
    model, head = save_model(place / "model"), save_head(place / "head")
    with pytest.MonkeyPatch.context() as patch:
        install_double(patch, place / "dist")
        recipe = make_recipe(model, ranks=2)
        build_native(dataclasses.replace(recipe, backend="torch"), place / "torch", device="cpu")
        build_trtllm(recipe, place / "plain", sources())
        build_trtllm(make_recipe(model, tree="2x3", greedy=True), place / "greedy", sources(head))
        build_trtllm(make_recipe(model, tree="1x2"), place / "sampling", sources(head))
        yield {path.name: path for path in place.iterdir()}
    forget_double()


def opened(directory: Path, **options: Any) -> Engine:
    return open_engine(directory, OpenOptions(device="cpu" if directory.name == "torch" else "auto", **options))


def last_executor() -> Any:
    return sys.modules["tensorrt_llm.bindings.executor"].OPENED[-1]


def mixed_requests() -> list[Any]:
    prompts = random_prompts(3, [1, 7, 16, 33, 100])
    made = [request(str(i), prompt, max_tokens=24, temperature=0.0) for i, prompt in enumerate(prompts)]
    return [*made, *(request(f"again {i}", prompts[2], max_tokens=9, temperature=0.0) for i in range(6))]


@pytest.mark.parametrize("name", ["plain", "greedy"])
def test_the_tokens_are_the_torch_backends_at_temperature_0(engines: dict[str, Path], name: str) -> None:
    with opened(engines["torch"]) as engine:
        wanted = run_all(engine, mixed_requests())
    with opened(engines[name]) as engine:
        assert run_all(engine, mixed_requests(), arrivals_per_step=2) == wanted
        stats = engine.stats()
        assert stats.new_tokens == sum(map(len, wanted[0].values()))
        assert stats.tokens_per_step == pytest.approx(1.0) if name == "plain" else stats.tokens_per_step >= 1.0
        assert stats.prompt_tokens == sum(len(each.prompt) for each in mixed_requests())
        assert stats.kv_blocks > 0
        assert not engine.has_work


def test_stops_are_like_the_torch_backends(engines: dict[str, Path]) -> None:
    """A stop word stays in the executor's output and an end id does not; ours ends with either."""
    prompts = random_prompts(5, [5, 9, 12])
    free = [request(str(i), prompt, max_tokens=20, temperature=0.0) for i, prompt in enumerate(prompts)]
    with opened(engines["torch"]) as engine:
        said, _ = run_all(engine, free)
    stops = {"0": (said["0"][4],), "1": (said["1"][7], EOS), "2": (EOS, 319)}
    stopped = [dataclasses.replace(each, stop_ids=stops[each.id]) for each in free]
    results = []
    for name in ("torch", "plain"):
        with opened(engines[name]) as engine:
            results.append(run_all(engine, stopped))
    assert results[0] == results[1]
    tokens, finish = results[1]
    assert finish["0"] is FinishReason.STOP
    assert tokens["0"][-1] in stops["0"]


def test_an_end_id_that_the_executor_swallows_is_put_back(engines: dict[str, Path]) -> None:
    prompt = random_prompts(5, [5])[0]
    with opened(engines["torch"]) as engine:
        said, _ = run_all(engine, [request("a", prompt, max_tokens=6, temperature=0.0)])
    with opened(engines["plain"]) as engine:
        engine._eos_ids = frozenset(said["a"][3:4])
        stop = (said["a"][3],)
        tokens, finish = run_all(engine, [request("a", prompt, max_tokens=6, temperature=0.0, stop_ids=stop)])
        heard = last_executor().enqueued[0]
    assert (heard.end_id, heard.stop_words) == (stop[0], None)
    assert finish["a"] is FinishReason.STOP
    assert tokens["a"] == said["a"][: said["a"].index(stop[0]) + 1]


@pytest.mark.parametrize(
    ("said", "reason", "tokens", "finish"),
    [
        ((5, 6), "END_ID", (5, 6, EOS), FinishReason.STOP),
        ((5, 9), "STOP_WORDS", (5, 9), FinishReason.STOP),
        ((5, 6, 7), "END_ID", (5, 6, 7), FinishReason.LENGTH),
        ((5, 6, 7), "STOP_WORDS", (5, 6, 7), FinishReason.LENGTH),
        ((5, 6, 9), "STOP_WORDS", (5, 6, 9), FinishReason.STOP),
    ],
)
def test_a_stop_past_the_limit_does_not_count(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, said: tuple[int, ...], reason: str,
    tokens: tuple[int, ...], finish: FinishReason,
) -> None:  # fmt: skip
    """A draft tree's step may reach past the limit of 3 and stop there; the executor cuts the tokens, not the reason.

    ``StopCriteriaLayer::forwardAsync`` (layers/stopCriteriaLayer.cpp) looks for stop words and the end id in all new
    tokens, and only then at the length; ``FinishedState::toFinishReason`` puts the length last.
    """
    with opened(engines["greedy"]) as engine:
        bindings = sys.modules["tensorrt_llm.bindings.executor"]
        engine.submit(request("a", (1, 2), max_tokens=3, temperature=0.0, stop_ids=(EOS, 9)))
        result = bindings._Result(
            is_final=True,
            output_token_ids=[list(said)],
            finish_reasons=[bindings.FinishReason[reason]],
            decoding_iter=2,
        )
        monkeypatch.setattr(last_executor(), "await_responses", lambda timeout: [bindings._Response(1, result)])
        (output,) = engine.step()
    assert (output.tokens, output.finish) == (tokens, finish)


def test_tokens_behind_a_stop_in_the_same_step_do_not_count(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft tree's step brings several; should the executor go on behind a stop word, it is told to end."""
    with opened(engines["greedy"]) as engine:
        bindings, executor, ended = sys.modules["tensorrt_llm.bindings.executor"], last_executor(), []
        engine.submit(request("a", (1, 2), max_tokens=30, temperature=0.0, stop_ids=(EOS, 9)))
        result = bindings._Result(
            is_final=False,
            output_token_ids=[[5, 9, 7]],
            finish_reasons=[bindings.FinishReason.NOT_FINISHED],
            decoding_iter=1,
        )
        monkeypatch.setattr(executor, "await_responses", lambda timeout: [bindings._Response(1, result)])
        monkeypatch.setattr(executor, "cancel_request", ended.append)
        (output,) = engine.step()
        assert (output.tokens, output.finish) == ((5, 9), FinishReason.STOP)
        assert ended == [1]
        assert not engine.has_work


def test_an_answer_ends_where_the_engine_does(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        tokens, finish = run_all(engine, [request("a", (1,) * 250, max_tokens=100, temperature=0.0)])
    assert len(tokens["a"]) == 6
    assert finish["a"] is FinishReason.LENGTH


def test_the_only_request_can_be_cancelled(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        engine.submit(request("a", (1, 2, 3), max_tokens=30, temperature=0.0))
        engine.cancel("a")
        assert engine.has_work, "its end is still to be reported"
        assert [output.finish for output in engine.step()] == [FinishReason.CANCELLED]
        assert not engine.has_work


def test_cancel(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        for name in ("stays", "goes"):
            engine.submit(request(name, (1, 2, 3), max_tokens=30, temperature=0.0))
        engine.step()
        engine.cancel("goes")
        engine.cancel("goes")
        engine.cancel("never was")
        outputs = list(engine.step())
        assert [o.finish for o in outputs if o.request_id == "goes"] == [FinishReason.CANCELLED]
        engine.submit(request("goes", (4, 5), max_tokens=2, temperature=0.0))
        later: list[Any] = []
        while engine.has_work:
            later += engine.step()
        assert sum(len(o.tokens) for o in later if o.request_id == "goes") == 2
        assert [o.finish for o in later if o.finish] == [FinishReason.LENGTH] * 2


def continued(engine: Engine) -> list[int]:
    """A held answer, cut back and pushed on twice, once from a pause."""
    tokens: list[int] = []

    def run(steps: int = 1000) -> None:
        for _ in range(steps):
            if not engine.has_work:
                break
            tokens.extend(token for output in engine.step() for token in output.tokens)

    held = dataclasses.replace(request("a", (5, 6, 7, 8), max_tokens=10, temperature=0.0), hold=True)
    engine.submit(held)
    run()
    assert not engine.has_work
    engine.extend("a", [9, 10], max_tokens=20, drop=3)
    run(5)
    while len(tokens) < 15:
        run(1)
    engine.pause("a")
    assert not engine.has_work
    engine.extend("a", [11], max_tokens=4, drop=len(tokens) - 15)
    run()
    tail = tokens[-4:]
    engine.extend("a", [], max_tokens=6, drop=5)  # what was appended, too
    run()
    engine.cancel("a")
    assert not list(engine.step())
    return tokens[:15] + tail + tokens[-6:]


@pytest.mark.parametrize("name", ["plain", "greedy"])
def test_held_requests_go_on_like_the_torch_backends(engines: dict[str, Path], name: str) -> None:
    with opened(engines["torch"], speculative=False) as engine:
        wanted = continued(engine)
    with opened(engines[name]) as engine:
        assert continued(engine) == wanted


def test_every_part_of_a_held_request_draws_anew(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        engine.submit(dataclasses.replace(request("a", (5, 6), seed=3, max_tokens=2, temperature=1.0), hold=True))
        while engine.has_work:
            engine.step()
        with pytest.raises(RequestError, match="drop 3: 2 tokens were generated"):
            engine.extend("a", [9], max_tokens=2, drop=3)
        engine.extend("a", [9], max_tokens=2)
        first, second = last_executor().enqueued
        while engine.has_work:
            engine.step()
        assert engine.stats().tokens_per_step == pytest.approx(1.0), "each part's steps count"
    assert second.input_token_ids[:2] == [5, 6]
    assert len(second.input_token_ids) == 5
    assert first.sampling_config.seed != second.sampling_config.seed


def test_requests_that_cannot_run(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        engine.submit(request("a", (1,), max_tokens=5, temperature=0.0))
        for bad, said in (
            (request("a", (1,)), "in use"),
            (request("b", ()), "empty"),
            (request("b", (1, 320)), "320 lies outside"),
            (request("b", (1,) * 256), "256 tokens"),
            (request("b", (1,), max_tokens=0), "at least 1"),
        ):
            with pytest.raises(RequestError) as caught:
                engine.submit(bad)
            assert said in str(caught.value)
        for wrong in (lambda: engine.pause("a"), lambda: engine.extend("a", [1], max_tokens=1)):
            with pytest.raises(RequestError):
                wrong()
        assert engine.max_total_tokens == 256


def test_a_request_that_fails_inside_the_executor(engines: dict[str, Path]) -> None:
    with opened(engines["plain"]) as engine:
        engine.submit(request("a", (1,), max_tokens=5, temperature=0.0))
        last_executor().fail(1, "no more blocks")
        with pytest.raises(EngineError, match="no more blocks"):
            engine.step()
        assert not engine.has_work


def test_what_the_executor_is_told(engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(engines["plain"], rows=4, kv_memory_fraction=0.5) as engine:
        config = last_executor().config
        assert engine.max_rows == 4
    assert config.max_batch_size == 4
    assert config.kv_cache_config.free_gpu_memory_fraction == 0.5
    assert config.kv_cache_config.enable_block_reuse
    assert config.enable_chunked_context
    assert config.parallel_config.communication_mode.name == "ORCHESTRATOR"
    assert config.parallel_config.device_ids == [0, 1]
    with opened(engines["greedy"]):
        config = last_executor().config
    assert config.decoding_config.decoding_mode.name == "ExplicitDraftTokens"
    assert not config.kv_cache_config.enable_block_reuse
    assert not config.enable_chunked_context
    assert config.parallel_config is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with opened(engines["plain"]):
        assert last_executor().config.parallel_config.communication_mode.name == "LEADER"
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    with pytest.raises(EngineError, match="3 MPI ranks"):
        opened(engines["plain"])
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE")
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(EngineError, match="no worker program"):
        opened(engines["plain"])


def test_without_paged_context_there_is_no_reuse_and_no_chunking(engines: dict[str, Path], tmp_path: Path) -> None:
    """Both read keys and values of the cache while a prompt is computed, which only that kernel can."""
    directory = shutil.copytree(engines["plain"], tmp_path / "engine")
    path = directory / "compiled" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["build_config"]["plugin_config"]["use_paged_context_fmha"] = False
    path.write_text(json.dumps(config), encoding="utf-8")
    open_compiled(directory, ExecutorOptions(block_reuse=True)).close()
    told = last_executor().config
    assert not told.kv_cache_config.enable_block_reuse
    assert not told.enable_chunked_context


def test_only_the_leader_sends_requests(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_llm.bindings.executor as bindings

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    serve_rank(engines["plain"], 4)
    assert last_executor().config.max_batch_size == 4
    monkeypatch.setattr(bindings.Executor, "can_enqueue_requests", lambda self: False)
    with pytest.raises(EngineError, match="not the first MPI rank") as caught:
        opened(engines["plain"])
    assert "-n 1 python -m trtkit.runtime.trtllm_engine" in (caught.value.hint or "")


def test_the_wrong_host(engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_double(monkeypatch, tmp_path / "newer", version="1.2.1")
    with pytest.raises(EngineError, match="cannot run here") as caught:
        opened(engines["plain"])
    assert caught.value.offenders == ("compiled by TensorRT-LLM 1.0.0, installed is 1.2.1",)
    install_double(monkeypatch, tmp_path / "same", version="1.0.0", capability=(9, 0))
    with pytest.raises(EngineError, match="cannot run here"):
        opened(engines["plain"])
    install_gpu(monkeypatch, None)
    with pytest.raises(EngineError, match="no GPU"):
        opened(engines["plain"])


def test_without_the_package(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("dist")])
    with pytest.raises(MissingDependency, match="not installed"):
        opened(engines["plain"])


def test_what_is_baked_in_cannot_be_asked_for(engines: dict[str, Path]) -> None:
    with pytest.raises(UsageError) as caught:
        open_engine(
            engines["greedy"], OpenOptions(device="cpu", dtype="float32", speculative=False, output_layer="int8")
        )
    assert len(caught.value.offenders) == 4
    assert "output layer int8: it is compiled in 16 bits" in caught.value.offenders
    others: dict[str, dict[str, Any]] = {
        "device cuda:1": {"device": "cuda:1"},
        "draft tree 1x2: it was built with 2x3": {"tree": TreeShape(beams=1, length=2)},
        "its drafter is compiled in": {"head": HeadOptions(vocabulary=64)},
    }
    for words, options in others.items():
        with pytest.raises(UsageError, match=words):
            open_engine(engines["greedy"], OpenOptions(**options))
    opened(engines["greedy"], output_layer="model", tree=TreeShape(beams=2, length=3)).close()
    opened(engines["plain"], speculative=False).close()
    with pytest.raises(UsageError, match="built for 8"):
        opened(engines["plain"], rows=9)


def test_a_greedy_engine_says_so(engines: dict[str, Path]) -> None:
    with opened(engines["greedy"]) as engine:
        assert engine.notices == notices(GREEDY)
        assert "nearly identical" in notices(GREEDY)[0]
        with pytest.raises(UsageError, match="cannot sample like that"):
            engine.submit(request("a", (1,), temperature=0.5))
    assert notices(PLAIN) == ()


def test_a_rank_that_cannot_serve_says_so_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, said in (
        ([], 2, "usage:"),
        ([str(tmp_path), "many"], 2, "usage:"),
        ([str(tmp_path)], 1, "error: "),
    ):
        assert main(arguments) == code
        assert capsys.readouterr().err.startswith(said)


def test_several_responses_for_one_request_are_one_output(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that was slow finds several; it must hear them together, to know where a sample stands."""
    with opened(engines["plain"]) as engine:
        bindings = sys.modules["tensorrt_llm.bindings.executor"]
        engine.submit(request("a", (1, 2), max_tokens=30, temperature=0.0, stop_ids=(EOS, 9)))
        engine.submit(request("b", (1, 2), max_tokens=30, temperature=0.0, stop_ids=(EOS, 9)))
        said = [(1, [5], False), (2, [6], False), (1, [7, 9], True)]
        responses = [
            bindings._Response(
                number,
                bindings._Result(
                    is_final=final,
                    output_token_ids=[tokens],
                    finish_reasons=[bindings.FinishReason["STOP_WORDS" if final else "NOT_FINISHED"]],
                    decoding_iter=1 + final,
                ),
            )
            for number, tokens, final in said
        ]
        monkeypatch.setattr(last_executor(), "await_responses", lambda timeout: responses)
        told = [(output.request_id, output.tokens, output.finish) for output in engine.step()]
    assert told == [("a", (5, 7, 9), FinishReason.STOP), ("b", (6,), None)]
