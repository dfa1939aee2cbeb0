"""A small real tokenizer with an R1-style chat template, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def save_chat_files(
    directory: Path, *, special: Sequence[str] = _SPECIAL, template: str = _TEMPLATE, end: str = "<|im_end|>"
) -> None:
    """Byte-level tokenizer of 261 ids, unless other ``special`` tokens are named."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    fast.chat_template = template
    fast.save_pretrained(directory)


def save_problems(path: Path, rows: int = 24) -> Path:
    """Calibration rows in OpenMathReasoning's columns."""
    lines = [
        {
            "problem": f"What is {n} + {n}?",
            "generated_solution": f"<think>\n{n} and {n} make {2 * n}.\n</think>\n\\boxed{{{2 * n}}}",
        }
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
