"""The engine as its users see it: the right tokens, whatever else is in the batch, and orderly ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from tests.examples import examples
from tests.tiny import tiny_model
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import EngineError, RequestError, UsageError
from trtkit.runtime.api import FinishReason, Request
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.model import DecoderModel
from trtkit.runtime.prefill import PART_TOKENS
from trtkit.runtime.torch_engine import TorchEngine
from trtkit.runtime.torch_options import TorchLimits


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine_dir(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def model(directory: Path) -> DecoderModel:
    return DecoderModel(open_unified(directory), device=torch.device("cpu"), dtype=torch.float32, max_tokens=256)


def _engine(model: DecoderModel, **limits: Any) -> TorchEngine:
    return TorchEngine(model, TorchLimits(**{"rows": 16, "total_tokens": 256, "kv_blocks": 300, **limits}))


def _greedy_by_transformers(prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = tiny_model().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in out[0, len(prompt) :]]


def test_greedy_tokens_are_those_of_transformers(directory: Path) -> None:
    prompts = random_prompts(4, [1, 2, 15, 16, 17, 33, 70])
    with open_engine(directory, OpenOptions(device="cpu", dtype="float32")) as engine:
        tokens, _ = run_all(engine, [request(str(i), p, temperature=0) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert tokens[str(i)] == _greedy_by_transformers(prompt, 20)


def _batch(seed: int, count: int) -> list[Request]:
    """Requests over three prompts with sampling settings of every kind."""
    prompts = random_prompts(seed, [1, 18, 47])
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.0},
    ]
    return [
        request(str(i), prompts[i % 3], seed=seed * 1000 + i, max_tokens=5 + 7 * (i % 4), stop_ids=(5, 9),
                **settings[(i // 3) % 4])
        for i in range(count)
    ]  # fmt: skip


@examples(12)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 16),
    blocks=st.sampled_from([14, 20, 300]),
    arrivals=st.sampled_from([1, 3, 100]),
    order=st.permutations(range(10)),
)
def test_a_sample_does_not_depend_on_the_batch(
    model: DecoderModel, seed: int, rows: int, blocks: int, arrivals: int, order: list[int]
) -> None:
    """Batch size, arrival order, company and preemption change nothing: same request, same tokens."""
    requests = _batch(seed, 10)
    alone, ends = run_all(_engine(model, rows=1), requests)
    shuffled = [requests[i] for i in order]
    engine = _engine(model, rows=rows, kv_blocks=blocks, block_size=8)
    together, together_ends = run_all(engine, shuffled, arrivals_per_step=arrivals)
    assert together == alone
    assert together_ends == ends
    assert engine.stats().kv_blocks_free == blocks


def test_preemption_happens_and_changes_nothing(model: DecoderModel) -> None:
    requests = [request(str(i), p, seed=i, max_tokens=60) for i, p in enumerate(random_prompts(5, [20] * 6))]
    roomy, _ = run_all(_engine(model), requests)
    tight = _engine(model, kv_blocks=18, block_size=8)
    assert run_all(tight, requests)[0] == roomy
    assert tight.stats().preemptions > 0


def test_samples_of_a_problem_prefill_once_and_differ(model: DecoderModel) -> None:
    (prompt,) = random_prompts(6, [40])
    engine = _engine(model)
    tokens, _ = run_all(engine, [request(str(i), prompt, seed=i) for i in range(8)])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefill_tokens) == (8 * 40, 39)
    assert len({tuple(t) for t in tokens.values()}) == 8
    assert stats.tokens_per_step == 1.0


@pytest.mark.parametrize("steps", [{}, {"fixed_shapes": True, "overlap": True}], ids=["plain", "overlapping"])
def test_texts_that_go_on_are_not_computed_anew(
    model: DecoderModel, steps: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of a conversation, each with all that came before; the samples are those of an engine that forgets."""
    monkeypatch.setattr("trtkit.runtime.scheduler._LEAST_REUSED", 100)

    def talk(**limits: Any) -> tuple[list[list[int]], int]:
        engine = _engine(model, rows=2, **steps, **limits)
        texts = [list(prompt) for prompt in random_prompts(8, [150, 150])]
        for turn in range(3):
            asked = [request(f"{turn} {i}", tuple(text), seed=i, max_tokens=20) for i, text in enumerate(texts)]
            told, _ = run_all(engine, asked)
            for text, answer in zip(texts, told.values(), strict=True):
                text += [*answer, 5]
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks
        return texts, stats.prefill_tokens

    forgotten, everything = talk()
    kept, computed = talk(prefix_cache=True)
    assert kept == forgotten
    assert (everything, computed) == (2 * (149 + 170 + 191), 2 * (149 + 10 + 15))
    assert talk(prefix_cache=True, kv_blocks=30)[0] == forgotten, "hardly more memory than two texts take"


@pytest.mark.parametrize("steps", [{}, {"fixed_shapes": True, "overlap": True}], ids=["plain", "overlapping"])
def test_rows_go_on_while_a_long_prompt_is_computed(
    model: DecoderModel, steps: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = random_prompts(9, [5, 150])
    requests = [request("short", short, seed=1, max_tokens=40), request("long", long, seed=2)]
    alone = [run_all(_engine(model, rows=1), [made])[0] for made in requests]
    monkeypatch.setitem(PART_TOKENS, "cpu", 16)
    engine = _engine(model, rows=2, **steps)
    engine.submit(requests[0])
    told: dict[str, list[int]] = {"short": list(engine.step()[0].tokens), "long": []}
    engine.submit(requests[1])
    first: dict[str, int] = {}
    while engine.has_work:
        for output in engine.step():
            told[output.request_id] += output.tokens
            first.setdefault(output.request_id, len(told["short"]))
    assert told == alone[0] | alone[1]
    assert first["short"] == 2
    assert first["long"] in (11, 12), "ten parts, and a token of the other with each"


def test_stop_ids_and_budgets_end_a_row(model: DecoderModel) -> None:
    (prompt,) = random_prompts(7, [10])
    free, ends = run_all(_engine(model), [request("a", prompt, seed=3, max_tokens=30)])
    assert ends["a"] is FinishReason.LENGTH
    assert len(free["a"]) == 30
    stop = free["a"][11]
    cut, ends = run_all(_engine(model), [request("a", prompt, seed=3, max_tokens=30, stop_ids=(stop,))])
    assert cut["a"] == free["a"][: free["a"].index(stop) + 1], "the stop token is the last of the output"
    assert ends["a"] is FinishReason.STOP
    short = _engine(model, total_tokens=32)
    tokens, ends = run_all(short, [request("a", prompt, max_tokens=1000)])
    assert len(tokens["a"]) == 22, "prompt and output together fill the engine's length"
    assert ends["a"] is FinishReason.LENGTH


def test_cancel_frees_the_row_at_once(model: DecoderModel) -> None:
    engine = _engine(model, rows=1)
    first, second = random_prompts(8, [30, 30])
    engine.submit(request("a", first, max_tokens=100))
    engine.submit(request("b", second, max_tokens=3))
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    outputs = engine.step()
    assert [(o.request_id, o.finish) for o in outputs if o.finish] == [("a", FinishReason.CANCELLED)]
    assert [o.request_id for o in outputs if o.tokens] == ["b"], "the waiting row took its place in the same step"
    while engine.has_work:
        engine.step()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


def test_impossible_requests_are_refused_with_every_reason(model: DecoderModel) -> None:
    engine = _engine(model, kv_blocks=8)
    (prompt,) = random_prompts(9, [30])
    engine.submit(request("a", prompt))
    cases = {
        "in use": request("a", prompt),
        "empty": request("b", ()),
        "vocabulary": request("b", (1, 999)),
        "the engine takes 256": request("b", prompt * 10),
        "KV cache of 128": request("b", prompt, max_tokens=200),
        "max_tokens": request("b", prompt, max_tokens=0),
    }
    for words, refused in cases.items():
        with pytest.raises(RequestError, match=words):
            engine.submit(refused)
    while engine.has_work:
        engine.step()


def test_open_engine_refuses_what_it_cannot_open(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not an engine directory"):
        open_engine(tmp_path)
    with pytest.raises(UsageError, match="unknown device"):
        open_engine(directory, OpenOptions(device="abacus"))
    (tmp_path / "engine.json").write_text('{"version": 99}')
    with pytest.raises(EngineError, match="newer than this trtkit"):
        open_engine(tmp_path)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_an_eight_bit_cache_is_calibrated_and_used(kv_dtype: str, tmp_path: Path) -> None:
    """Built with --kv-dtype, the cache holds codes: other tokens now and then, and half the memory."""
    from tests.chat_files import save_chat_files, save_problems
    from tests.tiny import save_tiny
    from trtkit.build.native import build_native
    from trtkit.recipe import Limits, Recipe

    source = save_tiny(tmp_path / "model")
    save_chat_files(source)
    save_problems(source / "calibration.jsonl")
    limits = Limits(batch=4, prompt_tokens=64, total_tokens=128)
    recipe = Recipe(model=str(source), precision="bf16", kv_dtype=kv_dtype, limits=limits)
    build_native(recipe, tmp_path / "engine")
    requests = [request(str(i), p, temperature=0, max_tokens=12) for i, p in enumerate(random_prompts(0, [20, 40]))]
    with open_engine(tmp_path / "engine", OpenOptions(device="cpu", dtype="float32")) as engine:
        tokens, _ = run_all(engine, requests)
        assert isinstance(engine, TorchEngine)
        assert engine._stepper.cache._keys.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[kv_dtype]
    # A random model's greedy tokens hang on thin margins; the first one must survive 8-bit keys and values.
    for i, prompt in enumerate(random_prompts(0, [20, 40])):
        assert tokens[str(i)][0] == _greedy_by_transformers(prompt, 1)[0]


def test_practice_model_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """64 prompts of the bundled checkpoint, in one batch here, one by one there, and there in one piece each."""
    import json
    import shutil

    from transformers import AutoModelForCausalLM

    from trtkit.bundled import practice_dir
    from trtkit.chat import VARIANTS, load_chat
    from trtkit.recipe import EngineManifest, Recipe, write_manifest

    directory = tmp_path / "practice"
    shutil.copytree(practice_dir(), directory)
    manifest = EngineManifest(
        recipe=Recipe(model="practice", precision="bf16"),
        backend="torch",
        versions={},
        checkpoint_digest={},
        quality=None,
        created="2026-01-01T00:00:00Z",
    )
    write_manifest(directory, manifest)
    chat = load_chat(directory)
    lines = (practice_dir() / "problems.jsonl").read_text().splitlines()[:64]
    prompts = [chat.prompt(json.loads(line)["problem"], VARIANTS["solve"]) for line in lines]
    with open_engine(directory, OpenOptions(device="cpu", dtype="float32")) as engine:
        tokens, _ = run_all(engine, [request(str(i), p, temperature=0, max_tokens=24) for i, p in enumerate(prompts)])
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        # If every token is the likeliest behind those before it, the sequence is the one that greedy decoding makes.
        text = torch.tensor([[*prompt, *tokens[str(i)]]])
        with torch.no_grad():
            likeliest = reference(text).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert len(tokens[str(i)]) == 24
        assert tokens[str(i)] == likeliest.tolist(), f"prompt {i}"
