"""Watching a run on stderr: a live table on a terminal, plain lines otherwise; and the result table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trtkit.log import format_seconds, logger
from trtkit.solve.observer import Observer
from trtkit.solve.problems import Problem
from trtkit.solve.records import Attempt, Solution
from trtkit.solve.summary import Verdict
from trtkit.solve.vote import Tally

__all__ = ["LiveDisplay", "PlainLines", "observer_for", "result_table"]

_REDRAW_SECONDS = 0.25
_HEARTBEAT_SECONDS = 15.0
_WINDOW_SECONDS = 10.0
_ROWS = 12


def observer_for(*, quiet: bool = False) -> Observer:
    """The display that fits stderr: none, live, or plain lines."""
    if quiet:
        return Observer()
    return LiveDisplay() if sys.stderr.isatty() else PlainLines()


class _Counts(Observer):
    """What both displays count: problems done, tokens, speed, time left."""

    def __init__(self) -> None:
        self.total = self.done = self.outstanding = self.samples = 0
        self._solved_here = 0
        self._partly: dict[str, float] = {}  # open problems: the share of their samples that has finished
        self._began = time.monotonic()
        self._recent: list[tuple[float, int]] = []

    def began(self, problems: Sequence[Problem], done: Sequence[Solution], samples: int) -> None:
        self.total, self.done, self.samples = len(problems), len(done), samples
        self._began = time.monotonic()

    def stepped(self, tokens: int, outstanding: int) -> None:
        now = time.monotonic()
        self.outstanding = outstanding
        self._recent.append((now, tokens))
        # Amortised: the window is cut when it has grown to twice its time.
        if now - self._recent[0][0] > 2 * _WINDOW_SECONDS:
            self._recent = [entry for entry in self._recent if now - entry[0] <= _WINDOW_SECONDS]

    def attempted(self, problem: Problem, attempt: Attempt, tally: Tally) -> None:
        self._partly[problem.id] = tally.finished / self.samples

    def solved(self, problem: Problem, solution: Solution) -> None:
        self.done += 1
        self._solved_here += 1
        self._partly.pop(problem.id, None)

    def headline(self) -> str:
        """``12/30 problems, 24 samples unfinished, 512 tok/s, about 3:10 left``."""
        now = time.monotonic()
        recent = [entry for entry in self._recent if now - entry[0] <= _WINDOW_SECONDS]
        span = max(now - max(self._began, now - _WINDOW_SECONDS), 1e-3)
        speed = sum(tokens for _, tokens in recent) / span
        text = f"{self.done}/{self.total} problems, {self.outstanding} samples unfinished, {speed:,.0f} tok/s"
        ready = self._solved_here + sum(self._partly.values())
        if ready > 0 and self.done < self.total:
            missing = self.total - self.done - sum(self._partly.values())
            text += f", about {format_seconds((now - self._began) / ready * missing)} left"
        return text


class PlainLines(_Counts):
    """One line per solved problem, and a sign of life where that takes long."""

    def began(self, problems: Sequence[Problem], done: Sequence[Solution], samples: int) -> None:
        super().began(problems, done, samples)
        self._spoke = time.monotonic()
        if done:
            logger.info("resuming: %d of %d problems are already solved", len(done), len(problems))

    def stepped(self, tokens: int, outstanding: int) -> None:
        super().stepped(tokens, outstanding)
        if time.monotonic() - self._spoke > _HEARTBEAT_SECONDS:
            self._spoke = time.monotonic()
            logger.info("%s", self.headline())

    def solved(self, problem: Problem, solution: Solution) -> None:
        super().solved(problem, solution)
        self._spoke = time.monotonic()
        logger.info("[%d/%d] %s: %s", self.done, self.total, _short(problem.id), _said(solution))


class LiveDisplay(_Counts):
    """A table of the open problems with their votes, redrawn in place a few times a second."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._open: dict[str, Tally] = {}
        self._drawn = 0.0

    def began(self, problems: Sequence[Problem], done: Sequence[Solution], samples: int) -> None:
        super().began(problems, done, samples)
        # No refresh thread: the loop calls often enough, and two threads would share its data.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def opened(self, problem: Problem, tally: Tally) -> None:
        self._open[problem.id] = tally

    def attempted(self, problem: Problem, attempt: Attempt, tally: Tally) -> None:
        super().attempted(problem, attempt, tally)
        self._open[problem.id] = tally

    def stepped(self, tokens: int, outstanding: int) -> None:
        super().stepped(tokens, outstanding)
        now = time.monotonic()
        if self._live is not None and now - self._drawn > _REDRAW_SECONDS:
            self._drawn = now
            self._live.update(self._table(), refresh=True)

    def solved(self, problem: Problem, solution: Solution) -> None:
        super().solved(problem, solution)
        self._open.pop(problem.id, None)
        line = Text(f"[{self.done}/{self.total}] {_short(problem.id)}: {_said(solution)}")
        self._console.print(line, overflow="ellipsis", no_wrap=True)

    def ended(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("problem", "finished", "votes"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for problem_id, tally in list(self._open.items())[:_ROWS]:
            finished = f"{tally.finished}/{self.samples}"
            table.add_row(Text(_short(problem_id)), Text(finished), Text(_votes(tally)))
        if len(self._open) > _ROWS:
            table.add_row(Text(f"... and {len(self._open) - _ROWS} more"), Text(""), Text(""))
        return Group(Text(self.headline()), table)


def result_table(verdicts: Sequence[Verdict], *, most: int = 40) -> Table:
    """A rich table of the solutions, at most ``most`` of them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("problem", "answer", "votes", "right"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for verdict in verdicts[:most]:
        solution = verdict.solution
        leader = solution.tally.leader
        stop = solution.error or (f"stopped by {solution.stopped_early}" if solution.stopped_early else "")
        note = [stop, "default answer" if solution.defaulted else "", "tie" if solution.tally.tied else ""]
        table.add_row(
            Text(_short(solution.problem_id)),
            Text(_short(solution.answer.key) if solution.answer else "-"),
            Text(f"{leader.count} of {solution.tally.finished}" if leader else f"0 of {solution.tally.finished}"),
            Text({True: "yes", False: "no", None: ""}[verdict.correct]),
            Text(f"{solution.tokens:,}"),
            Text(_time(solution)),
            Text(", ".join(filter(None, note))),
        )
    if len(verdicts) > most:
        table.add_row(Text(f"... and {len(verdicts) - most} more"), *[Text("")] * 6)
    return table


def _said(solution: Solution) -> str:
    """``73 (11 of 16 votes, unassailable), 12,345 tokens, 4.1s``."""
    leader, finished = solution.tally.leader, solution.tally.finished
    if solution.error:
        return f"failed: {solution.error}" + (f"; answered {_short(solution.answer.key)}" if solution.answer else "")
    rule = f", {solution.stopped_early}" if solution.stopped_early else ""
    if leader is not None:
        said = f"{_short(leader.answer.key)} ({leader.count} of {finished} votes{rule})"
    elif solution.answer is not None:
        said = f"{_short(solution.answer.key)} (default answer, none in {finished} samples{rule})"
    else:
        said = f"no answer ({finished} samples{rule})"
    return f"{said}, {solution.tokens:,} tokens, {format_seconds(solution.seconds)}"


def _time(solution: Solution) -> str:
    """``4.1`` seconds, or ``4.1 of 7.0`` under a clock."""
    if solution.share_seconds is None or solution.used_seconds is None:
        return f"{solution.seconds:.1f}"
    return f"{solution.used_seconds:.1f} of {solution.share_seconds:.1f}"


def _votes(tally: Tally) -> str:
    shown = [f"{_short(vote.answer.key, 20)} x{vote.count}" for vote in tally.ranked[:3]]
    if len(tally.votes) > 3:
        shown.append(f"+{len(tally.votes) - 3} more")
    return ", ".join(shown)


def _short(text: str, most: int = 40) -> str:
    """One line of what files and models wrote, without what a terminal would obey."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return text if len(text) <= most else text[: most - 3] + "..."
