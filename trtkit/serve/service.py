"""``Service``: what a server serves, and how a request's body becomes work for the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from trtkit.chat import Chat, variant_named
from trtkit.errors import InputError, RequestError, TrtkitError
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.sources import Source
from trtkit.serve.bodies import MOST_CHOICES, ChatBody, CompletionBody, Sampled
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.generation import Asked
from trtkit.serve.voting import Voting
from trtkit.solve.options import SolveOptions

__all__ = ["VOTED", "OverloadError", "Reasoning", "Service"]

Reasoning: TypeAlias = Literal["inline", "separate"]
VOTED = ":maj"
"""After a model's name: the answer is the vote of many samples."""
_OFF_ELSEWHERE = -1
"""What other servers call a ``top_k`` that keeps all."""
_CHARACTERS_PER_TOKEN = 32
"""No tokenizer packs text denser on average. Longer text is refused without tokenizing megabytes."""


class OverloadError(TrtkitError):
    """More is under way than may wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One engine, its tokenizer, and the options that requests may override."""

    engine: EngineThread
    voting: Voting
    chat: Chat
    source: Source
    name: str
    """What clients call the model."""
    options: SolveOptions
    """Of the voted model; its sampling is everybody's where a request does not say."""
    reasoning: Reasoning = "inline"
    """Whether the thought is a part of the content, or ``reasoning_content``."""
    most_unfinished: int = 1024
    """Rows under way or waiting from which on requests are turned away."""
    key: str | None = None
    """What clients must present as bearer token."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""

    @property
    def models(self) -> tuple[str, str]:
        """The names that clients may ask for: single samples, and votes."""
        return self.name, self.name + VOTED

    def check_room(self, choices: int) -> None:
        """Raises :class:`OverloadError` where so many more rows would wait too long."""
        unfinished = self.engine.unfinished
        if unfinished and unfinished + choices > self.most_unfinished:
            raise OverloadError(
                f"{unfinished} samples run or wait, at most {self.most_unfinished} may", hint="try again later"
            )

    def chat_asked(self, name: str, body: ChatBody) -> Asked:
        """A conversation. Raises :class:`InputError` and :class:`RequestError`."""
        extra = [it for it in ("samples", "seconds") if getattr(body, it) is not None]
        if extra:
            raise RequestError(f"{' and '.join(extra)}: only with the model {self.name}{VOTED}")
        self._check_text(sum(len(message.text) for message in body.messages))
        prompt = self.chat.conversation([{"role": it.role, "content": it.text} for it in body.messages])
        splits = self.reasoning == "separate"
        asked = self._asked(name, body, [prompt], body.longest, logprobs=bool(body.logprobs))
        return replace(asked, splits=splits, thinking=splits and self.chat.thinking(prompt))

    def completion_asked(self, name: str, body: CompletionBody) -> Asked:
        """Texts or token ids to go on with. Raises :class:`InputError` and :class:`RequestError`."""
        prompts = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                self._check_text(len(prompt))
            prompts.append(self.chat.encode(prompt) if isinstance(prompt, str) else tuple(prompt))
        if not prompts:
            raise RequestError("prompt: there is none")
        if len(prompts) * (body.n or 1) > MOST_CHOICES:
            raise RequestError(f"{len(prompts) * (body.n or 1)} choices in all: at most {MOST_CHOICES}")
        return self._asked(name, body, prompts, body.max_tokens, logprobs=body.logprobs is not None)

    def voted(self, body: ChatBody) -> tuple[str, SolveOptions, int]:
        """The problem's text, how it is solved, and the tokens of its prompts.

        Raises :class:`InputError`, :class:`RequestError` and :class:`UsageError`.
        """
        of_samples = ("stop", "stop_token_ids", "logprobs", "ignore_eos", "return_token_ids")
        idle = [it for it in of_samples if getattr(body, it)] + ["n"] * ((body.n or 1) > 1)
        if idle:
            raise InputError(f"{', '.join(idle)}: not for the voted model")
        if len(body.messages) != 1 or body.messages[0].role != "user":
            raise InputError(f"{self.name}{VOTED} takes one user message, the problem: it asks with prompts of its own")
        given: dict[str, Any] = {
            "samples": body.samples, "time_limit": body.seconds, "max_tokens": body.longest, "seed": body.seed,
        }  # fmt: skip
        options = replace(
            self.options, sampling=self._sampling(body), **{name: it for name, it in given.items() if it is not None}
        )
        self.source.notices(options.sampling, logprobs=options.wants_logprobs)
        text = body.messages[0].text
        self._check_text(len(text))
        variants = dict.fromkeys(options.variants[: options.samples])
        prompts = [self.chat.prompt(text, variant_named(name)) for name in variants]
        self._check_prompts(prompts)
        return text, options, sum(map(len, prompts))

    def _asked(
        self, name: str, body: Sampled, prompts: Sequence[tuple[int, ...]], longest: int | None, *, logprobs: bool
    ) -> Asked:
        sampling = self._sampling(body)
        self.source.notices(sampling, logprobs=logprobs)
        self._check_prompts(prompts)
        return Asked(
            name=name, prompts=tuple(prompts), choices=body.n or 1, sampling=sampling, max_tokens=longest,
            stops=body.stops, stop_ids=tuple(body.stop_token_ids or ()), ignore_eos=bool(body.ignore_eos),
            seed=body.seed, logprobs=logprobs, token_ids=bool(body.return_token_ids),
        )  # fmt: skip

    def _sampling(self, body: Sampled) -> SamplingParams:
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        if given["top_k"] == _OFF_ELSEWHERE:
            given["top_k"] = 0
        return replace(self.options.sampling, **{name: it for name, it in given.items() if it is not None})

    def _check_text(self, characters: int) -> None:
        if characters > _CHARACTERS_PER_TOKEN * self.engine.max_total_tokens:
            raise RequestError(f"{characters:,} characters, more than fit into any prompt")

    def _check_prompts(self, prompts: Sequence[tuple[int, ...]]) -> None:
        room = self.engine.max_total_tokens
        wrong = [
            f"a prompt of {len(prompt)} tokens: the engine takes {room} with the answer"
            for prompt in prompts
            if len(prompt) >= room
        ]
        if wrong:
            raise RequestError("too long", offenders=sorted(set(wrong)))
