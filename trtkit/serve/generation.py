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
    """The first choice's own, from which those of the others are made. None: another one each time."""
    logprobs: bool = False
    token_ids: bool = False
    """Say which tokens the prompts and the choices are."""
    splits: bool = False
    """Keep the thought apart from the text."""
    thinking: bool = False
    """The prompt has opened the thought."""


@dataclass(slots=True, kw_only=True)
class _Row:
    """One choice under way."""

    index: int
    prompt: tuple[int, ...] | None
    """Where it is still to be said."""
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
        self._endings = _endings(chat, asked)
        self._rows: dict[str, _Row] = {}
        self._inbox: asyncio.Queue[tuple[Sequence[StepOutput], EngineError | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def begin(self) -> None:
        """Submit them. Raises :class:`RequestError` when one is refused, :class:`EngineError` from a broken engine."""
        try:
            requests = _requests(self._engine, self.asked, tuple(self._endings))
            waiting = [asyncio.wrap_future(self._engine.submit(request, self._deliver)) for request in requests]
            for index, request in enumerate(requests):
                self._rows[request.id] = _row(self._chat, self.asked, index, request.prompt)
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
                    yield self._piece(row, output)
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

    def _piece(self, row: _Row, output: StepOutput) -> Piece:
        """What ``output`` adds to a choice."""
        tokens = output.tokens
        said = tokens[:-1] if output.finish is FinishReason.STOP else tokens  # the stop id itself is no text
        text = row.stream.push(said)
        stop: int | str | None = row.stream.stop
        if stop is not None:
            row.finish = "stop"
            tokens = tokens[: row.stream.tokens - row.counted]
        elif output.finish is FinishReason.STOP:
            row.finish, stop = "stop", self._endings[tokens[-1]]
            text += row.stream.finish()
        elif output.finish is not None:
            row.finish = "length"
            text += row.stream.finish()
        scored = None
        if self.asked.logprobs:
            # One for each of the ids that are told; else for those that are text.
            shown = tokens if self.asked.token_ids else said[: len(tokens)]
            scored = tuple(
                Scored(text=self._chat.decode([token]), logprob=logprob)
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
        prompt, row.prompt = row.prompt, None
        return Piece(
            index=row.index, text=text, thought=thought, scored=scored, offset=offset, finish=row.finish, stop=stop,
            tokens=len(tokens), ids=tokens if self.asked.token_ids else None, prompt=prompt,
        )  # fmt: skip


def _together(index: int, pieces: Sequence[Piece], asked: Asked) -> Piece:
    return Piece(
        index=index,
        text="".join(piece.text for piece in pieces),
        thought="".join(piece.thought or "" for piece in pieces) if asked.splits else None,
        scored=tuple(it for piece in pieces for it in piece.scored or ()) if asked.logprobs else None,
        finish=pieces[-1].finish,
        stop=pieces[-1].stop,
        tokens=sum(piece.tokens for piece in pieces),
        ids=tuple(it for piece in pieces for it in piece.ids or ()) if asked.token_ids else None,
        prompt=pieces[0].prompt,
    )


def _endings(chat: Chat, asked: Asked) -> dict[int, int | str | None]:
    """The ids that end a choice, each with what the client is told of it: the id, the stop text that it is, or nothing
    where a turn ends."""
    endings: dict[int, int | str | None] = {} if asked.ignore_eos else dict.fromkeys(chat.eos_ids)
    for it in asked.stop_ids:
        endings.setdefault(it, it)
    for stop in asked.stops:
        if len(ids := chat.encode(stop)) == 1 and chat.decode(ids) == stop:
            endings.setdefault(ids[0], stop)
    return endings


def _requests(engine: EngineThread, asked: Asked, stop_ids: tuple[int, ...]) -> list[Request]:
    """One request per choice. The samples of a prompt share its KV blocks."""
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    return [
        Request(
            id=f"{asked.name}/{place}/{choice}",
            prompt=prompt,
            sampling=asked.sampling,
            stop_ids=stop_ids,
            max_tokens=asked.max_tokens or max(engine.max_total_tokens - len(prompt), 1),
            # The first one's is the client's own: who asks for samples one by one chooses all their seeds.
            seed=sample_seed(seed, str(place), choice) if place or choice else seed,
            logprobs=asked.logprobs,
        )
        for place, prompt in enumerate(asked.prompts)
        for choice in range(asked.choices)
    ]


def _row(chat: Chat, asked: Asked, index: int, prompt: tuple[int, ...]) -> _Row:
    return _Row(
        index=index,
        prompt=prompt if asked.token_ids else None,
        stream=TextStream(chat.decode, asked.stops),
        splitter=ThoughtSplitter(chat.thought, opened=asked.thinking) if asked.splits else None,
    )
