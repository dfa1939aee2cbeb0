"""A Hugging Face checkpoint (qwen2, qwen3) as one bf16 GGUF file, for llama.cpp. Runs in llama's environment.

Format: the GGUF specification of the ggml project; tensor and key names by the package ``gguf``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

__all__ = ["write_gguf"]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, out: Path) -> None:
    """Write ``out``; matrices in bf16, norms and biases in float32, as llama.cpp wants them."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    if config["model_type"] not in ("qwen2", "qwen3"):
        raise SystemExit(f"{config['model_type']}: only qwen2 and qwen3 are converted to GGUF")
    writer = gguf.GGUFWriter(out, config["model_type"])
    _write_shape(writer, config)
    _write_tokens(writer, model, config)
    for name, values in _tensors(model):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if values.ndim == 1:
            writer.add_tensor(_name(name), (values.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(_name(name), values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _write_tokens(writer: Any, model: Path, config: dict[str, Any]) -> None:
    """The vocabulary, filled up to the embedding's rows; only token ids are ever fed, so its merges do not matter."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    words = {index: word for word, index in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        words[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(size)])
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_eos_token_id(max(kinds))
    writer.add_add_bos_token(False)


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{_NAMES[layer[2]]}.{kind}" if layer else f"{_NAMES[stem]}.{kind}"


def _tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bits) of every tensor, as uint16: numpy has no bfloat16. A safetensors file: u64 length, JSON, data."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name}: {entry['dtype']}, only bf16 checkpoints are converted to GGUF")
            begin, end = entry["data_offsets"]
            yield name, np.frombuffer(data[begin:end], dtype=np.uint16).reshape(entry["shape"])
