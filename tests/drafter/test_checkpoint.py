"""Draft heads on disk under the public names, theirs and ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafter.checkpoint import DrafterError, load_drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.model import Drafter

CPU = torch.device("cpu")


def _head(**changes: object) -> Drafter:
    return Drafter(DrafterConfig(**{"hidden_size": 4, "vocab_size": 6, "exit_dim": 5, **changes}))


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize(("exit_dim", "layers"), [(8, 2), (5, 2), (5, 0)])
def test_round_trip(tmp_path: Path, rnn: bool, exit_dim: int, layers: int) -> None:
    head = _head(rnn=rnn, exit_dim=exit_dim, num_draft_layers=layers)
    save_drafter(head, tmp_path, dtype=torch.float32)
    again = load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    x = torch.randn(3, 2, 4)
    for ours, theirs in zip(head.step(*x), again.step(*x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    narrow = load_drafter(tmp_path, dtype=torch.bfloat16, device=CPU)
    assert {tensor.dtype for tensor in narrow.state_dict().values()} == {torch.bfloat16}


def test_the_public_names_are_apples(tmp_path: Path) -> None:
    save_drafter(_head(), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "input_proj.weight": [5, 8],
        "input_proj.bias": [5],
        "lm_head.0.linear.weight": [5, 5],
        "lm_head.0.linear.bias": [5],
        "lm_head.1.linear.weight": [5, 5],
        "lm_head.1.linear.bias": [5],
        "lm_head.2.weight": [6, 5],
        "rnn_u.weight": [4, 4],
        "rnn_u.bias": [4],
        "rnn_w.weight": [4, 4],
    }


@pytest.mark.parametrize(("blocks", "projection"), [("0.", "input_projs."), ("lm_heads.", "input_projs.0.")])
def test_older_spellings_are_read(tmp_path: Path, blocks: str, projection: str) -> None:
    head = _head()
    save_drafter(head, tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("lm_head.", blocks).replace("input_proj.", projection): tensor for name, tensor in tensors.items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(renamed, tmp_path / "model.pt")
    again = load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_everything_wrong_is_listed(tmp_path: Path) -> None:
    save_drafter(_head(), tmp_path, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["rnn_w.weight"]
    tensors["lm_head.2.weight"] = torch.zeros(3, 3)
    tensors["surprise"] = torch.tensor([float("nan")])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DrafterError) as caught:
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    for words in ("rnn_w.weight: missing", "lm_head.2.weight: shape (3, 3), expected (6, 5)", "surprise: not finite"):
        assert words in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "exit_dim": "wide", "beams": 3}))
    with pytest.raises(DrafterError, match="exit_dim: expected int, found 'wide'; beams: unknown key"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    (tmp_path / "config.json").write_text(json.dumps({**config, "exit_dim": 0, "num_draft_layers": -1}))
    with pytest.raises(DrafterError, match="exit_dim must be positive; num_draft_layers must not be negative"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("damage", [{"exit_dim": 10**18}, {"num_draft_layers": 10**9}])
def test_sizes_that_no_head_has_are_refused(tmp_path: Path, damage: dict[str, int]) -> None:
    save_drafter(_head(), tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **damage}))
    with pytest.raises(DrafterError, match=f"{next(iter(damage))} is too large"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)


def test_the_configuration_of_a_model_is_not_gone_through(tmp_path: Path) -> None:
    made = {"model_type": "qwen2", "hidden_size": 4, "vocab_size": 6, "num_attention_heads": 2, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(made))
    with pytest.raises(DrafterError) as caught:
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    said = "not a draft head's configuration: it has no exit_dim, no num_draft_layers, no rnn"
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {said}"
    (tmp_path / "config.json").write_text(json.dumps({**made, "rnn": True}))
    with pytest.raises(DrafterError, match=r"exit_dim: expected int, found None; .*rope_theta: unknown key"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DrafterError, match=r"config\.json: .*configuration"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    save_drafter(_head(), tmp_path, dtype=torch.float32)
    weights, old = tmp_path / "model.safetensors", tmp_path / "model.pt"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(DrafterError, match="cannot be read"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    weights.unlink()
    with pytest.raises(DrafterError, match=r"no model\.safetensors"):
        load_drafter(tmp_path, dtype=torch.float32, device=CPU)
    # Empty, something else, a checkpoint around the state_dict, a whole module.
    for damage in (b"", b"a page of a web server", {"state_dict": _head().state_dict()}, _head()):
        if isinstance(damage, bytes):
            old.write_bytes(damage)
        else:
            torch.save(damage, old)
        with pytest.raises(DrafterError, match=r"model\.pt: damaged, or not a dictionary of tensors"):
            load_drafter(tmp_path, dtype=torch.float32, device=CPU)
