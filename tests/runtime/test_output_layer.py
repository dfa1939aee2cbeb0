"""lm_head as int8 codes: the logits against transformers' hidden states, and which one an engine runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_files import save_chat_files
from tests.engines import random_prompts
from tests.reference.quantizers import int8_rows
from tests.runtime.test_model import decode_logits
from tests.tiny import save_tiny, tiny_model
from trtkit.build.native import build_native
from trtkit.checkpoint.hf import open_source
from trtkit.checkpoint.unified import open_unified
from trtkit.errors import UsageError
from trtkit.recipe import Limits, Recipe, read_manifest
from trtkit.runtime.load import OpenOptions, open_engine
from trtkit.runtime.model import DecoderModel

CPU = torch.device("cpu")
LIMITS = Limits(batch=4, prompt_tokens=100, total_tokens=128)


def rounded_head(head: torch.Tensor) -> torch.Tensor:
    """What int8 codes with a scale per row make of (V, H), by the definition."""
    codes, scales = int8_rows(head.tolist(), 128)
    return torch.tensor(codes, dtype=torch.float32) * torch.tensor(scales)[:, None]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_the_true_hidden_states_times_the_rounded_head(tmp_path: Path, tied: bool) -> None:
    save_tiny(tmp_path, tie_word_embeddings=tied)
    (tokens,) = random_prompts(1, [50])
    reference = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        # Also where the head is tied, the embeddings that the states come from are the unrounded ones.
        hidden = reference.model(torch.tensor([tokens])).last_hidden_state[0, 29:]
        exact, wanted = reference.lm_head(hidden), hidden @ rounded_head(reference.lm_head.weight).T
    ours = decode_logits(tmp_path, tokens[:30], tokens[30:], torch.float32, output_layer="int8")
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert (wanted - exact).abs().max() > 0.01, "the test could not tell them apart"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_stays_near_in_every_compute_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_tiny(tmp_path, dtype=torch.bfloat16)
    model = DecoderModel(open_unified(tmp_path), device=CPU, dtype=dtype, max_tokens=8, output_layer="int8")
    hidden = torch.randn(40, model.spec.hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = hidden.float() @ open_unified(tmp_path).lm_head().float().T
    for rows in (1, 3, 40):
        error = (model.logits(hidden[:rows]).float() - wanted[:rows]).norm() / wanted[:rows].norm()
        assert 1e-4 < error < 0.02


def head_of(directory: Path, **options: Any) -> str:
    """Which lm_head an engine multiplies with, from what it makes of the unit vectors."""
    with open_engine(directory, OpenOptions(device="cpu", dtype="float32", **options)) as engine:
        model: DecoderModel = engine._model
        found = model.logits(torch.eye(model.spec.hidden)).T
    stored = open_unified(directory).lm_head().float()
    if torch.equal(found, stored):
        return "model"
    torch.testing.assert_close(found, rounded_head(stored), rtol=1e-5, atol=1e-6)
    return "int8"


def built(source: Path, out: Path, precision: str, **recipe: Any) -> Path:
    build_native(
        Recipe(model=str(source), precision=precision, limits=LIMITS, int4_method="rtn", **recipe), out, device="cpu"
    )
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny(tmp_path_factory.mktemp("model"), dtype=torch.float32)
    save_chat_files(directory)
    return directory


@pytest.mark.parametrize(("precision", "head"), [("bf16", "model"), ("int8", "int8"), ("int4", "int8")])
def test_an_engine_runs_what_its_build_settled_on(source: Path, tmp_path: Path, precision: str, head: str) -> None:
    directory = built(source, tmp_path / "engine", precision)
    assert read_manifest(directory).recipe.output_layer == head
    assert head_of(directory) == head
    # On disk lm_head is the source's: TensorRT-LLM and other readers know no other.
    assert torch.equal(open_unified(directory).lm_head(), open_source(source).shards.tensor("lm_head.weight"))


def test_a_run_may_ask_for_the_other_one(source: Path, tmp_path: Path) -> None:
    directory = built(source, tmp_path / "engine", "int4")
    assert head_of(directory, output_layer="model") == "model"
    assert head_of(built(source, tmp_path / "plain", "bf16"), output_layer="int8") == "int8"
    with pytest.raises(UsageError, match="'int4'"):
        OpenOptions(output_layer="int4")


def test_an_engine_from_before_the_choice_runs_the_models_dtype(source: Path, tmp_path: Path) -> None:
    directory = built(source, tmp_path / "engine", "int4")
    manifest = json.loads((directory / "engine.json").read_text())
    del manifest["recipe"]["output_layer"]
    (directory / "engine.json").write_text(json.dumps(manifest))
    assert head_of(directory) == "model"
    assert head_of(directory, output_layer="int8") == "int8"
