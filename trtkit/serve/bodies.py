"""The bodies of ``/v1/chat/completions`` and ``/v1/completions``, checked: all that is wrong with one is said at once.

Field names and meanings are OpenAI's (https://platform.openai.com/docs/api-reference); ``top_k`` (-1 is off, too),
``min_p``, ``stop_token_ids``, ``ignore_eos`` and ``return_token_ids`` are those of other open servers. What it does not
do is refused, unless the value asks for nothing; fields that change no token (``user``, ``metadata``, ...) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from trtkit.files import nearest
from trtkit.serve.replies import written

__all__ = ["MOST_CHOICES", "REFUSED", "ChatBody", "CompletionBody", "Message", "Sampled", "StreamOptions"]

MOST_CHOICES = 256
REFUSED = "refused"
"""Kind of the complaints that say themselves which field they are about."""
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "skip_special_tokens": (False,),
    "spaces_between_special_tokens": (True, False),  # there is nothing between them here
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({}, {"enable_thinking": True}),
}
"""Fields that are not supported, and the values that ask for nothing (null does too)."""


def _unicode(text: str) -> str:
    """JSON can hold half of a character (``"\\ud83d"``, where clients cut texts anywhere); no tokenizer takes that."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticKnownError("string_unicode") from None
    return text


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Seed = Annotated[Whole, AfterValidator(lambda seed: seed % (1 << 64))]
"""As engines take it: negative ones stand for others."""
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True), AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_Strict):
    """``stream_options``."""

    include_usage: Flag = False
    """One more chunk at the end, with the token counts."""


class _Part(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation."""

    role: Text
    content: Text | list[_Part] | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    """As this server writes it; templates of reasoning models drop earlier thoughts, so it is ignored."""

    @property
    def text(self) -> str:
        """The content as one string."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Sampled(_Strict):
    """What both kinds of body have."""

    model: Text | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    n: Annotated[Whole, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=16)] | None = None
    ignore_eos: Flag | None = None
    return_token_ids: Flag | None = None
    """Say the ids of the prompt and of each token beside the text."""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Our complaints beside the library's, which alone would come first or not at all."""
        if not isinstance(data, dict):
            return handler(data)
        kept, wrong = _sorted_out(data, cls.model_fields)
        details = [InitErrorDetails(type=PydanticCustomError(REFUSED, "{it}", {"it": it}), input=data) for it in wrong]
        try:
            body = handler(kept)
        except ValidationError as problem:
            details += [
                InitErrorDetails(type=it["type"], loc=it["loc"], input=it["input"], ctx=it.get("ctx", {}))
                for it in problem.errors()
            ]
        else:
            if not details:
                return body
        raise ValidationError.from_exception_data(cls.__name__, details)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    samples: Annotated[Whole, Field(ge=1, le=4096)] | None = None
    """For the voted model: samples of the problem."""
    seconds: Annotated[Number, Field(gt=0)] | None = None
    """For the voted model: the time after which the votes are counted as they are."""

    @property
    def longest(self) -> int | None:
        """Most tokens of a choice, None for as many as fit."""
        given = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(given, default=None)


class CompletionBody(Sampled):
    """``POST /v1/completions``."""

    prompt: Text | list[Text] | list[Whole] | list[list[Whole]]
    max_tokens: Annotated[Whole, Field(ge=1)] = 16
    logprobs: Annotated[Whole, Field(ge=0, le=0)] | None = None
    """0: the log-probability of each token; alternatives are not given."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each a text or its token ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        ids = [item for item in given if isinstance(item, int)]
        return [ids] if ids else [item for item in given if not isinstance(item, int)]


def _sorted_out(data: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What is left of a body without the fields that change nothing, and complaints about those that are refused."""
    wrong, kept = [], {}
    for name, value in data.items():
        if name in known:
            kept[name] = value
        elif name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                wrong.append(f"{name}: not supported; leave it out")
        elif name not in _IGNORED:
            wrong.append(f"{written(name)}: unknown field{nearest(name, known)}")
    if data.get("stream_options") is not None and not data.get("stream"):
        wrong.append("stream_options: only with stream")
    return kept, wrong
