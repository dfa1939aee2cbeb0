"""Tiny checkpoints made on the spot: every family, with transformers as the author of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip


def tiny_model(family: str = "qwen2", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random transformers model of ``family`` (qwen2, qwen3, llama), in eval mode."""
    shape = {**SHAPE, "head_dim": 64, **changes}
    shape["rope_parameters"] = shape.pop("rope_scaling", None) or {
        "rope_type": "default",
        "rope_theta": shape["rope_theta"],
    }
    config = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
    }[family](**shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.08)
    return model.to(dtype).eval()


def save_tiny(directory: Path, family: str = "qwen2", **changes: Any) -> Path:
    """Save :func:`tiny_model` as a Hugging Face directory (config.json, safetensors) and return it."""
    tiny_model(family, **changes).save_pretrained(directory)
    return directory
