"""``Observer``: what a run tells while it works. The methods do nothing; override the ones you need."""

from __future__ import annotations

from collections.abc import Sequence

from trtkit.solve.problems import Problem
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.vote import Tally

__all__ = ["Observer"]


class Observer:
    """Called from the solver's loop, so every method must return quickly."""

    def began(self, problems: Sequence[Problem], done: Sequence[Solution], samples: int) -> None:
        """Before the first step: all problems, those settled by earlier sessions, and samples per problem."""

    def opened(self, problem: Problem, tally: Tally) -> None:
        """``problem`` was submitted, with the votes that it already has."""

    def stepped(self, tokens: int, outstanding: int) -> None:
        """The engine made a step: new tokens of all samples, and samples still unfinished."""

    def attempted(self, problem: Problem, attempt: Attempt, tally: Tally) -> None:
        """A sample ended; ``tally`` includes it."""

    def solved(self, problem: Problem, solution: Solution) -> None:
        """``problem`` is settled."""

    def ended(self) -> None:
        """The run is over, also when it was interrupted or failed."""
