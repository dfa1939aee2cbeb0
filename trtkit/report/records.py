"""What a report knows of a run. Everything that older runs do not record is optional."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.solve.engine_figures import EngineFigures

__all__ = ["Result", "Run", "Sample", "VoteCount"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One finished sample."""

    index: int
    variant: str
    tokens: int
    ending: str
    """Why it ended: :class:`trtkit.solve.ends.Ending`, in older runs :class:`trtkit.runtime.api.FinishReason`."""
    box: str | None
    """Content of its last box, as written."""
    vote: int | None
    """Which of the problem's ``votes`` it stands behind; None when it gave no answer that counts."""
    correct: bool | None
    """None where the problem has no known answer. A sample without an answer is wrong."""
    seconds: float
    """From submitting the problem to the end of this sample."""
    ended: float
    """Seconds of work on this run until it was recorded, earlier sessions included."""
    tool_calls: int = 0
    forced: bool = False
    """Its budget or its time was spent, and it was made to write its answer."""

    @property
    def truncated(self) -> bool:
        """Cut off by the token budget, and not made to answer."""
        return self.ending == "length" and not self.forced

    @property
    def looped(self) -> bool:
        """It was ended because it repeated itself."""
        return self.ending == "loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteCount:
    """One distinct answer."""

    answer: str
    """As its earliest sample wrote it."""
    count: int
    correct: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One problem of a run."""

    id: str
    text: str | None
    """None when the problems file is gone or has changed."""
    gold: str | None
    answer: str | None
    """The voted answer; None without any, and for a problem that is not settled."""
    correct: bool | None
    """None without a known answer, and for a problem that is not settled."""
    settled: bool
    votes: tuple[VoteCount, ...]
    """First the winner, then by count."""
    samples: tuple[Sample, ...]
    """Finished ones, by index."""
    asked: int
    """Samples asked for."""
    tokens: int
    """Generated, those of cancelled samples included where the run says so."""
    seconds: float | None
    """From submitting it to settling it; None while it is not settled."""
    ended: float | None
    """Like :attr:`Sample.ended`."""
    tied: bool = False
    share_seconds: float | None = None
    """What the clock granted it."""
    used_seconds: float | None = None
    """What the clock charged it: its part of each step that it shared with others."""
    stopped_early: str | None = None
    error: str | None = None
    cancelled: int = 0
    """Samples that were asked for and not run to their end."""

    @property
    def defaulted(self) -> bool:
        """Answered with the configured default, because no sample gave an answer."""
        return self.answer is not None and not self.votes

    @property
    def blank(self) -> int:
        """Finished samples without an answer."""
        return sum(sample.vote is None for sample in self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run directory, as far as it could be read."""

    label: str
    path: Path
    created: str | None
    versions: Mapping[str, str]
    arguments: Mapping[str, Any]
    problems_path: str | None
    problems_digest: str | None
    engine_path: str | None
    """Engine directory, or a server and its model."""
    results: tuple[Result, ...]
    """In the order of the problems file. Problems that were not begun are among them when the file is there."""
    seconds: float
    """Work on the run by all its sessions, without loading the engine."""
    sessions: int
    limit_seconds: float | None = None
    """Time limit for the whole run."""
    loading_seconds: float | None = None
    bank: tuple[tuple[float, float], ...] = ()
    """(second of the run, seconds in the time bank) whenever a problem was settled, in the order of the journal: those
    that one step settled share their second."""
    engine: EngineFigures | None = None
    """What the engine counted; None where the run did not record it."""
    notices: tuple[str, ...] = ()
    """What could not be read, in words for the page."""

    @property
    def settled(self) -> tuple[Result, ...]:
        """Problems with an outcome."""
        return tuple(result for result in self.results if result.settled)

    @property
    def finished(self) -> bool:
        """Every known problem is settled."""
        return bool(self.results) and all(result.settled for result in self.results)
