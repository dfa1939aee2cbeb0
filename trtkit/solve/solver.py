"""``Solver``: problems in, solutions out, in one piece or one problem at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

from trtkit.errors import OutputError
from trtkit.runtime.api import Engine
from trtkit.solve.clock import Clock, TimeBudget
from trtkit.solve.code_rows import CodeRows
from trtkit.solve.contest import Contest, earlier_solutions
from trtkit.solve.loop import Loop
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.sandbox import Sandbox

__all__ = ["Solver"]


class Solver(Loop):
    """Solves problems with one engine.

    >>> with Grader() as grader, open_engine(directory) as engine:
    ...     solutions = Solver(engine, load_chat(directory), SolveOptions(samples=16), grader).solve(problems)

    With a journal, what its earlier sessions finished is not done again, and every sample is on the disk
    before the next step. Interrupt it at any time. Without one, everything lives in memory.
    """

    def solve(
        self, problems: Sequence[Problem], *, loading_seconds: float = 0.0, sandbox: Sandbox | None = None
    ) -> list[Solution]:
        """The solutions in the order of ``problems``. Options with ``tools`` need a ``sandbox``.

        ``loading_seconds`` were spent on opening the engine; they count against a time limit. A problem that the engine
        refuses (prompt too long) gets a solution with an ``error``; the others go on. Raises :class:`EngineError` when
        the engine loses a request, and whatever the engine raises in a step.
        """
        self._solutions.clear()
        self.recall(problems)
        waiting = deque(problem for problem in problems if problem.id not in self._solutions)
        self.begin(len(problems), len(waiting), loading_seconds=loading_seconds, sandbox=sandbox)
        self._observer.began(problems, list(self._solutions.values()), self._options.samples)
        try:
            self._work(waiting)
        finally:
            self.end()
        return [self._solutions[problem.id] for problem in problems]

    def begin(
        self, problems: int, waiting: int, *, loading_seconds: float = 0.0, sandbox: Sandbox | None = None
    ) -> None:
        """Start the clock for ``problems`` problems, ``waiting`` of them unsolved: for :meth:`ask`. The rest as
        :meth:`solve`."""
        if self._options.tools is not None:
            assert sandbox is not None
            self._code = CodeRows(sandbox, self._engine, self._chat, self._ends, self._options.max_tokens)
        self._lanes = self._options.lanes(self._engine.max_rows)
        if self._journal is not None:
            self._lanes = self._lanes and (self._journal.history.lanes or self._lanes)
            self._journal.begin(loading_seconds, self._lanes)
        self._start_clock(problems, waiting, loading_seconds)

    def recall(self, problems: Sequence[Problem]) -> None:
        """Take over what the journal's earlier sessions settled."""
        self._solutions |= earlier_solutions(problems, self._journal, self._options, self._grader.same)

    def ask(self, problem: Problem) -> Solution:
        """The solution of one problem, between :meth:`begin` and :meth:`end`; at once where the journal has it.

        The time between two calls is the clock's, not a problem's. Raises as :meth:`solve`."""
        if problem.id not in self._solutions:
            self.recall([problem])
        if problem.id not in self._solutions:
            self._stepped_at = self._now()
            self._work(deque([problem]))
        return self._solutions[problem.id]

    def give_up(self, problem: Problem, error: str) -> Solution:
        """Settle a problem with the votes that it has, after :meth:`ask` failed. The engine is not asked for anything:
        see :meth:`go_on_with`."""
        contest = self._contests.get(problem.id)
        if contest is None:
            contest = Contest.begin(problem, self._options, self._journal, self._now(), lanes=self._lanes)
            contest.waiting.extend(contest.missing(self._options.samples))
            if self._bank is not None:
                contest.share_seconds = self._bank.open(problem.id, self._now(), used=contest.earlier_used)
        for sample in contest.samples.values():
            contest.dropped_tokens += sample.stream.generated
            contest.cancelled += 1
            self._forget(sample)
        contest.samples.clear()
        self._samples.clear()
        self._contests[problem.id] = contest
        self._settle(contest, None, error)
        return self._solutions[problem.id]

    def forget_unfinished(self) -> None:
        """Let go of what was under way when something broke into :meth:`ask`: it can then be asked again. The engine is
        not asked for anything, as in :meth:`give_up`."""
        for sample in self._samples.values():
            self._forget(sample)
        for name in self._contests:
            if self._bank is not None:
                self._bank.put_back(name)
        self._samples.clear()
        self._contests.clear()

    def go_on_with(self, engine: Engine) -> None:
        """Use another engine from now on; nothing may be under way."""
        assert not self._samples
        self._engine = engine
        for rows in (self._code, self._probes):
            if rows is not None:
                rows.go_on_with(engine)

    def end(self) -> None:
        """Write the engine's figures down."""
        self._observer.ended()
        if self._journal is not None:
            with contextlib.suppress(OutputError):  # figures only; what went wrong before must stay visible
                self._journal.record_engine(self._engine.stats())

    @property
    def solutions(self) -> dict[str, Solution]:
        """What is settled so far, by problem id: complete after :meth:`solve`, else partial."""
        return dict(self._solutions)

    def _start_clock(self, problems: int, waiting: int, loading_seconds: float) -> None:
        options, now = self._options, self._now()
        self._stepped_at = now
        if options.time_limit is None:
            return
        earlier = self._journal.history.spent_seconds if self._journal else 0.0
        self._bank = Clock(
            TimeBudget.of(options.time_limit, problems, options.reserve),
            now=now,
            spent=earlier + loading_seconds,
            problems=waiting,
            difficulty=options.difficulty,
        )
