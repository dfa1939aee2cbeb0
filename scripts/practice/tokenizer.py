"""The tokenizer: byte-level BPE in Qwen's style, trained on generated text, 512 tokens in all."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from practice.problems import PROMPT_KINDS, messages, stream

VOCAB_SIZE = 512
CORPUS_PROBLEMS = 20_000
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)


def corpus(count: int) -> list[str]:
    """Text without special tokens: prompts and thoughts of training problems."""
    rng = Random("tokenizer")
    lines: list[str] = []
    for problem in islice(stream(rng, "train"), count):
        lines += [f"{turn['role']}\n{turn['content']}" for turn in messages(problem.text, rng.choice(PROMPT_KINDS))]
        lines += ["assistant\n", problem.thought, f"\n\n{problem.final}"]
    return lines


def train_tokenizer() -> Tokenizer:
    """Train the BPE merges; the five special tokens come last, as in Qwen's vocabularies."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = len(CONTROL_TOKENS) + len(THINK_TOKENS)
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(CORPUS_PROBLEMS), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens\nhint: it needs {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in CONTROL_TOKENS,
            }
            for token in CONTROL_TOKENS + THINK_TOKENS
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The trained tokenizer of a checkpoint folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise SystemExit(f"no {path}\nhint: run `train_practice.py tokenizer` first")
    return Tokenizer.from_file(str(path))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be in the vocabulary."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise SystemExit(f"the tokenizer has no {token}\nhint: train it again with `train_practice.py tokenizer`")
    return int(number)
