"""Draft heads on disk: ``config.json`` + ``model.safetensors`` under the public tensor names.

    lm_head.{i}.linear.weight, .bias     residual block i
    lm_head.{n}.weight                   output layer, n = num_draft_layers
    input_proj.weight, .bias             only where exit_dim is not 2 H
    rnn_w.weight, rnn_u.weight, .bias    only with the recurrence

These are the names of apple/ml-recurrent-drafter, which TensorRT-LLM's converter reads. Heads whose lists are called
``lm_heads`` or ``0``, or whose projection is called ``input_projs``, are read too, and ``model.pt`` as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafter.config import DrafterConfig
from drafter.model import Drafter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "DrafterError",
    "canonical_name",
    "check_weights",
    "copy_weights",
    "load_drafter",
    "public_names",
    "read_config",
    "save_drafter",
    "stored_sizes",
    "weights_file",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "recurrent_drafting_drafter"
_OPTIONAL = {"num_lookback_tokens", "model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}


class DrafterError(ValueError):
    """A draft head that cannot be read: the message says which file and why."""


def public_names(config: DrafterConfig) -> dict[str, str]:
    """Module parameter name -> tensor name on disk."""
    names = {"output.weight": f"lm_head.{config.num_draft_layers}.weight"}
    for i in range(config.num_draft_layers):
        for part in ("weight", "bias"):
            names[f"blocks.{i}.{part}"] = f"lm_head.{i}.linear.{part}"
    if config.projects_input:
        names |= {f"input_proj.{part}": f"input_proj.{part}" for part in ("weight", "bias")}
    if config.rnn:
        names |= {name: name for name in ("rnn_w.weight", "rnn_u.weight", "rnn_u.bias")}
    return names


def save_drafter(drafter: Drafter, directory: Path, *, dtype: torch.dtype) -> None:
    """Write both files into ``directory``, which must exist."""
    config = drafter.config
    state = drafter.state_dict()
    tensors = {
        public: state[name].detach().to(dtype).contiguous().cpu() for name, public in public_names(config).items()
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    data = {
        "model_type": MODEL_TYPE,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "rnn": config.rnn,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> DrafterConfig:
    """The head's configuration. Raises :class:`DrafterError` with everything that is missing or unknown."""
    path = directory / CONFIG_FILE
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        said = getattr(problem, "strerror", None) or problem
        raise DrafterError(f"{path}: cannot be read as a draft head's configuration: {said}") from None
    if not isinstance(data, dict):
        raise DrafterError(f"{path}: not a draft head's configuration: expected a JSON object")
    wanted = {"hidden_size": int, "vocab_size": int, "exit_dim": int, "num_draft_layers": int, "rnn": bool}
    own = ("exit_dim", "num_draft_layers", "rnn")
    if not any(name in data for name in own):  # a model's, say: what else is wrong with it helps nobody
        raise DrafterError(f"{path}: not a draft head's configuration: it has no {', no '.join(own)}")
    wrong = [f"{name}: expected {kind.__name__}, found {data.get(name)!r}" for name, kind in wanted.items()
             if type(data.get(name)) is not kind]  # fmt: skip
    wrong += [f"{name}: unknown key" for name in data if name not in wanted and name not in _OPTIONAL]
    if wrong:
        raise DrafterError(f"{path}: not a draft head's configuration: {'; '.join(wrong)}")
    try:
        return DrafterConfig(**{name: data[name] for name in wanted})
    except ValueError as problem:
        raise DrafterError(f"{path}: {problem}") from None


def load_drafter(directory: Path, *, dtype: torch.dtype, device: torch.device) -> Drafter:
    """Read a head, in eval mode. Raises :class:`DrafterError` listing missing, extra and misshapen tensors."""
    config = read_config(directory)
    tensors = dict(_tensors(directory))
    drafter = _without_weights(config)
    wrong = _misfits(drafter, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    wrong += [text for name, tensor in tensors.items() for text in _unusable(name, tensor, dtype)]
    _refuse(directory, wrong)
    state = {name: tensors[public].to(device=device, dtype=dtype) for name, public in public_names(config).items()}
    drafter.load_state_dict(state, assign=True)
    return drafter.requires_grad_(False).eval()


def check_weights(directory: Path) -> None:
    """Whether the tensors are those of the configuration, and finite: one after the other.

    Raises :class:`DrafterError` as :func:`load_drafter`.
    """
    drafter = _without_weights(read_config(directory))
    shapes: dict[str, tuple[int, ...]] = {}
    broken: list[str] = []
    for name, tensor in _tensors(directory):
        shapes[name] = tuple(tensor.shape)
        broken += _unusable(name, tensor, torch.float32)
    _refuse(directory, _misfits(drafter, shapes) + broken)


def copy_weights(directory: Path, target: Path) -> None:
    """Write the weights of the head in ``directory``, whatever they are called there, as the file ``target``."""
    save_file({name: tensor.clone() for name, tensor in _tensors(directory)}, target, metadata={"format": "pt"})


def _unusable(name: str, tensor: Tensor, dtype: torch.dtype) -> list[str]:
    """Why ``tensor`` cannot be computed with in ``dtype``."""
    if not tensor.is_floating_point():
        return [f"{name}: {tensor.dtype} codes, expected floating-point numbers".replace("torch.", "")]
    parts = tensor.reshape(-1).chunk(1 + tensor.numel() // (1 << 24))
    finite = all(bool(part.to(dtype).isfinite().all()) for part in parts)
    return [] if finite else [f"{name}: not finite in {dtype}".replace("torch.", "")]


def _without_weights(config: DrafterConfig) -> Drafter:
    with torch.device("meta"):
        return Drafter(config)


def _misfits(drafter: Drafter, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    names = public_names(drafter.config)
    wanted = {names[name]: tuple(value.shape) for name, value in drafter.state_dict().items()}
    wrong = [f"{public}: missing" for public in names.values() if public not in found]
    wrong += [f"{name}: not part of such a head" for name in found if name not in wanted]
    wrong += [
        f"{public}: shape {found[public]}, expected {shape}"
        for public, shape in wanted.items()
        if public in found and found[public] != shape
    ]
    return wrong


def _refuse(directory: Path, wrong: list[str]) -> None:
    if wrong:
        raise DrafterError(f"{directory}: the weights do not fit the configuration: {'; '.join(wrong)}")


def stored_sizes(directory: Path) -> list[tuple[torch.dtype, int]]:
    """Dtype and bytes of each stored tensor. Raises :class:`DrafterError`."""
    return [(tensor.dtype, tensor.nbytes) for _, tensor in _tensors(directory)]


def weights_file(directory: Path) -> Path:
    """The file with the weights: ``model.safetensors``, or else ``model.pt``. Raises :class:`DrafterError`."""
    path, old = directory / WEIGHTS_FILE, directory / "model.pt"
    if not path.is_file() and not old.is_file():
        raise DrafterError(f"{directory}: no {WEIGHTS_FILE} (nor model.pt)")
    return path if path.is_file() else old


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors by their public names."""
    path = weights_file(directory)
    try:
        if path.name == WEIGHTS_FILE:
            with safe_open(path, framework="pt") as file:
                stored: list[str] = file.keys()
                for name in stored:
                    yield canonical_name(name), file.get_tensor(name)
            return
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as problem:
        raise DrafterError(f"{directory}: the weights cannot be read: {problem}") from None
    except Exception:  # what a damaged pickle raises depends on the byte that it breaks at
        state = None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise DrafterError(f"{path}: damaged, or not a dictionary of tensors as state_dict() makes it")
    for name, tensor in state.items():
        yield canonical_name(str(name)), tensor


def canonical_name(name: str) -> str:
    """The public name of a tensor that another writer calls ``lm_heads.*``, ``0.*`` or ``input_projs.*``."""
    name = re.sub(r"^(lm_heads|0)\.", "lm_head.", name)
    return re.sub(r"^input_projs(\.0)?\.", "input_proj.", name)
