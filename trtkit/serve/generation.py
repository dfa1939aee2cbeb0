"""A request's choices, run as rows of the shared engine: pieces of text as they come, or whole."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from trtkit.chat import Chat
from trtkit.errors import EngineError
from trtkit.runtime.api import FinishReason, Request, SamplingParams, StepOutput
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.replies import Piece, Scored
from trtkit.serve.text_stream import TextStream, ThoughtSplitter
from trtkit.solve.prompts import sample_seed

__all__ = ["Asked", "Generation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be generated."""

    name: str
    """Of the request; nobody else's."""
    prompts: tuple[tuple[int, ...], ...]
    choices: int
    """Samples of each prompt."""
    sampling: SamplingParams
    max_tokens: int | None
    """None: as many as fit."""
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    """Beside the ends of a turn; they are no text either."""
    ignore_eos: bool = False
    seed: int | None = None
    """None: another one each time."""
    logprobs: bool = False
    splits: bool = False
    """Keep the thought apart from the text."""
    thinking: bool = False
    """The prompt has opened the thought."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """One choice under way."""

    index: int
    stream: TextStream
    splitter: ThoughtSplitter | None
    offset: int = 0
    counted: int = 0
    finish: str | None = None


class Generation:
    """The choices of one request."""

    def __init__(self, engine: EngineThread, chat: Chat, asked: Asked) -> None:
        self.asked = asked
        self._engine = engine
        self._chat = chat
        self._rows: dict[str, _Row] = {}
        self._inbox: asyncio.Queue[tuple[Sequence[StepOutput], EngineError | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def begin(self) -> None:
        """Submit them. Raises :class:`RequestError` when one is refused, :class:`EngineError` from a broken engine."""
        try:
            requests = _requests(self._engine, self._chat, self.asked)
            waiting = [asyncio.wrap_future(self._engine.submit(request, self._deliver)) for request in requests]
            for index, request in enumerate(requests):
                self._rows[request.id] = _row(self._chat, self.asked, index)
            await asyncio.gather(*waiting)
        except BaseException:
            self.stop()
            raise

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices, in the order in which they come; each choice's last one has its ``finish``.

        Close it (``contextlib.aclosing``) to cancel what is left. Raises :class:`EngineError` when the engine fails.
        """
        try:
            while self._rows:
                outputs, problem = await self._inbox.get()
                if problem is not None:
                    raise problem
                for output in outputs:
                    row = self._rows.get(output.request_id)
                    if row is None:  # its text had come to an end before
                        continue
                    yield _piece(self._chat, row, output, scores=self.asked.logprobs)
                    if row.finish is not None:
                        self._rows.pop(output.request_id, None)
                        if output.finish is None:
                            self._engine.cancel(output.request_id)
        finally:
            self.stop()

    async def in_full(self) -> list[Piece]:
        """Each choice as one piece. Raises as :meth:`pieces`."""
        parts: dict[int, list[Piece]] = {row.index: [] for row in self._rows.values()}
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                parts[piece.index].append(piece)
        return [_together(index, pieces, self.asked) for index, pieces in parts.items()]

    def stop(self) -> None:
        """Cancel what is left; :meth:`pieces` ends."""
        for name in self._rows:
            self._engine.cancel(name)
        self._rows.clear()
        self._inbox.put_nowait(((), None))

    def _deliver(self, outputs: Sequence[StepOutput], problem: EngineError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (outputs, problem))


def _together(index: int, pieces: Sequence[Piece], asked: Asked) -> Piece:
    return Piece(
        index=index,
        text="".join(piece.text for piece in pieces),
        thought="".join(piece.thought or "" for piece in pieces) if asked.splits else None,
        scored=tuple(it for piece in pieces for it in piece.scored or ()) if asked.logprobs else None,
        finish=pieces[-1].finish,
        tokens=sum(piece.tokens for piece in pieces),
    )


def _requests(engine: EngineThread, chat: Chat, asked: Asked) -> list[Request]:
    """One request per choice. The samples of a prompt share its KV blocks."""
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    single = [ids[0] for stop in asked.stops if len(ids := chat.encode(stop)) == 1 and chat.decode(ids) == stop]
    stop_ids = tuple(dict.fromkeys((*(() if asked.ignore_eos else chat.eos_ids), *single, *asked.stop_ids)))
    return [
        Request(
            id=f"{asked.name}/{place}/{choice}",
            prompt=prompt,
            sampling=asked.sampling,
            stop_ids=stop_ids,
            max_tokens=asked.max_tokens or max(engine.max_total_tokens - len(prompt), 1),
            seed=sample_seed(seed, str(place), choice),
            logprobs=asked.logprobs,
        )
        for place, prompt in enumerate(asked.prompts)
        for choice in range(asked.choices)
    ]


def _row(chat: Chat, asked: Asked, index: int) -> _Row:
    return _Row(
        index=index,
        stream=TextStream(chat.decode, asked.stops),
        splitter=ThoughtSplitter(opened=asked.thinking) if asked.splits else None,
    )


def _piece(chat: Chat, row: _Row, output: StepOutput, *, scores: bool) -> Piece:
    """What ``output`` adds to a choice."""
    tokens = output.tokens
    said = tokens[:-1] if output.finish is FinishReason.STOP else tokens  # the stop id itself is no text
    text = row.stream.push(said)
    if row.stream.stopped:
        row.finish = "stop"
        tokens = tokens[: row.stream.tokens - row.counted]
    elif output.finish is not None:
        row.finish = "stop" if output.finish is FinishReason.STOP else "length"
        text += row.stream.finish()
    scored = None
    if scores:
        shown = said[: len(tokens)]
        scored = tuple(
            Scored(text=chat.decode([token]), logprob=logprob)
            for token, logprob in zip(shown, output.logprobs, strict=False)
        )
    row.counted += len(tokens)
    offset, thought = row.offset, None
    row.offset += sum(len(it.text) for it in scored or ())
    if row.splitter is not None:
        thought, text = row.splitter.push(text)
        if row.finish is not None:
            more = row.splitter.finish()
            thought, text = thought + more[0], text + more[1]
    return Piece(
        index=row.index, text=text, thought=thought, scored=scored, offset=offset, finish=row.finish, tokens=len(tokens)
    )
