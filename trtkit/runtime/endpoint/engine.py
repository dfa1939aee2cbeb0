"""``EndpointEngine``: the requests of a run as streamed completions of a server.

Every sample is one HTTP request of its own, so that each can be ended by itself; samples of a problem have the same
prompt, which servers with a prefix cache compute once. A connection that is lost in the middle of a sample costs what
the server had not said yet: the sample goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trtkit.chat import Chat
from trtkit.errors import EngineError
from trtkit.log import logger
from trtkit.runtime.api import EngineStats, FinishReason, Request, StepOutput
from trtkit.runtime.endpoint.client import Chunk, Client, Event, Lost, Refused
from trtkit.runtime.endpoint.dialects import Said, body_of, check_sampling
from trtkit.runtime.endpoint.server import KEY_VARIABLE, Endpoint, Server
from trtkit.runtime.restarting import RestartingEngine, Started, joined

__all__ = ["PATIENCE_SECONDS", "ROWS", "EndpointEngine", "open_endpoint"]

ROWS = 64
"""Requests that are open at once where nobody says how many the server runs."""
PATIENCE_SECONDS = 180.0
"""How long no sample may go on before the run ends: servers that are started anew load for minutes."""
_WAIT_SECONDS = 0.1
"""Longest wait of one step, so that Ctrl-C and clocks are heard."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 15.0
_UNKNOWN_TOTAL = 1 << 24
"""Where neither the server nor the user says how long a request may be, the server decides."""
_PROOF_TOKENS = 48
_ABOUT_ONE = (400, 413, 422)
"""Statuses that are about one request, where others were taken: it may be too long for a server that does not say."""
_ENDINGS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


@dataclass(slots=True)
class _Trouble:
    """A request that was lost and has not been heard of since."""

    since: float
    tries: int = 0


@dataclass(slots=True)
class _Proof:
    """What one stream has said both ways, to see that both have the same tokenizer."""

    handle: int
    ids: list[int] = field(default_factory=list)
    text: str = ""


def open_endpoint(
    endpoint: Endpoint, server: Server, chat: Chat, *, rows: int | None = None, total_tokens: int | None = None,
    patient: bool = False,
) -> EndpointEngine:  # fmt: skip
    """An engine on a server that :func:`trtkit.runtime.endpoint.server.look_at` has looked at.

    ``total_tokens`` is the longest request where the server does not say. ``patient``: see :class:`EndpointEngine`.
    Raises :class:`MissingDependency`.
    """
    rows = rows or endpoint.rows or server.rows or ROWS
    total = server.total_tokens or total_tokens or _UNKNOWN_TOTAL
    client = Client(endpoint.url, key=endpoint.key, most=rows)
    return EndpointEngine(
        client, server, chat, rows=rows, total_tokens=total, seeds=endpoint.seeds, patient=patient
    )  # fmt: skip


class EndpointEngine(RestartingEngine[int]):
    """Runs requests on a server. Made by :func:`open_endpoint`."""

    def __init__(
        self, client: Client, server: Server, chat: Chat, *, rows: int, total_tokens: int, seeds: bool = True,
        patient: bool = False, patience: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """``chat`` holds the server's tokenizer; the engine closes ``client``. ``seeds``: see :class:`Endpoint`.
        ``patient``: a server that has worked is waited for without end, because the caller has a clock."""
        super().__init__()
        self._client, self._server, self._chat = client, server, chat
        self._rows, self._total_tokens, self._seeds = rows, total_tokens, seeds
        self._patient, self._patience, self._now = patient, patience, clock
        self._trouble: dict[str, _Trouble] = {}
        self._heard = -math.inf
        """When the server was last known to be at work."""
        self._proof: _Proof | None = None
        self._proven = not server.dialect.ids
        self._said_lost = self._said_away = False
        self._begun: set[int] = set()
        """Handles that have said something, and will again."""
        self._steps = self._new_tokens = self._peak_rows = 0

    @property
    def max_total_tokens(self) -> int:
        """Longest prompt + output of one request."""
        return self._total_tokens

    @property
    def max_rows(self) -> int:
        """Requests that are open at once."""
        return self._rows

    @property
    def _vocab(self) -> int:
        return self._chat.size

    def _check(self, request: Request) -> None:
        check_sampling(self._server.dialect, request.sampling, logprobs=request.logprobs)

    def _start(self, started: Started[int]) -> int:
        self._trouble.pop(started.request.id, None)
        return self._send(started, delay=0.0)

    def _send(self, started: Started[int], *, delay: float) -> int:
        request, dialect = started.request, self._server.dialect
        body = body_of(
            dialect,
            model=self._server.model,
            prompt=[*started.prompt, *started.generated],
            sampling=request.sampling,
            stop_ids=request.stop_ids,
            stop_texts=[self._chat.decode([token]) for token in request.stop_ids if token not in self._chat.eos_ids],
            ends=any(token in self._chat.eos_ids for token in request.stop_ids),
            max_tokens=started.limit - len(started.generated),
            seed=self._seed(started) if self._seeds else None,
            logprobs=request.logprobs,
        )
        return self._client.start(body, delay=delay)

    def _seed(self, started: Started[int]) -> int:
        """A server's stream of random numbers starts anew with each of its requests, and must not repeat itself."""
        return started.request.seed if self._server.dialect.exact else started.seed + started.losses

    def _stop(self, handle: int) -> None:
        self._client.stop(handle)

    def _rest(self, started: Started[int]) -> None:
        if started.handle is not None:
            self._begun.discard(started.handle)
        super()._rest(started)

    def step(self) -> Sequence[StepOutput]:
        """Wait until every row that has begun has said something, a tenth of a second at most.

        So it takes about as long as the server's own, by which a solver measures what time a token takes. A request
        that the server refuses after it has taken others ends there. Raises :class:`EngineError` when it takes none,
        or no sample of any problem has gone on for too long, or it has another tokenizer.
        """
        outputs = self._report_cancelled()
        if not self._by_handle:
            return outputs
        self._steps += 1
        self._peak_rows = max(self._peak_rows, min(len(self._by_handle), self._rows))
        events = self._client.events(0.0 if outputs else _WAIT_SECONDS, self._begun)
        return [*outputs, *joined(map(self._receive, events))]

    def _receive(self, event: Event) -> StepOutput | None:
        name = self._by_handle.get(event.handle)
        if name is None:  # the last words of a request that was cancelled, paused or has ended
            return None
        started = self._requests[name]
        if isinstance(event, Chunk):
            self._begun.add(event.handle)
            return self._take(started, event)
        if isinstance(event, Lost):
            self._heard = self._now() if event.busy else self._heard
            return self._lost(started, event.why, event.after, busy=event.busy)
        if self._new_tokens and event.status in _ABOUT_ONE:
            logger.warning("the server refuses %s, which ends there (%d): %s", name, event.status, event.why)
            return self._report(started, (), FinishReason.LENGTH)
        self._forget(name)
        raise _refusal(event, self._where)

    @property
    def _where(self) -> str:
        return f"{self._client.url}, model {self._server.model}"

    def _take(self, started: Started[int], event: Chunk) -> StepOutput | None:
        said, request = event.said, started.request
        if said.finish is not None and said.finish not in _ENDINGS:  # abort, error, cancelled, timeout
            return self._lost(started, f"the server ended it: {said.finish}", 0.0)
        self._prove(started, event)
        tokens = list(self._chat.encode(said.text) if said.ids is None else said.ids)
        logprobs = list(said.logprobs)
        finish = None if said.finish is None else _ENDINGS[said.finish]
        at = next((index for index, token in enumerate(tokens) if token in request.stop_ids), None)
        if at is not None:
            tokens, finish = tokens[: at + 1], FinishReason.STOP
            if said.finish is None:
                self._client.stop(event.handle)
        elif finish is FinishReason.STOP:
            tokens += self._unsaid_stop(started, said)
        if tokens:
            self._trouble.pop(request.id, None)
            self._heard, self._said_away = self._now(), False
        self._new_tokens += len(tokens)
        if not request.logprobs:
            logprobs = []
        elif len(logprobs) != len(tokens):  # servers leave out that of a stop id, or of text that they hold back
            logprobs = [*logprobs[: len(tokens)], *[0.0] * (len(tokens) - len(logprobs))]
        return self._report(started, tokens, finish, logprobs)

    def _unsaid_stop(self, started: Started[int], said: Said) -> list[int]:
        """The stop id that a server has left out of what it says."""
        stops, ends = started.request.stop_ids, self._chat.eos_ids
        if said.stop in stops:
            return [int(said.stop)]
        if isinstance(said.stop, str):
            named = [token for token in stops if self._chat.decode([token]) == said.stop]
        elif said.ids is None:  # it does not say: most likely the first that has not been
            before = {*started.prompt, *started.generated}
            named = [token for token in stops if token not in before or token in ends]
        else:
            named = []
        return [*named, *(token for token in stops if token in ends)][:1]

    def _prove(self, started: Started[int], event: Chunk) -> None:
        """Hold what the first stream says in ids against what it says in text."""
        said = event.said
        if self._proven:
            return
        if self._proof is None or self._proof.handle not in self._by_handle:  # it ended before it had said enough
            # From the first words of a whole character on: text lags behind ids, and some servers put halves together.
            fresh = not started.generated and not self._chat.decode(started.prompt[-4:]).endswith("\ufffd")
            self._proof = _Proof(handle=event.handle) if fresh else None
        proof = self._proof
        if proof is None or proof.handle != event.handle:
            return
        proof.ids += said.ids or ()
        proof.text += said.text
        if len(proof.ids) < _PROOF_TOKENS:
            return
        self._proven, self._proof = True, None
        ours, theirs = _bare(self._chat.decode(proof.ids)), _bare(proof.text)
        if not ours.startswith(theirs):
            raise EngineError(
                "the server's token ids say something else here: it has another tokenizer", where=self._where,
                offenders=[f"here:  {ours[:60]!r}", f"there: {theirs[:60]!r}"],
                hint="name the checkpoint that it serves with --tokenizer",
            )  # fmt: skip

    def _lost(self, started: Started[int], why: str, after: float, *, busy: bool = False) -> StepOutput | None:
        """Let it go on from where it was heard of last."""
        name, now = started.request.id, self._now()
        if started.handle is not None:
            self._client.stop(started.handle)
        self._rest(started)
        if len(started.generated) >= started.limit:
            return self._report(started, (), FinishReason.LENGTH)
        trouble = self._trouble.setdefault(name, _Trouble(since=now))
        silent = now - max(trouble.since, self._heard)
        if silent > self._patience and self._patient and self._new_tokens:
            if not self._said_away:
                logger.warning(
                    "the server has not gone on for %.0f s (%s); under a time limit it is waited for: Ctrl-C ends "
                    "the run, and the same command goes on from there", silent, why,
                )  # fmt: skip
                self._said_away = True
        elif silent > self._patience:
            self._forget(name)
            raise EngineError(
                f"the server has not gone on with {name} for {silent:.0f} s: {why}",
                where=self._where, hint="when it runs again, the same command goes on from here",
            )  # fmt: skip
        if not self._said_lost:
            logger.warning("the server let go of a sample (%s); it goes on from where it was", why)
            self._said_lost = True
        backoff = min(_FIRST_DELAY_SECONDS * 2**trouble.tries, _LONGEST_DELAY_SECONDS)
        if not (busy and self._begun):  # else it takes others of ours, and the client waits for one of them to end
            trouble.tries += 1
        started.losses += 1
        self._runs_as(started, self._send(started, delay=max(backoff, min(after, _LONGEST_DELAY_SECONDS))))
        return None

    def stats(self) -> EngineStats:
        """Counters so far, as seen from here: a server's steps and phases are its own."""
        return EngineStats(
            steps=self._steps, prompt_tokens=self._prompt_tokens, new_tokens=self._new_tokens,
            peak_rows=self._peak_rows,
        )  # fmt: skip

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def _refusal(event: Refused, where: str) -> EngineError:
    hints = {
        401: f"export {KEY_VARIABLE}=KEY",
        403: f"export {KEY_VARIABLE}=KEY",
        404: "it may have no completions interface: chat alone does not do",
    }
    return EngineError(
        f"the server refuses a request ({event.status}): {event.why}", where=where,
        hint=hints.get(event.status, "--max-tokens, --top-k 0 and --min-p 0 ask for less"),
    )  # fmt: skip


def _bare(text: str) -> str:
    """Without what tokenizers treat differently from call to call: spaces, and characters that are cut."""
    return "".join(text.replace("\ufffd", "").split())
