"""The HTTP interface: which path does what. Whatever speaks like OpenAI's clients is served unchanged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from trtkit import __version__
from trtkit.errors import EngineError, InputError, TrtkitError
from trtkit.files import nearest
from trtkit.log import format_seconds, logger
from trtkit.serve.bodies import REFUSED, ChatBody, CompletionBody
from trtkit.serve.generation import Asked, Generation
from trtkit.serve.metrics import exposition
from trtkit.serve.replies import ChatReplies, CompletionReplies, Piece, Replies, error_reply, usage
from trtkit.serve.service import OverloadError, Service
from trtkit.serve.voting import votes_of

__all__ = ["make_app"]

T = TypeVar("T")
_OPEN_PATHS = ("/health",)
"""Without the key: for what watches the server."""
_KIND = re.compile(r"\[|^(constrained-)?(str|int)$")
"""How pydantic names one of the kinds that a field may have."""
_BEARER = re.compile(r"^bearer +", re.IGNORECASE)
_GONE = 499
"""The client went away before it was answered; nobody reads this."""


def make_app(service: Service) -> FastAPI:
    """The application, for any ASGI server with one worker process."""
    app = FastAPI(
        title="trtkit", version=__version__, summary="Math-reasoning models, and votes of their samples.",
        docs_url=None, redoc_url=None,  # those pages come from elsewhere
        dependencies=[] if service.key is None else [Depends(_keeper(service.key))],
    )  # fmt: skip
    _answer_errors(app)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, 503 when the engine is gone."""
        return Response(status_code=503 if service.engine.broken else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        text, kind = exposition(await asyncio.wrap_future(service.engine.stats()), service.engine.unfinished)
        return Response(text, media_type=kind)

    @app.get("/v1/models")
    async def models() -> Response:
        """The model, and the one that answers by vote."""
        cards = [_card(service, name) for name in service.models]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        return JSONResponse(_card(service, _known(service, name)))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Samples of an answer to a conversation; of the voted model, what a problem's samples vote for."""
        name, model = _name("chatcmpl"), _known(service, body.model)
        replies = ChatReplies(id=name, created=int(time.time()), model=model)
        if model != service.name:
            return await _unless_gone(request, _voted(service, body, replies))
        asked = service.chat_asked(name, body)
        return await _answered(service, asked, replies, request, stream=bool(body.stream), counts=body.include_usage)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Samples of what comes after texts or token ids."""
        name, model = _name("cmpl"), _known(service, body.model)
        if model != service.name:
            raise InputError(f"{model} answers problems", hint="POST /v1/chat/completions")
        replies = CompletionReplies(id=name, created=int(time.time()), model=model)
        asked = service.completion_asked(name, body)
        return await _answered(service, asked, replies, request, stream=bool(body.stream), counts=body.include_usage)

    return app


async def _answered(
    service: Service, asked: Asked, replies: Replies, request: Request, *, stream: bool, counts: bool
) -> Response:
    """The choices, whole or as server-sent events."""
    service.check_room(len(asked.prompts) * asked.choices)
    generation = Generation(service.engine, service.chat, asked)
    await generation.begin()  # what the engine refuses is refused with a status, not in the middle of a stream
    if stream:
        return StreamingResponse(_events(generation, replies, counts=counts), media_type="text/event-stream")
    began = time.monotonic()
    pieces = await _unless_gone(request, generation.in_full())
    if isinstance(pieces, Response):
        return pieces
    used = _usage(asked, sum(piece.tokens for piece in pieces))
    _note(asked.name, len(pieces), used, began)
    return JSONResponse(replies.whole(pieces, used))


async def _events(generation: Generation, replies: Replies, *, counts: bool) -> AsyncGenerator[str, None]:
    """The stream's events. An engine that fails in the middle is an event too."""
    began, tokens, asked = time.monotonic(), 0, generation.asked
    choices = len(asked.prompts) * asked.choices
    try:
        for document in replies.opening(choices, asked.prompts[0] if asked.token_ids else None):
            yield _event(document)
        async with contextlib.aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                tokens += piece.tokens
                if _tells(piece):
                    yield _event(replies.chunk(piece))
    except EngineError as problem:
        yield _event(error_reply(problem)[1])
    else:
        used = _usage(asked, tokens)
        _note(asked.name, choices, used, began)
        if counts:
            yield _event(replies.counts(used))
    finally:
        generation.stop()
    yield "data: [DONE]\n\n"


async def _voted(service: Service, body: ChatBody, replies: ChatReplies) -> Response:
    """The answer of the vote, in a box, as a whole or as one event."""
    text, options, prompt_tokens = service.voted(body)
    service.check_room(1)
    began = time.monotonic()
    solution = await service.voting.solve(replies.id, text, options)
    if solution.error is not None:
        raise InputError(solution.error)
    answer = solution.answer
    piece = Piece(index=0, text="" if answer is None else f"\\boxed{{{answer.key}}}", finish="stop")
    used = usage(prompt_tokens, solution.tokens)
    _note(replies.id, len(solution.attempts), used, began)
    if not body.stream:
        return JSONResponse({**replies.whole([piece], used), "vote": votes_of(solution)})
    events = [*replies.opening(1), {**replies.chunk(piece), "vote": votes_of(solution)}]
    events += [replies.counts(used)] if body.include_usage else []
    return Response("".join(map(_event, events)) + "data: [DONE]\n\n", media_type="text/event-stream")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """The result of ``work``, which is cancelled when the client goes away."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else Response(status_code=_GONE)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(service: Service, name: str) -> dict[str, Any]:
    """An entry of the list of models."""
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "trtkit", **service.source.card,
        "max_model_len": service.engine.max_total_tokens, "max_rows": service.engine.max_rows,
    }  # fmt: skip


def _known(service: Service, name: str | None) -> str:
    """``name``, or the model itself where a request names none."""
    if name is None or name in service.models:
        return name or service.name
    models = ", ".join(service.models)
    raise HTTPException(404, f"no model {name!r}{nearest(name, service.models)}; there are: {models}")


def _keeper(key: str) -> Callable[[Request], Awaitable[None]]:
    async def keep_out(request: Request) -> None:
        given = _BEARER.sub("", request.headers.get("authorization", ""))
        if request.url.path not in _OPEN_PATHS and not secrets.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "the API key is missing or wrong (Authorization: Bearer KEY)")

    return keep_out


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, and none without words."""

    @app.exception_handler(TrtkitError)
    async def known(_: Request, problem: TrtkitError) -> Response:
        return _refusal(problem, status=429 if isinstance(problem, OverloadError) else None)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, problem: RequestValidationError) -> Response:
        wrong = [_complaint(error) for error in problem.errors()]
        return _refusal(InputError("the request's body is wrong", offenders=list(dict.fromkeys(wrong))))

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, problem: HTTPException) -> Response:
        return _refusal(InputError(str(problem.detail)), status=problem.status_code)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, problem: Exception) -> Response:
        return _refusal(EngineError(f"{type(problem).__name__}: {problem}"), status=500)


def _complaint(error: Mapping[str, Any]) -> str:
    """``messages.0.role: Field required``; what our own checks say stands as it is."""
    if error["type"] == REFUSED:
        return str(error["msg"])
    # A field of several kinds has one complaint for each, with the kind in its place.
    place = ".".join(part for part in map(str, error["loc"]) if part != "body" and not _KIND.search(part))
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _refusal(problem: TrtkitError, *, status: int | None = None) -> Response:
    code, body = error_reply(problem, status=status)
    return JSONResponse(body, status_code=code)


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _tells(piece: Piece) -> bool:
    """Whether a chunk is worth sending: text may be held back, tokens that were asked for are not."""
    return bool(piece.text or piece.thought or piece.scored or piece.ids or piece.finish)


def _usage(asked: Asked, tokens: int) -> dict[str, int]:
    return usage(sum(map(len, asked.prompts)), tokens)


def _note(name: str, choices: int, used: Mapping[str, int], began: float) -> None:
    tokens, seconds = used["completion_tokens"], time.monotonic() - began
    logger.debug("%s: %d sample(s), %d tokens in %s", name, choices, tokens, format_seconds(seconds))


def _name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
