"""The model's shape, and its export to a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from practice.tokenizer import VOCAB_SIZE, id_of, load_tokenizer, save_tokenizer

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 768, 5, 4, 2, 64
ROPE_THETA = 10_000.0
MAX_POSITIONS = 2048
ATTENTION = "eager"  # measured faster than SDPA for training on a CPU at these lengths


def model_config() -> Qwen2Config:
    """The practice model: every width a multiple of 128, also when split over two ranks."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
    )


def config_document(end_id: int, pad_id: int) -> dict[str, object]:
    """config.json with the spellings of transformers 4 and 5."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": LAYERS,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write_json(path: Path, document: object) -> None:
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(aside, path)


def export(weights: Mapping[str, torch.Tensor], tokenizer_folder: Path, folder: Path) -> None:
    """Write tokenizer, config and bf16 weights; each file appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_folder)
    if not (folder / "tokenizer_config.json").exists():
        save_tokenizer(tokenizer, folder)
    end_id, pad_id = id_of(tokenizer, "<|im_end|>"), id_of(tokenizer, "<|endoftext|>")
    write_json(folder / "config.json", config_document(end_id, pad_id))
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "eos_token_id": [end_id, pad_id],
            "pad_token_id": pad_id,
        },
    )
    aside = folder / "model.safetensors.part"
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(tensors, str(aside), metadata={"format": "pt"})
    aside.chmod(0o644)
    os.replace(aside, folder / "model.safetensors")


def load_model(folder: Path) -> Qwen2ForCausalLM:
    """The exported model in bf16, ready to sample."""
    if not (folder / "model.safetensors").exists():
        raise SystemExit(f"no checkpoint in {folder}\nhint: run `train_practice.py train` first")
    model: Qwen2ForCausalLM = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.set_attn_implementation(ATTENTION)
    model.train(False)
    return model
