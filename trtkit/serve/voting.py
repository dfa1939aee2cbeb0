"""The voted model: a problem's samples share the engine with everybody else's rows, and its answer is their vote."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from trtkit.chat import Chat
from trtkit.closing import Closing
from trtkit.serve.engine_thread import EngineThread
from trtkit.serve.engine_view import EngineView
from trtkit.solve.grading import Grader
from trtkit.solve.journal_rows import solution_row
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem
from trtkit.solve.records import Solution
from trtkit.solve.solver import Solver

__all__ = ["Voting", "votes_of"]

_AT_ONCE = 256
"""Problems that are solved at the same time; each has a thread that mostly waits."""


class Voting(Closing):
    """Solves problems for clients, several at once."""

    def __init__(self, engine: EngineThread, chat: Chat) -> None:
        self._engine = engine
        self._chat = chat
        self._grader = Grader()
        self._threads = ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="vote")

    async def solve(self, name: str, text: str, options: SolveOptions) -> Solution:
        """The solution of one problem. Given up when it is cancelled. Raises :class:`EngineError`.

        While others use half of the rows or more, only ``wave`` of its samples run at once: where the first ones
        decide, most of the rest never start. The votes are the same.
        """
        if self._engine.unfinished * 2 >= self._engine.max_rows:
            options = replace(options, outstanding=2 * options.wave)
        view = EngineView(self._engine, name)
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._solve, view, text, options)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            view.abandon()
            work.add_done_callback(lambda done: done.exception())  # nobody else will look at it
            raise

    def close(self) -> None:
        """Wait for what is under way, which the engine's end ends."""
        self._threads.shutdown(cancel_futures=True)
        self._grader.close()

    def _solve(self, view: EngineView, text: str, options: SolveOptions) -> Solution:
        with view:
            # One name for all: with a seed, the same problem gets the same answer.
            problem = Problem(id="problem", text=text)
            return Solver(view, self._chat, options, self._grader).solve([problem])[0]


def votes_of(solution: Solution) -> dict[str, Any]:
    """What a reply says beside the answer: a row of ``solutions.jsonl``, as far as it means something here."""
    row = solution_row(solution)
    kept = ("answer", "votes", "tokens", "seconds", "stopped_early", "cancelled")
    return {"samples": len(solution.attempts), **{name: row[name] for name in kept}}
