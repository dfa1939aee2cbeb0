"""The loop: N samples per problem in one in-flight batch, votes counted as they come in, siblings cancelled
when settled.

What a sample says depends on its seed alone, so its answer is the same in any order, batch and session, and samples are
counted in an order of their own (``counting.py``). So a run says the same however often it was interrupted, unless a
time limit cuts samples short.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace

from trtkit.chat import Chat
from trtkit.errors import EngineError
from trtkit.runtime.api import Engine, FinishReason, StepOutput
from trtkit.solve.answers import Answer
from trtkit.solve.clock import Clock, Pace
from trtkit.solve.code_rows import CodeRows
from trtkit.solve.contest import Contest, Sample, force_answer
from trtkit.solve.ends import End, Ending, EndRules
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.observer import Observer
from trtkit.solve.options import SolveOptions
from trtkit.solve.probes import Probes
from trtkit.solve.problems import Problem
from trtkit.solve.records import DEADLINE, TIME_LIMIT, Attempt, Solution
from trtkit.solve.stopping import StopRule, first_to_hold

__all__ = ["Loop"]

_CLOSING_STEPS = 20
"""Steps kept free before a deadline, for samples that are made to answer: about as many as an answer has tokens."""
_CLOSING_PART = 0.3
"""But no more than this part of a problem's time."""


class Loop:
    """What is under way: problems, their samples, and the clock. :class:`trtkit.solve.solver.Solver` gives it work."""

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
        self._now = clock
        self._ends = EndRules(
            chat,
            options.mode,
            at_think=options.stop_at != "eos",
            at_box=options.stop_at == "first-box",
            loops=options.kills_loops,
        )
        self._rules = options.rules
        self._code: CodeRows | None = None
        self._probes = (
            Probes(engine, self._ends, options.probe, options.max_tokens, self._same) if options.probe else None
        )
        self._bank: Clock | None = None
        self._stepped_at = 0.0
        self._pace = Pace()
        self._lanes: int | None = None
        self._contests: dict[str, Contest] = {}
        self._samples: dict[str, Sample] = {}
        self._solutions: dict[str, Solution] = {}

    def _work(self, waiting: deque[Problem]) -> None:
        """Until these are solved."""
        try:
            while True:
                self._feed(waiting)
                if not self._samples:
                    break
                self._step()
        finally:
            for request_id in self._samples:
                self._engine.cancel(request_id)
        while self._engine.has_work:  # the cancelled siblings' last outputs, so that the engine is left clean
            self._engine.step()

    def _feed(self, waiting: deque[Problem]) -> None:
        most = 1 if self._options.order == "sequential" else self._options.outstanding
        while waiting and len(self._samples) < most:
            self._open(waiting.popleft())
        # The last problems need not hold back: nobody else wants the rows.
        for contest in [] if waiting else list(self._contests.values()):
            room = most // 2 - len(self._samples)
            if contest.waiting and room > 0:
                self._submit(contest, room)

    def _open(self, problem: Problem) -> None:
        now = self._now()
        contest = Contest.begin(problem, self._options, self._journal, now, lanes=self._lanes)
        self._contests[problem.id] = contest
        self._observer.opened(problem, contest.tally)
        missing = contest.missing(self._options.samples)
        contest.waiting.extend(missing)
        rule = self._count_ended(contest)
        stopped = rule.text if rule else None
        if self._bank is not None:
            contest.share_seconds = self._bank.open(problem.id, now, used=contest.earlier_used)
            if missing and stopped is None and self._bank.left_for(problem.id, now) <= 0:
                stopped = TIME_LIMIT
        if missing and stopped is None:
            self._submit(contest, self._options.wave)
        else:
            self._settle(contest, stopped, None)

    def _submit(self, contest: Contest, most: int) -> None:
        """Submit up to ``most`` more samples; a problem that the engine refuses is settled with its reason."""
        error = contest.submit(self._engine, self._chat, self._options, self._ends, most)
        self._samples.update(contest.samples)
        if error is not None:
            self._settle(contest, None, error)

    def _step(self) -> None:
        finished: dict[str, list[Attempt]] = {}
        rows: Counter[str] = Counter()
        ended = self._resume_code()
        working = self._engine.has_work
        outputs = self._engine.step()
        now = self._now()
        seconds, self._stepped_at = now - self._stepped_at, now
        if working:
            spoke = any(output.finish is not FinishReason.CANCELLED for output in outputs)
            self._pace.stepped(seconds, spoke=spoke)
        new_tokens = 0
        for output in outputs:
            sample = self._samples.get(output.request_id)
            if sample is None:  # cancelled by us
                continue
            new_tokens += len(output.tokens)
            rows[sample.contest.problem.id] += 1
            ended.append(self._extend(sample, output))
        waiting = self._code.waiting if self._code is not None else []
        rows.update(self._samples[request_id].contest.problem.id for request_id in waiting)
        for attempt in ended:
            if attempt is not None:
                finished.setdefault(attempt.problem_id, []).append(attempt)
        if not (outputs or finished or waiting or self._engine.has_work):
            lost = ", ".join(list(self._samples)[:5])
            raise EngineError(f"the engine lost {len(self._samples)} request(s): {lost}")
        self._observer.stepped(new_tokens, len(self._samples))
        if self._bank is not None:
            # A step that brought nothing, as from a server that is slow, is time of all who wait for it.
            rows = rows or Counter(sample.contest.problem.id for sample in self._samples.values())
            self._bank.charge(seconds, rows)  # before problems are settled and their accounts closed
        if finished:
            self._record(finished)
        self._count()
        if self._bank is not None:
            self._keep_time(self._bank, now)

    def _resume_code(self) -> list[Attempt | None]:
        """Let samples go on whose code has ended; those that had no room left for that end here."""
        ended: list[Attempt | None] = []
        for sample in self._code.resume(self._samples) if self._code is not None else ():
            length = len(sample.stream.tokens)
            ended.append(self._finish(sample, End(ending=Ending.LENGTH, finish=FinishReason.LENGTH, length=length)))
        return ended

    def _extend(self, sample: Sample, output: StepOutput) -> Attempt | None:
        """Add new tokens to a sample; the finished attempt if that ended it."""
        if self._probes is not None and self._probes.asks(sample):
            end = self._probes.hear(sample, output)
        else:
            reported = len(sample.stream.tokens) + len(output.tokens)
            end = self._ends.add(sample.stream, output.tokens, output.finish, output.logprobs)
            if any(rows is not None and rows.take(sample, output, end) for rows in (self._code, self._probes)):
                return None
            sample.surplus = 0 if end is None else reported - end.length
        return None if end is None else self._finish(sample, end, running=output.finish is None)

    def _finish(self, sample: Sample, end: End, *, running: bool = False) -> Attempt | None:
        """A sample has come to its end: make it answer if it has to, else the attempt."""
        short = end.ending in (Ending.LENGTH, Ending.THINK) and not sample.stream.forced
        wants = short and self._options.forces and self._ends.answer(sample.stream) is None
        if wants and self._force(sample, end.ending, running=running):
            return None
        return self._end(sample, end.ending, end.finish)

    def _force(self, sample: Sample, ending: Ending, *, running: bool) -> bool:
        return force_answer(self._engine, self._ends, sample, ending, running=running)

    def _end(self, sample: Sample, ending: Ending, finish: FinishReason) -> Attempt:
        """The attempt that a sample came to, wherever the engine is with it."""
        self._let_go(sample)
        text = self._ends.text(sample.stream)
        return sample.attempt(text, ending, finish, self._now(), keep_text=self._options.save_text)

    def _record(self, finished: dict[str, list[Attempt]]) -> None:
        """Write down what ended in this step, and what time its problem was charged until now."""
        for problem_id, ended in finished.items():
            ended.sort(key=lambda attempt: attempt.index)
            if self._bank is not None:
                used = self._bank.used(problem_id)
                ended[:] = [replace(attempt, used_seconds=used) for attempt in ended]
        if self._journal is not None:
            self._journal.record([attempt for ended in finished.values() for attempt in ended], [])
        for problem_id, ended in finished.items():
            self._contests[problem_id].ended |= {attempt.index: attempt for attempt in ended}

    def _count(self) -> None:
        """Count what can be counted by now, and settle the problems that it decides."""
        for contest in [contest for contest in self._contests.values() if contest.uncounted]:
            rule = self._count_ended(contest)
            if rule is not None or not contest.outstanding:
                late = DEADLINE if contest.closing else None
                self._settle(contest, rule.text if rule else late, None)
            elif contest.waiting and len(contest.samples) < self._options.wave:
                self._submit(contest, self._options.wave - len(contest.samples))

    def _count_ended(self, contest: Contest) -> StopRule | None:
        """Count what can be counted, up to the rule that ends the problem, if one does."""
        while group := contest.turn():
            for attempt in group:
                contest.count(attempt, self._options.mode, self._same)
                self._observer.attempted(contest.problem, attempt, contest.tally)
            outstanding = contest.outstanding
            rule = first_to_hold(self._rules, contest.tally, outstanding) if outstanding else None
            if rule is not None:
                return rule
        return None

    def _same(self, one: Answer, other: Answer) -> bool:
        """Whether two answers are equal. Past the limit nobody is asked: expressions can take seconds for each pair."""
        late = self._bank is not None and self._bank.left(self._now()) <= 0
        return not late and self._grader.same(one, other)

    def _keep_time(self, bank: Clock, now: float) -> None:
        """Settle problems whose time is up; shortly before that, make their samples answer."""
        for problem_id, contest in list(self._contests.items()):
            left = bank.left_for(problem_id, now)
            reserve = min(_CLOSING_STEPS * self._pace.seconds, _CLOSING_PART * (contest.share_seconds or 0.0))
            if not contest.closing and left <= (reserve if self._options.forces else 0.0):
                self._close(contest)
            if left <= 0 and problem_id in self._contests:
                self._settle(contest, DEADLINE, None)

    def _close(self, contest: Contest) -> None:
        """Let samples with an answer vote with it; of the others, make those answer that have begun."""
        contest.closing = True
        ended: list[Attempt] = []
        for sample in list(contest.samples.values()):
            if sample.stream.forced or (self._probes is not None and self._probes.adopt(sample, Ending.DEADLINE)):
                continue
            if self._ends.answer(sample.stream) is not None:
                ended.append(self._end(sample, Ending.DEADLINE, FinishReason.CANCELLED))
                continue
            resting = self._code is not None and self._code.forget(sample.request_id)
            if not sample.stream.tokens or not (
                self._options.forces and self._force(sample, Ending.DEADLINE, running=not resting)
            ):
                self._drop(sample)
        if ended:
            self._record({contest.problem.id: ended})
            self._count()
        elif not contest.samples:
            self._settle(contest, DEADLINE, None)

    def _drop(self, sample: Sample) -> None:
        sample.contest.dropped_tokens += sample.stream.generated
        sample.contest.cancelled += 1
        self._let_go(sample)

    def _let_go(self, sample: Sample) -> None:
        """Nobody works for this sample any more."""
        self._engine.cancel(sample.request_id)
        self._forget(sample)
        del self._samples[sample.request_id], sample.contest.samples[sample.request_id]

    def _forget(self, sample: Sample) -> None:
        for rows in (self._code, self._probes):
            if rows is not None:
                rows.forget(sample.request_id)

    def _settle(self, contest: Contest, stopped: str | None, error: str | None) -> None:
        for sample in list(contest.samples.values()):
            self._drop(sample)
        contest.cancelled += len(contest.waiting) + contest.uncounted
        now = self._now()
        if self._bank is not None:
            contest.used_seconds = self._bank.close(contest.problem.id)
            contest.bank_seconds = self._bank.bank(now)
        solution = contest.solution(self._options, now, stopped, error)
        # Before it is written: where that fails, a session goes on with other problems.
        self._solutions[solution.problem_id] = solution
        del self._contests[solution.problem_id]
        if self._journal is not None:
            self._journal.record([], [solution])
        self._observer.solved(contest.problem, solution)
