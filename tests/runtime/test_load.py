"""From a directory and options to an engine: which limits, trees and dtype it runs with, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.checkpoint import save_drafter
from drafter.config import DrafterConfig, TreeShape
from drafter.model import Drafter
from tests.engines import random_prompts, request, run_all, tiny_engine_dir
from trtkit.errors import CapacityError, EngineError, UsageError
from trtkit.recipe import DRAFTER_DIR, Limits
from trtkit.runtime import load
from trtkit.runtime.load import OpenOptions, open_engine

LIMITS = Limits(batch=4, prompt_tokens=30, total_tokens=64)
WIDE = TreeShape(beams=4, length=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a draft head; of 64 positions, which is also what the weights have."""
    return tiny_engine_dir(
        tmp_path_factory.mktemp("engine"), recipe={"limits": LIMITS}, num_hidden_layers=1, max_position_embeddings=64
    )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("head")
    torch.manual_seed(1)
    drafter = Drafter(DrafterConfig(hidden_size=256, vocab_size=320, exit_dim=16))
    save_drafter(drafter, directory, dtype=torch.float32)
    return directory


def _opened(directory: Path, **options: Any) -> Any:
    return open_engine(directory, OpenOptions(**{"device": "cpu", "dtype": "float32", **options}))


def test_a_head_may_come_from_elsewhere_and_draws_the_tree_that_is_asked_for(directory: Path, head: Path) -> None:
    """Rows run to the last position there is, a wide tree beyond it: the tokens are the plain ones."""
    requests = [request(str(i), p, seed=i, max_tokens=99) for i, p in enumerate(random_prompts(1, [3, 20, 20]))]
    with _opened(directory) as engine:
        plain = run_all(engine, requests)
        assert engine.stats().accepted_by_depth == ()
    with _opened(directory, drafter=head, tree=WIDE, rows=1) as engine:
        assert engine.max_rows == 1
        assert run_all(engine, requests) == plain
        assert len(engine.stats().accepted_by_depth) == WIDE.length
        assert engine.stats().preemptions == 0
    with _opened(directory, drafter=head, tree=WIDE, speculative=False) as engine:
        assert run_all(engine, requests[:1])[0]["0"] == plain[0]["0"]
        assert engine.stats().accepted_by_depth == ()
    assert {len(prompt_and_answer) for prompt_and_answer in plain[0].values()} == {61, 44}


def test_an_engines_own_head_gives_way(directory: Path, head: Path, tmp_path: Path) -> None:
    own = shutil.copytree(directory, tmp_path / "own")
    (own / DRAFTER_DIR).mkdir()
    (own / DRAFTER_DIR / "config.json").write_text("damaged")
    _opened(own, drafter=head, tree=WIDE).close()


def test_weights_have_the_last_word_on_positions(tmp_path: Path) -> None:
    directory = tiny_engine_dir(tmp_path, num_hidden_layers=1, max_position_embeddings=96)
    with _opened(directory) as engine:
        assert engine.max_total_tokens == 96


@pytest.mark.parametrize(("share", "rows"), [(None, 1.0), (0.5, 2.0), (1.0, 4.0)])
def test_keys_and_values_take_their_share_of_the_free_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, share: float | None, rows: float
) -> None:
    """A quarter of it unless another share is asked for; never more than all rows can use."""
    row = (64 + 16) // 16 + 1  # blocks of a full row with its pending token, and one for a shared prompt's copy
    block = 16 * 2 * 2 * 64 * 4
    monkeypatch.setattr(load, "free_bytes", lambda _: 4 * row * block)
    with _opened(directory, kv_memory_fraction=share) as engine:
        assert engine.stats().kv_blocks == rows * row
    monkeypatch.setattr(load, "free_bytes", lambda _: 400 * row * block)
    with _opened(directory, kv_memory_fraction=share) as engine:
        assert engine.stats().kv_blocks == LIMITS.batch * row
    monkeypatch.setattr(load, "free_bytes", lambda _: int(4 / rows * row * block) - 1)
    with pytest.raises(CapacityError, match="one request of 64 tokens"):
        _opened(directory, kv_memory_fraction=share)


def test_what_cannot_be_opened_like_that_is_refused(directory: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tree": WIDE}, "a draft tree 4x6, but no draft head"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "meta"}, "'meta' is not supported"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "no CUDA device"))
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            _opened(directory, **options)
    edited = tiny_engine_dir(tmp_path, recipe={"precision": "int8"}, num_hidden_layers=1)
    with pytest.raises(EngineError, match=r"engine\.json says int8, the weights are bf16"):
        _opened(edited)
