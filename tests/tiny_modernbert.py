"""A tiny, randomly initialized ModernBERT with a tokenizer of words and digits, saved as transformers saves it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Punctuation, Sequence, Whitespace
from tokenizers.processors import TemplateProcessing

from trtkit.bundled import practice_dir

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def practice_texts() -> list[str]:
    """The bundled problems, 328 of them."""
    texts = []
    for name in ("problems.jsonl", "calibration.jsonl"):
        lines = (practice_dir() / name).read_text(encoding="utf-8").splitlines()
        texts += [json.loads(line)["problem"] for line in lines]
    return list(dict.fromkeys(texts))


def tokens_needed(text: str) -> float:
    """Labels that depend on the text: longer numbers and some families take more tokens."""
    digits = len(re.findall(r"\d", text))
    return (30.0 + 12.0 * digits) * (3.0 if "gcd" in text or "common" in text else 1.0)


def save_tiny_modernbert(directory: Path, *, seed: int = 0) -> Path:
    """Two layers, hidden 64, an untrained masked language model like the published base checkpoint."""
    splits = Sequence([Whitespace(), Digits(individual_digits=True), Punctuation()])
    words = sorted({word for text in practice_texts() for word, _ in splits.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splits
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=512,
    ).save_pretrained(directory)  # fmt: skip
    config = transformers.ModernBertConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.ModernBertForMaskedLM(config).save_pretrained(directory)
    return directory
