"""A cheaper head drafts worse, never differently: trimmed vocabulary, int8 output layer, the runtime's kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from drafter.beam import beam_search
from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from tests.runtime.test_output_layer import rounded_head
from trtkit.errors import EngineError, UsageError
from trtkit.model_spec import read_model_spec
from trtkit.recipe import DRAFTER_DIR, TOKEN_ORDER_FILE
from trtkit.runtime.draft_head import HeadOptions, measured_acceptance, open_head, with_kernels
from trtkit.runtime.load import OpenOptions, open_engine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with a random head; token 319 is the most frequent, 0 the rarest."""
    directory = tiny_engine_dir(tmp_path_factory.mktemp("engine"), recipe={"tree": TreeShape(beams=2, length=3)})
    spec = read_model_spec(directory)
    torch.manual_seed(3)
    head = Drafter(DrafterConfig(hidden_size=spec.hidden, vocab_size=spec.vocab, exit_dim=64))
    (directory / DRAFTER_DIR).mkdir()
    save_drafter(head, directory / DRAFTER_DIR, dtype=torch.float32)
    order = torch.arange(spec.vocab, dtype=torch.int32).flip(0).contiguous()
    save_file({"by_frequency": order}, directory / DRAFTER_DIR / TOKEN_ORDER_FILE)
    return directory


def _head(directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> Drafter:
    spec = read_model_spec(directory)
    return open_head(
        directory / DRAFTER_DIR, spec, HeadOptions(**options), device=CPU, dtype=dtype
    )  # fmt: skip


@pytest.mark.parametrize("shape", [TreeShape(beams=1, length=4), TreeShape(beams=3, length=2)])
def test_a_trimmed_head_ranks_the_kept_tokens_as_the_whole_one_does(directory: Path, shape: TreeShape) -> None:
    whole, trimmed = _head(directory), _head(directory, vocabulary=40)
    context, token = torch.randn(6, whole.config.hidden_size), torch.arange(6)
    table = torch.randn(320, whole.config.hidden_size)
    full, _ = whole.step(context, torch.zeros_like(context), table[token])
    kept, _ = trimmed.step(context, torch.zeros_like(context), table[token])
    ids = torch.arange(319, 279, -1)
    torch.testing.assert_close(kept, full[:, ids])
    drafted = beam_search(trimmed, lambda ids: table[ids], context, token, shape)
    assert drafted.shape == (6, shape.beams, shape.length)
    assert int(drafted.min()) >= 280
    best = ids[full[:, ids].argmax(dim=1)]
    assert drafted[:, 0, 0].tolist() == best.tolist() or shape.beams > 1


@pytest.mark.parametrize(
    "options", [{"vocabulary": 12}, {"precision": "int8"}, {"vocabulary": 64, "precision": "int8"}]
)
def test_the_tokens_are_those_of_plain_decoding(directory: Path, options: dict[str, object]) -> None:
    requests = [request(str(i), p, seed=i, max_tokens=24) for i, p in enumerate(random_prompts(1, [5, 20, 33]))]
    opening = OpenOptions(device="cpu", dtype="float32", speculative=False)
    with open_engine(directory, opening) as engine:
        plain, _ = run_all(engine, requests)
    opening = OpenOptions(
        device="cpu", dtype="float32", tree=TreeShape(beams=2, length=3), head=HeadOptions(**options)
    )  # fmt: skip
    with open_engine(directory, opening) as engine:
        drafted, _ = run_all(engine, requests)
        assert engine.stats().steps <= 24
    assert drafted == plain


@pytest.mark.parametrize("precision", ["model", "int8"])
def test_kernels_change_the_speed_and_not_the_logits(precision: str) -> None:
    torch.manual_seed(0)
    head = Drafter(DrafterConfig(hidden_size=64, vocab_size=96, exit_dim=32)).bfloat16().requires_grad_(False)
    context, state, embedding = (torch.randn(3, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    expected, expected_state = head.step(context, state, embedding)
    fast = with_kernels(head, precision, device=CPU, dtype=torch.bfloat16)
    logits, next_state = fast.step(context, state, embedding)
    torch.testing.assert_close(next_state, expected_state)
    spread = float(expected.float().std())
    assert float((logits - expected).abs().max()) < (0.02 if precision == "model" else 0.06) * spread * 4


@torch.no_grad()
def test_int8_rounds_the_output_layer_and_nothing_else() -> None:
    head = Drafter(DrafterConfig(hidden_size=64, vocab_size=96, exit_dim=32)).requires_grad_(False)
    context, state, embedding = torch.randn(3, 5, 64)
    exact, wanted_state = head.step(context, state, embedding)
    wanted = head.features(context, wanted_state) @ rounded_head(head.output.weight).T
    found, found_state = with_kernels(head, "int8", device=CPU, dtype=torch.float32).step(context, state, embedding)
    torch.testing.assert_close(found_state, wanted_state)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (wanted - exact).abs().max() > 1e-3, "the test could not tell them apart"


def test_what_cannot_be_trimmed_says_so(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="draft vocabulary 0"):
        HeadOptions(vocabulary=0)
    with pytest.raises(UsageError, match="must be model or int8"):
        HeadOptions(precision="int3")
    head = tmp_path / DRAFTER_DIR
    head.mkdir()
    for name in ("config.json", "model.safetensors"):
        (head / name).write_bytes((directory / DRAFTER_DIR / name).read_bytes())
    spec = read_model_spec(directory)
    assert open_head(head, spec, HeadOptions(vocabulary=320), device=CPU, dtype=torch.float32).token_ids is None
    with pytest.raises(UsageError, match=TOKEN_ORDER_FILE):
        open_head(head, spec, HeadOptions(vocabulary=10), device=CPU, dtype=torch.float32)
    for order in ({"by_frequency": torch.zeros(320, dtype=torch.int32)}, {"by_age": torch.arange(320)}, None):
        save_file(order or {}, head / TOKEN_ORDER_FILE)
        if order is None:
            (head / TOKEN_ORDER_FILE).write_bytes(b"{}")
        with pytest.raises(EngineError, match="every one of 320 tokens"):
            open_head(head, spec, HeadOptions(vocabulary=10), device=CPU, dtype=torch.float32)


def test_a_head_that_cannot_serve_the_model_is_refused(directory: Path, tmp_path: Path) -> None:
    opening = OpenOptions(device="cpu", drafter=tmp_path)
    for hidden, vocab in ((256, 319), (128, 320)):
        head = Drafter(DrafterConfig(hidden_size=hidden, vocab_size=vocab, exit_dim=64))
        save_drafter(head, tmp_path, dtype=torch.float32)
        words = f"hidden size {hidden} and vocabulary {vocab}, the model has 256 and 320"
        with pytest.raises(EngineError, match=words):
            open_engine(directory, opening)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EngineError, match="cannot be read") as caught:
        open_engine(directory, opening)
    assert "--drafter" in (caught.value.hint or "")


def test_acceptance_is_expected_as_measured_at_the_highest_temperature(tmp_path: Path) -> None:
    """The one that samples are drawn at; a head from elsewhere says nothing, or something else."""
    assert measured_acceptance(tmp_path) == {}
    measured = {("1x2", 0.6): [0.7, 0.5], ("1x2", 1.0): [0.6, 0.4], ("1x2", 0.0): [0.8, 0.6], ("4x1", 0.0): [0.9]}
    trees = [{"tree": t, "temperature": at, "accepted_by_depth": shares} for (t, at), shares in measured.items()]
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"report": {"trees": trees}}))
    assert measured_acceptance(tmp_path) == {
        TreeShape(beams=1, length=2): (0.6, 0.4), TreeShape(beams=4, length=1): (0.9,)
    }  # fmt: skip
    foreign: list[object] = [
        {}, {"report": []}, {"report": {"trees": [{"tree": 4}]}}, {"report": {"trees": [{**trees[0], "tree": "wide"}]}},
        {"report": {"trees": [{**trees[0], "accepted_by_depth": [0.5, float("nan")]}]}},
    ]  # fmt: skip
    for other in foreign:
        path.write_text(json.dumps(other))
        assert measured_acceptance(tmp_path) == {}
