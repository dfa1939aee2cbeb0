"""The tokenizer of a checkpoint: problem text to prompt ids, ids to text, and the ids that end a thought.

Everything that feeds text to a model goes through here (solving, calibration, drafter training), so that all of it sees
the deployed chat template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from trtkit.errors import CheckpointError, ConfigError, InputError
from trtkit.files import nearest, read_json

__all__ = [
    "THINK_END",
    "THINK_START",
    "VARIANTS",
    "Chat",
    "PromptVariant",
    "Thought",
    "load_chat",
    "prompt_names",
    "variant_named",
]

THINK_START = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """What a model writes around its thought."""

    opens: str = THINK_START
    closes: str = THINK_END
    ends: bool = True
    """A sample may end where it closes. Not where the thought is several messages and the answer is the last one."""


_OTHER_THOUGHTS = (
    Thought(opens="<seed:think>", closes="</seed:think>"),
    Thought(opens="[THINK]", closes="[/THINK]"),
    Thought(
        opens="<|channel|>analysis<|message|>",
        closes="<|end|><|start|>assistant<|channel|>final<|message|>",
        ends=False,
    ),
)
"""Of Seed-OSS, of Magistral from 2507 on, and harmony, which gpt-oss speaks."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptVariant:
    """One way to ask. ``user`` holds ``{problem}``, filled by plain replacement: other braces stay as they are."""

    name: str
    user: str
    system: str | None = None
    tools: bool = False
    """It tells the model that its Python code is run (``trtkit solve --tools python``)."""


VARIANTS: dict[str, PromptVariant] = {
    variant.name: variant
    for variant in (
        # The Fast-Math model cards' prompt.
        PromptVariant(name="solve", user="Solve the problem, and put the answer in \\boxed{}. {problem}"),
        # The R1 line's recommendation, also Fast-Math's SFT prompt.
        PromptVariant(
            name="reason", user="Please reason step by step, and put your final answer within \\boxed{}.\n{problem}"
        ),
        # Fast-Math's GRPO system prompt, with single braces and without the name of the base model.
        PromptVariant(
            name="system",
            system="You are a helpful and harmless assistant. You should think step-by-step. "
            "Return final answer within \\boxed{}.",
            user="{problem}",
        ),
        # OpenMath-Nemotron's evaluation prompt.
        PromptVariant(
            name="nemotron",
            system="",
            user="Solve the following math problem. Make sure to put the answer (and only answer) inside "
            "\\boxed{}.\n\n{problem}",
        ),
        # The block formats of the OpenMath models' tool prompt, in other words.
        PromptVariant(
            name="python",
            user="Solve the problem, and put the answer in \\boxed{}. You may have Python code run: write it as\n"
            "```python\n...\n```\nand what it prints is shown to you as\n```output\n...\n```\nbefore you go on. Do not "
            "write output blocks yourself.\n\n{problem}",
            tools=True,
        ),
    )
}


def variant_named(name: str) -> PromptVariant:
    """The prompt variant called ``name``; :class:`ConfigError` with the nearest valid name otherwise."""
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown prompt variant {name!r}{nearest(name, VARIANTS)}", hint=f"one of: {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


def prompt_names(*, tools: bool) -> tuple[str, ...]:
    """The variants that tell the model that its code runs, or those that do not."""
    return tuple(name for name, variant in VARIANTS.items() if variant.tools == tools)


class Chat:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        """Ids that end an assistant turn."""
        template = str(tokenizer.chat_template)
        self.thought = next((thought for thought in _OTHER_THOUGHTS if thought.opens in template), Thought())
        """``<think>``, unless the chat template has another word for it."""
        self.think_end = tuple(tokenizer.encode(self.thought.closes, add_special_tokens=False))
        """Ids that close it: one where the vocabulary has it, else the several that plain BPE gives (neighbouring
        characters may change the split then, so match the text, not the ids)."""

    @property
    def template_digest(self) -> str:
        """SHA-256 of the chat template: a draft head is good for the format of text that it was trained on."""
        return hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of ids that the tokenizer can produce."""
        return len(self._tokenizer)

    def prompt(self, problem: str, variant: PromptVariant) -> tuple[int, ...]:
        """Ids of the chat turn that asks ``problem``, up to where the model's answer begins."""
        messages = [{"role": "system", "content": variant.system}] if variant.system is not None else []
        messages.append({"role": "user", "content": variant.user.replace("{problem}", problem)})
        return self.conversation(messages)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Ids of turns with ``role`` and ``content``, up to where the model's next answer begins.

        Raises :class:`InputError` where the chat template refuses them.
        """
        try:
            ids = self._tokenizer.apply_chat_template(
                list(map(dict, messages)), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as problem:
            raise InputError(f"the chat template refuses these messages: {problem}") from None
        return tuple(ids)

    def thinking(self, prompt: Sequence[int]) -> bool:
        """The chat template has opened the thought already, so that the answer does not begin with ``<think>``."""
        return self.decode(prompt[-16:]).rstrip().endswith(self.thought.opens)

    def completion(self, prompt: Sequence[int], solution: str) -> tuple[int, ...]:
        """Ids of a worked solution as the model would have written it after ``prompt``, with the end of turn.

        Solutions start with ``<think>``; where the template has already opened the thought, that tag is dropped.
        """
        if self.thinking(prompt) and solution.lstrip().startswith(THINK_START):
            solution = solution.lstrip().removeprefix(THINK_START).lstrip("\n")
        ids = self._tokenizer.encode(solution, add_special_tokens=False)
        return (*ids, *self.eos_ids[:1])

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text`` on its own, as a part of an answer: nothing is added around it."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens included (``</think>`` must stay visible)."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def load_chat(directory: Path) -> Chat:
    """The tokenizer in ``directory``. Raises :class:`CheckpointError` when it or its chat template is missing."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            "no tokenizer found", where=str(directory), hint=f"expected one of: {', '.join(_TOKENIZER_FILES)}"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as problem:  # transformers raises anything from OSError to KeyError for a broken file
        raise CheckpointError(f"the tokenizer cannot be read: {problem}", where=str(directory)) from problem
    if not tokenizer.chat_template:
        raise CheckpointError(
            "the tokenizer has no chat template",
            where=str(directory),
            hint="add the chat_template of the model card to tokenizer_config.json",
        )
    return Chat(tokenizer, _eos_ids(directory, tokenizer))


def _eos_ids(directory: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's own first, which ends a turn; Llama 3's generation config names the end of a text first."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = directory / "generation_config.json"
    if path.is_file():
        listed = read_json(path, CheckpointError).get("eos_token_id")
        ids += listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else []
    return ids
