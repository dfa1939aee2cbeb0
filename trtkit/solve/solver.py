"""The loop: N samples per problem in one in-flight batch, votes counted as they arrive, siblings cancelled
when settled.

What a sample says depends on its seed alone, so its answer is the same in any order, batch and session.
Which samples are counted when a stop rule ends a problem does depend on their arrival.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trtkit.chat import THINK_END, Chat
from trtkit.errors import EngineError, RequestError
from trtkit.runtime.api import Engine, FinishReason, Request, StepOutput
from trtkit.solve.answers import extract_box
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.observer import Observer
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.prompts import sample_seed, variant_of
from trtkit.solve.records import Attempt, Solution, count_attempts
from trtkit.solve.stop_text import end_of_text
from trtkit.solve.stopping import StopRule, first_to_hold
from trtkit.solve.vote import Tally

__all__ = ["Solver", "earlier_solutions"]

_CHARACTERS_PER_TOKEN = 32
"""No tokenizer packs text denser on average. Longer text is refused without tokenizing megabytes."""


@dataclass(slots=True)
class _Sample:
    """A sample that is running or queued in the engine."""

    contest: _Contest
    index: int
    variant: str
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Contest:
    """A problem that is open: its votes so far and its unfinished samples by request id."""

    problem: Problem
    began: float
    earlier_seconds: float
    attempts: list[Attempt]
    tally: Tally
    samples: dict[str, _Sample] = field(default_factory=dict)
    dropped_tokens: int = 0


class Solver:
    """Solves problems with one engine.

    >>> with Grader() as grader, open_engine(directory) as engine:
    ...     solutions = Solver(engine, load_chat(directory), SolveOptions(samples=16), grader).solve(problems)

    With a journal, what its earlier sessions finished is not done again, and every sample is on the disk
    before the next step. Interrupt it at any time. Without one, everything lives in memory.
    """

    def __init__(
        self,
        engine: Engine,
        chat: Chat,
        options: SolveOptions,
        grader: Grader,
        journal: Journal | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._options = options
        self._grader = grader
        self._journal = journal
        self._observer = observer or Observer()
        self._clock = clock
        single = len(chat.think_end) == 1
        at_think = options.stop_at == "think"
        self._stop_ids = tuple(dict.fromkeys((*(chat.think_end if single and at_think else ()), *chat.eos_ids)))
        self._match_text = at_think and not single
        self._rules = options.rules
        self._contests: dict[str, _Contest] = {}
        self._samples: dict[str, _Sample] = {}
        self._solutions: dict[str, Solution] = {}

    def solve(self, problems: Sequence[Problem]) -> list[Solution]:
        """The solutions in the order of ``problems``.

        A problem that the engine refuses (prompt too long) gets a solution with an ``error``; the others go
        on. Raises :class:`EngineError` when the engine loses a request, and whatever the engine raises in a
        step.
        """
        self._solutions = earlier_solutions(problems, self._journal, self._options, self._grader)
        waiting = deque(problem for problem in problems if problem.id not in self._solutions)
        if self._journal is not None:
            self._journal.begin()
        self._observer.began(problems, list(self._solutions.values()), self._options.samples)
        try:
            while True:
                self._feed(waiting)
                if not self._samples:
                    break
                self._step()
        finally:
            for request_id in self._samples:
                self._engine.cancel(request_id)
            self._observer.ended()
        while self._engine.has_work:  # the cancelled siblings' last outputs, so that the engine is left clean
            self._engine.step()
        return [self._solutions[problem.id] for problem in problems]

    @property
    def solutions(self) -> dict[str, Solution]:
        """What is settled so far, by problem id: complete after :meth:`solve`, else partial."""
        return dict(self._solutions)

    def _feed(self, waiting: deque[Problem]) -> None:
        most = 1 if self._options.order == "sequential" else self._options.outstanding
        while waiting and len(self._samples) < most:
            self._open(waiting.popleft())

    def _open(self, problem: Problem) -> None:
        earlier = self._journal.history.attempts.get(problem.id, ()) if self._journal else ()
        contest = _Contest(
            problem=problem,
            began=self._clock(),
            earlier_seconds=max((attempt.seconds for attempt in earlier), default=0.0),
            attempts=list(earlier),
            tally=count_attempts(earlier, self._options.mode, self._grader.same),
        )
        self._contests[problem.id] = contest
        self._observer.opened(problem, contest.tally)
        done = {attempt.index for attempt in earlier}
        missing = [index for index in range(self._options.samples) if index not in done]
        rule = first_to_hold(self._rules, contest.tally, len(missing)) if missing else None
        error = None
        if missing and rule is None:
            error = self._submit(contest, missing)
        if not contest.samples:
            self._settle(contest, rule, error)

    def _submit(self, contest: _Contest, missing: Sequence[int]) -> str | None:
        """Submit the samples; the reason if the engine refuses the problem (then none is left running)."""
        problem, options = contest.problem, self._options
        longest = _CHARACTERS_PER_TOKEN * self._engine.max_total_tokens
        if len(problem.text) > longest:
            return f"the problem text has {len(problem.text):,} characters, more than fit into any prompt"
        prompts: dict[str, tuple[int, ...]] = {}
        for index in missing:
            variant = variant_of(options.variants, index)
            if variant.name not in prompts:
                prompts[variant.name] = self._chat.prompt(problem.text, variant)
            request = Request(
                id=f"{problem.id}/{index}",
                prompt=prompts[variant.name],
                sampling=options.sampling,
                stop_ids=self._stop_ids,
                max_tokens=options.max_tokens,
                seed=sample_seed(options.seed, problem.id, index),
            )
            try:
                self._engine.submit(request)
            except RequestError as refusal:
                self._cancel(contest)
                return refusal.message
            sample = _Sample(contest=contest, index=index, variant=variant.name)
            contest.samples[request.id] = self._samples[request.id] = sample
        return None

    def _step(self) -> None:
        outputs = self._engine.step()
        finished: dict[str, list[Attempt]] = {}
        new_tokens = 0
        for output in outputs:
            sample = self._samples.get(output.request_id)
            if sample is None:  # cancelled by us
                continue
            new_tokens += len(output.tokens)
            attempt = self._extend(sample, output)
            if attempt is not None:
                finished.setdefault(attempt.problem_id, []).append(attempt)
        if not outputs and not self._engine.has_work:
            lost = ", ".join(list(self._samples)[:5])
            raise EngineError(f"the engine lost {len(self._samples)} request(s): {lost}")
        self._observer.stepped(new_tokens, len(self._samples))
        if finished:
            self._count(finished)

    def _extend(self, sample: _Sample, output: StepOutput) -> Attempt | None:
        """Add new tokens to a sample; the finished attempt if that ended it."""
        seen = len(sample.tokens)
        sample.tokens.extend(output.tokens)
        finish = output.finish
        if self._match_text:
            end = end_of_text(sample.tokens, seen, THINK_END, self._chat.decode)
            if end is not None:
                del sample.tokens[end:]
                finish = FinishReason.STOP
                self._engine.cancel(output.request_id)
        if finish is None:
            return None
        contest = sample.contest
        del self._samples[output.request_id], contest.samples[output.request_id]
        text = self._chat.decode(sample.tokens)
        return Attempt(
            problem_id=contest.problem.id,
            index=sample.index,
            variant=sample.variant,
            tokens=len(sample.tokens),
            finish=finish,
            box=extract_box(text),
            seconds=contest.earlier_seconds + self._clock() - contest.began,
            text=text if self._options.save_text else None,
        )

    def _count(self, finished: dict[str, list[Attempt]]) -> None:
        """Write down what ended in this step, then count it and settle the problems that it decides."""
        for ended in finished.values():
            ended.sort(key=lambda attempt: attempt.index)
        if self._journal is not None:
            self._journal.record([attempt for ended in finished.values() for attempt in ended], [])
        for problem_id, ended in finished.items():
            contest = self._contests[problem_id]
            for attempt in ended:
                contest.attempts.append(attempt)
                contest.tally = count_attempts([attempt], self._options.mode, self._grader.same, contest.tally)
                self._observer.attempted(contest.problem, attempt, contest.tally)
            outstanding = len(contest.samples)
            rule = first_to_hold(self._rules, contest.tally, outstanding) if outstanding else None
            if rule is not None or not outstanding:
                self._settle(contest, rule, None)

    def _settle(self, contest: _Contest, rule: StopRule | None, error: str | None) -> None:
        self._cancel(contest)
        solution = Solution(
            problem_id=contest.problem.id,
            tally=contest.tally,
            attempts=tuple(contest.attempts),
            tokens=sum(attempt.tokens for attempt in contest.attempts) + contest.dropped_tokens,
            seconds=contest.earlier_seconds + self._clock() - contest.began,
            stopped_early=rule.text if rule else None,
            error=error,
        )
        if self._journal is not None:
            self._journal.record([], [solution])
        self._solutions[solution.problem_id] = solution
        del self._contests[solution.problem_id]
        self._observer.solved(contest.problem, solution)

    def _cancel(self, contest: _Contest) -> None:
        for request_id, sample in contest.samples.items():
            self._engine.cancel(request_id)
            contest.dropped_tokens += len(sample.tokens)
            del self._samples[request_id]
        contest.samples.clear()


def earlier_solutions(
    problems: Sequence[Problem], journal: Journal | None, options: SolveOptions, grader: Grader
) -> dict[str, Solution]:
    """What the journal's earlier sessions settled, counted again from their attempts."""
    if journal is None:
        return {}
    history = journal.history
    solutions = {}
    for problem in problems:
        settled = history.settled.get(problem.id)
        if settled is None:
            continue
        attempts = history.attempts.get(problem.id, ())
        solutions[problem.id] = Solution(
            problem_id=problem.id,
            tally=count_attempts(attempts, options.mode, grader.same),
            attempts=attempts,
            tokens=settled.tokens,
            seconds=settled.seconds,
            stopped_early=settled.stopped_early,
            error=settled.error,
        )
    return solutions
