"""``Contest``: a problem that is open, with its votes so far and its unfinished samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtkit.chat import Chat
from trtkit.errors import RequestError
from trtkit.runtime.api import Engine, FinishReason, Request
from trtkit.solve.answers import Answer, AnswerMode, extract_box
from trtkit.solve.counting import CountingOrder
from trtkit.solve.ends import CLOSING_TOKENS, Ending, EndRules, Stream
from trtkit.solve.journal import Journal
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.prompts import sample_seed, variant_of
from trtkit.solve.records import Attempt, Solution, count_attempts
from trtkit.solve.vote import Same, Tally

__all__ = ["Contest", "Sample", "earlier_solutions", "force_answer"]

_CHARACTERS_PER_TOKEN = 32
"""No tokenizer packs text denser on average. Longer text is refused without tokenizing megabytes."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """A sample that is running or queued in the engine."""

    contest: Contest
    request_id: str
    index: int
    variant: str
    prompt_tokens: int = 0
    stream: Stream = field(default_factory=Stream)
    tool_calls: int = 0
    surplus: int = 0
    """Tokens that the engine has generated beyond the stream; it must take them back before the sample goes on."""

    @property
    def least_tokens(self) -> int:
        """The fewest tokens with which it can end: one more, unless code ran, whose output may leave no room."""
        return self.stream.generated + (self.tool_calls == 0)

    def attempt(self, text: str, ending: Ending, finish: FinishReason, now: float, *, keep_text: bool) -> Attempt:
        """The finished sample."""
        contest = self.contest
        return Attempt(
            problem_id=contest.problem.id,
            index=self.index,
            variant=self.variant,
            tokens=self.stream.generated,
            finish=finish,
            box=extract_box(text),
            seconds=contest.seconds(now),
            text=text if keep_text else None,
            ending=ending,
            forced=self.stream.forced and ending is not Ending.SETTLED,
            tool_calls=self.tool_calls,
            confidence=self.stream.confidence,
            probes=tuple(self.stream.probes),
        )


@dataclass(slots=True, kw_only=True)
class Contest:
    """An open problem."""

    problem: Problem
    began: float
    earlier_seconds: float = 0.0
    earlier_used: float = 0.0
    """Of a time limit, by earlier sessions."""
    ended: dict[int, Attempt] = field(default_factory=dict)
    """Finished samples by index, in order of arrival, those of earlier sessions included."""
    attempts: list[Attempt] = field(default_factory=list)
    """Those of them that were counted, in that order."""
    order: CountingOrder
    tally: Tally = field(default_factory=Tally)
    samples: dict[str, Sample] = field(default_factory=dict)
    """Unfinished ones that were submitted, by request id."""
    waiting: deque[int] = field(default_factory=deque)
    """Indices of samples to be submitted when others have ended."""
    dropped_tokens: int = 0
    cancelled: int = 0
    share_seconds: float | None = None
    used_seconds: float | None = None
    bank_seconds: float | None = None
    closing: bool = False
    """Its time is nearly up: its samples were made to answer."""

    @classmethod
    def begin(
        cls, problem: Problem, options: SolveOptions, journal: Journal | None, now: float, *, lanes: int | None
    ) -> Contest:
        """With the samples that earlier sessions finished, nothing counted yet; ``lanes`` of the counting order."""
        earlier = journal.history.attempts.get(problem.id, ()) if journal else ()
        return cls(
            problem=problem,
            began=now,
            earlier_seconds=max((attempt.seconds for attempt in earlier), default=0.0),
            earlier_used=max((attempt.charged_seconds for attempt in earlier), default=0.0),
            ended={attempt.index: attempt for attempt in earlier},
            order=CountingOrder(options.samples, lanes),
            tally=Tally(weighting=options.votes),
        )

    def missing(self, samples: int) -> list[int]:
        """Indices of samples that no session finished."""
        return [index for index in range(samples) if index not in self.ended]

    @property
    def outstanding(self) -> int:
        """Samples that may still be counted."""
        return len(self.samples) + len(self.waiting) + self.uncounted

    @property
    def uncounted(self) -> int:
        """Samples that have ended and wait for their turn."""
        return len(self.ended) - len(self.attempts)

    def turn(self) -> list[Attempt]:
        """The samples to be counted next, together; none while one of them has not ended yet."""
        tokens = {index: attempt.tokens for index, attempt in self.ended.items()}
        least = {sample.index: sample.least_tokens for sample in self.samples.values()}
        counted = {attempt.index for attempt in self.attempts}
        return [self.ended[index] for index in self.order.next(tokens, lambda index: least.get(index, 1), counted)]

    def count(self, attempt: Attempt, mode: AnswerMode, same: Same) -> None:
        """Let it vote."""
        self.attempts.append(attempt)
        self.tally = count_attempts([attempt], mode, same, self.tally)

    def seconds(self, now: float) -> float:
        """Time since it was opened, earlier sessions included."""
        return self.earlier_seconds + now - self.began

    def submit(self, engine: Engine, chat: Chat, options: SolveOptions, rules: EndRules, most: int) -> str | None:
        """Submit up to ``most`` waiting samples; the reason if the engine refuses the problem."""
        problem = self.problem
        if len(problem.text) > _CHARACTERS_PER_TOKEN * engine.max_total_tokens:
            return f"the problem text has {len(problem.text):,} characters, more than fit into any prompt"
        prompts: dict[str, tuple[int, ...]] = {}
        for index in [self.waiting.popleft() for _ in range(min(most, len(self.waiting)))]:
            variant = variant_of(options.variants, index)
            if variant.name not in prompts:
                prompts[variant.name] = chat.prompt(problem.text, variant)
            prompt = prompts[variant.name]
            closes = options.forces or options.probe is not None
            room = engine.max_total_tokens - len(prompt) - (rules.closing_room if closes else 0)
            request = Request(
                id=f"{problem.id}/{index}",
                prompt=prompt,
                sampling=options.sampling,
                stop_ids=rules.stop_ids,
                # Without room to be made to answer, it gets all that there is.
                max_tokens=min(options.max_tokens, room) if room > 0 else options.max_tokens,
                seed=sample_seed(options.seed, problem.id, index),
                hold=closes or options.tools is not None,
                logprobs=options.wants_logprobs,
            )
            try:
                engine.submit(request)
            except RequestError as refusal:
                return f"{refusal.message}: {'; '.join(refusal.offenders)}" if refusal.offenders else refusal.message
            self.samples[request.id] = Sample(
                contest=self, request_id=request.id, index=index, variant=variant.name, prompt_tokens=len(prompt)
            )
        return None

    def solution(self, options: SolveOptions, now: float, stopped: str | None, error: str | None) -> Solution:
        """What became of it."""
        return Solution(
            problem_id=self.problem.id,
            tally=self.tally,
            attempts=tuple(self.attempts),
            tokens=sum(attempt.tokens for attempt in self.ended.values()) + self.dropped_tokens,
            seconds=self.seconds(now),
            stopped_early=stopped,
            error=error,
            share_seconds=self.share_seconds,
            used_seconds=self.used_seconds,
            bank_seconds=self.bank_seconds,
            cancelled=self.cancelled,
            fallback=options.fallback,
        )


def force_answer(engine: Engine, rules: EndRules, sample: Sample, ending: Ending, *, running: bool) -> bool:
    """Make a sample that has no answer write one; False where the engine has no room for that."""
    try:
        if running:
            engine.pause(sample.request_id)
        closing = rules.close(sample.stream, ending)
        engine.extend(sample.request_id, closing, max_tokens=CLOSING_TOKENS, drop=sample.surplus)
        sample.surplus = 0
    except RequestError:
        return False
    return True


def earlier_solutions(
    problems: Sequence[Problem], journal: Journal | None, options: SolveOptions, same: Same
) -> dict[str, Solution]:
    """What the journal's earlier sessions settled, counted again from their attempts.

    Answers that counted as different then do so now: past a time limit nobody was asked.
    """
    if journal is None:
        return {}
    history = journal.history
    solutions = {}
    for problem in problems:
        settled = history.settled.get(problem.id)
        if settled is None:
            continue
        attempts = history.attempts.get(problem.id, ())
        if settled.counted is not None:
            ended = {attempt.index: attempt for attempt in attempts}
            attempts = tuple(ended[index] for index in settled.counted if index in ended)

        def as_then(one: Answer, other: Answer, told: frozenset[str] = settled.told) -> bool:
            return not {one.key, other.key} <= told and same(one, other)

        solutions[problem.id] = Solution(
            problem_id=problem.id,
            tally=count_attempts(attempts, options.mode, as_then, Tally(weighting=options.votes)),
            attempts=attempts,
            tokens=settled.tokens,
            seconds=settled.seconds,
            stopped_early=settled.stopped_early,
            error=settled.error,
            share_seconds=settled.share_seconds,
            used_seconds=settled.used_seconds,
            bank_seconds=settled.bank_seconds,
            cancelled=settled.cancelled,
            fallback=options.fallback,
        )
    return solutions
