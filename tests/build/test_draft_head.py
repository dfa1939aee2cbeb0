"""A draft head is looked at before the build begins, and all of it goes into the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.chat_files import save_chat_files
from tests.tiny import save_tiny
from tests.trtllm_double.model import save_head
from trtkit.build.draft_head import add_head, check_head, head_bytes
from trtkit.chat import load_chat
from trtkit.describe import describe
from trtkit.errors import CheckpointError
from trtkit.model_spec import read_model_spec
from trtkit.recipe import DRAFTER_DIR, TOKEN_ORDER_FILE, TRAINING_FILE


@pytest.mark.parametrize("damage", ["missing", "cut", "renamed", "another size", "no number", "codes"])
def test_weights_that_no_engine_could_draft_with_are_found_before_the_build(tmp_path: Path, damage: str) -> None:
    model = save_tiny(tmp_path / "model")
    save_chat_files(model)
    spec, chat, head = read_model_spec(model), load_chat(model), save_head(tmp_path / "head")
    check_head(head, spec, chat)
    weights = head / "model.safetensors"
    tensors = load_file(weights)
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage in ("no number", "codes"):
        bias = tensors["lm_head.1.linear.bias"].clone()
        bias[3] = torch.nan
        tensors["lm_head.1.linear.bias"] = bias if damage == "no number" else torch.ones_like(bias, dtype=torch.int8)
        save_file(tensors, weights)
    else:
        tensors["lm_head.1.linear.bias" if damage == "another size" else "surprise"] = torch.zeros(3)
        save_file(tensors, weights)
    said = {
        "missing": "no model.safetensors", "cut": "cannot be read", "renamed": "surprise: not part of such a head",
        "no number": r"lm_head\.1\.linear\.bias: not finite", "codes": r"lm_head\.1\.linear\.bias: int8 codes",
        "another size": r"lm_head\.1\.linear\.bias: shape \(3,\), expected \(512,\)",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=said[damage]):
        check_head(head, spec, chat)


def test_an_engine_gets_what_training_left_beside_the_weights(tmp_path: Path) -> None:
    """The order of tokens, to draft a smaller vocabulary, and the acceptance, to begin with a good tree."""
    head = save_head(tmp_path / "head")
    save_file({"by_frequency": torch.arange(320, dtype=torch.int32)}, head / TOKEN_ORDER_FILE)
    (head / TRAINING_FILE).write_text("{}")
    (head / "metrics.jsonl").write_text("{}\n")
    digests = add_head(head, tmp_path)
    copied = {path.name: path.read_bytes() for path in (tmp_path / DRAFTER_DIR).iterdir()}
    names = ("config.json", "model.safetensors", TOKEN_ORDER_FILE, TRAINING_FILE)
    assert copied == {name: (head / name).read_bytes() for name in names}
    assert digests.keys() == {f"{DRAFTER_DIR}/{name}" for name in copied}


def test_a_head_whose_weights_are_a_state_dict_goes_into_an_engine_as_safetensors(tmp_path: Path) -> None:
    """`solve --drafter` took such heads, and `build --drafter` and `inspect` did not."""
    model = save_tiny(tmp_path / "model")
    save_chat_files(model)
    head = save_head(tmp_path / "head")
    tensors = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    torch.save({name.replace("lm_head.", "lm_heads."): tensor for name, tensor in tensors.items()}, head / "model.pt")
    check_head(head, read_model_spec(model), load_chat(model))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert describe(head, verify=True).data["weights"]["bytes"] == total
    assert head_bytes(head) >= total
    assert f"{DRAFTER_DIR}/model.safetensors" in add_head(head, tmp_path)
    written = load_file(tmp_path / DRAFTER_DIR / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    (head / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.pt: damaged"):
        check_head(head, read_model_spec(model), load_chat(model))
    with pytest.raises(CheckpointError, match=r"model\.pt: damaged"):
        describe(head)
