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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.config import DrafterConfig
from drafter.model import Drafter

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "DrafterError",
    "canonical_name",
    "load_drafter",
    "public_names",
    "read_config",
    "save_drafter",
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
    except (OSError, ValueError) as problem:
        raise DrafterError(f"{path}: cannot be read as a draft head's configuration: {problem}") from None
    wanted = {"hidden_size": int, "vocab_size": int, "exit_dim": int, "num_draft_layers": int, "rnn": bool}
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
    tensors = {canonical_name(name): tensor for name, tensor in _read_tensors(directory).items()}
    with torch.device("meta"):
        drafter = Drafter(config)
    shapes = {name: tuple(value.shape) for name, value in drafter.state_dict().items()}
    names = public_names(config)
    wrong = [f"{public}: missing" for public in names.values() if public not in tensors]
    wrong += [f"{name}: not part of such a head" for name in tensors if name not in names.values()]
    wrong += [
        f"{public}: shape {tuple(tensors[public].shape)}, expected {shapes[name]}"
        for name, public in names.items()
        if public in tensors and tuple(tensors[public].shape) != shapes[name]
    ]
    wrong += [
        f"{name}: not finite in {dtype}".replace("torch.", "")
        for name, tensor in tensors.items()
        if not bool(tensor.to(dtype).isfinite().all())
    ]
    if wrong:
        raise DrafterError(f"{directory}: the weights do not fit the configuration: {'; '.join(wrong)}")
    state = {name: tensors[public].to(device=device, dtype=dtype) for name, public in names.items()}
    drafter.load_state_dict(state, assign=True)
    return drafter.requires_grad_(False).eval()


def _read_tensors(directory: Path) -> Mapping[str, Tensor]:
    path, old = directory / WEIGHTS_FILE, directory / "model.pt"
    try:
        if path.is_file():
            return load_file(path)
        if old.is_file():
            state: dict[str, Tensor] = torch.load(old, map_location="cpu", weights_only=True)
            return state
    except (OSError, SafetensorError, RuntimeError) as problem:
        raise DrafterError(f"{directory}: the weights cannot be read: {problem}") from None
    raise DrafterError(f"{directory}: no {WEIGHTS_FILE} (nor model.pt)")


def canonical_name(name: str) -> str:
    """The public name of a tensor that another writer calls ``lm_heads.*``, ``0.*`` or ``input_projs.*``."""
    name = re.sub(r"^(lm_heads|0)\.", "lm_head.", name)
    return re.sub(r"^input_projs(\.0)?\.", "input_proj.", name)
