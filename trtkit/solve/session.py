"""Problems one at a time, as a contest's server hands them over: one engine, one clock, one run directory.

    from trtkit.solve.session import open_session

    session = open_session("engines/built/r1-fp8", problems=50, time_limit="4h50m", out="run")
    session.answer("a1b2c3", "What is 1 + 1?")  # "2"

The engine is opened at once and stays open. The number of problems is what the clock deals the time out by; the
problems themselves, their order and the pauses between them are not known before. Where a time limit is set, what comes
after it is answered at once. When the engine fails, a problem is answered with the votes that it has, and the engine is
opened anew for the next one. A disk that cannot be written costs no answer, only what another session would know.

In the run directory lies what ``trtkit solve`` leaves, for ``report``, ``revote`` and for a session that has to start
again: what was asked and answered before is answered from there, and the time spent counts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.chat import Chat
from trtkit.closing import Closing
from trtkit.errors import InputError, OutputError, TrtkitError, UsageError
from trtkit.files import append_jsonl, digest_file, read_json, write_json, write_text
from trtkit.log import logger
from trtkit.runtime.api import Engine
from trtkit.runtime.sources import DirectorySource, Source
from trtkit.solve.clock import parse_duration
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.options import SolveOptions
from trtkit.solve.policy import policy_named
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.records import Solution
from trtkit.solve.run import claim, identity_of, write_results
from trtkit.solve.run_head import JOURNAL_FILE, PROBLEMS_FILE, RUN_FILE
from trtkit.solve.sandbox import open_sandbox
from trtkit.solve.solver import Solver
from trtkit.solve.vote import Tally

if TYPE_CHECKING:
    from trtkit.runtime.load import OpenOptions

__all__ = ["Session", "open_session"]

_BLANK = "(blank)"
"""For an id or a text of spaces alone, which no reader of problems takes."""


class Session(Closing):
    """Answers one problem after the other; see :func:`open_session`. Use it as a context manager, or close it."""

    def __init__(
        self, open_engine: Callable[[], Engine], chat: Chat, options: SolveOptions, *,
        problems: int, engine: Path | Mapping[str, str], out: Path | None = None, began: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Opens the engine. ``engine`` is its directory or identity, for the record (:class:`trtkit.solve.run.Places`).
        A time limit counts from ``began`` on ``clock``, by default from now.

        Raises :class:`UsageError` where ``out`` holds another run, :class:`OutputError` where it cannot be written, and
        what opening the engine raises.
        """
        began = clock() if began is None else began
        if problems < 1:
            raise UsageError(f"{problems} problems: the clock is dealt out over at least one")
        self._open_engine, self._options, self._out = open_engine, options, out
        self._asked: dict[str, Problem] = {}
        self._failed = self._closed = False
        self._turn = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._journal = None
            if out is not None:
                journal = Journal(out / JOURNAL_FILE, patient=True, clock=clock)
                self._journal = stack.enter_context(journal)
                claim(out, identity_of(engine, options), force_new=False)
                self._asked = _asked_before(out)
            self._noted = set(self._asked)
            self._grader = stack.enter_context(Grader())
            sandbox = stack.enter_context(open_sandbox(options.tools))
            self._engine = stack.enter_context(contextlib.ExitStack())
            opened = self._engine.enter_context(open_engine())
            self._solver = Solver(opened, chat, options, self._grader, self._journal, clock=clock)
            self._solver.recall(list(self._asked.values()))
            waiting = max(problems - len(self._solver.solutions), 1)
            self._solver.begin(problems, waiting, loading_seconds=clock() - began, sandbox=sandbox)
            self._resources = stack.pop_all()

    def ask(self, name: str, text: str) -> Solution:
        """The solution of the problem ``name``. An answer that was given before is given again.

        Never fails because of the engine: then the solution has an ``error``. Raises :class:`UsageError` when the name
        stands for another text, and for a new problem after :meth:`close`. After Ctrl-C it may be asked again; the
        engine is opened anew for that.
        """
        name, text = _as_written(name), _as_written(text)
        with self._turn:
            problem = Problem(id=name, text=text)
            if self._asked.setdefault(name, problem).text != text:
                raise UsageError(f"problem {name!r} was asked with another text", hint="give every problem its own id")
            if self._closed:
                if name in self._solver.solutions:
                    return self._solver.solutions[name]
                raise UsageError("this session is closed", hint="open another one on the same directory")
            try:
                self._go_on()
                self._note()
                solution = self._solver.ask(problem)
            except Exception as failure:
                logger.error("problem %s: %s: %s", name, type(failure).__name__, failure)
                self._failed = True
                return self._rescued(problem, f"{type(failure).__name__}: {failure}")
            except BaseException:  # Ctrl-C may have cut a step of the engine in two
                self._failed = True
                self._solver.forget_unfinished()
                raise
            if solution.error is not None:
                logger.warning("problem %s: %s; answered %s", name, solution.error, _told(solution))
            return solution

    def answer(self, name: str, text: str) -> str | None:
        """The winning answer in canonical spelling, the default answer without one, None without both."""
        answer = self.ask(name, text).answer
        return None if answer is None else answer.key

    @property
    def solutions(self) -> dict[str, Solution]:
        """By id, in the order of asking."""
        solved = self._solver.solutions
        return {name: solved[name] for name in self._asked if name in solved}

    def close(self) -> None:
        """Write ``solutions.jsonl`` and ``summary.json``, and close the engine. Closing twice is fine.

        Files that cannot be written are an error in the log and no exception: the answers are given.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            with self._resources:
                self._solver.end()
                if self._out is not None and self._journal is not None:
                    self._note()
                    try:
                        self._write(self._out, self._journal)
                    except (TrtkitError, OSError) as failure:
                        logger.error("%s", failure)

    def _write(self, out: Path, journal: Journal) -> None:
        write_results(out, list(self._asked.values()), self._solver.solutions, self._options, journal, self._grader)
        path = out / PROBLEMS_FILE
        if path.exists():
            found = {"path": str(path), "sha256": digest_file(path)}
            write_json(out / RUN_FILE, {**read_json(out / RUN_FILE, InputError), "problems": found})

    def _go_on(self) -> None:
        """Open the engine anew after a failure."""
        if not self._failed:
            return
        with contextlib.suppress(Exception):
            self._engine.close()
        self._solver.go_on_with(self._engine.enter_context(self._open_engine()))
        self._failed = False

    def _note(self) -> None:
        """Write down what was asked, as far as it is not."""
        missing = [problem for name, problem in self._asked.items() if name not in self._noted]
        if self._out is None or not missing:
            return
        rows = [{"id": problem.id, "problem": problem.text} for problem in missing]
        try:
            append_jsonl(self._out / PROBLEMS_FILE, rows)
        except OutputError as failure:
            logger.warning("%s: %s; goes on without, and tries again", self._out / PROBLEMS_FILE, failure.message)
        else:
            self._noted |= {problem.id for problem in missing}

    def _rescued(self, problem: Problem, error: str) -> Solution:
        try:
            return self._solver.give_up(problem, error)
        except Exception as failure:
            logger.error("problem %s: %s: %s", problem.id, type(failure).__name__, failure)
            settled = self._solver.solutions.get(problem.id)
            return settled or Solution(
                problem_id=problem.id, tally=Tally(weighting=self._options.votes), attempts=(), tokens=0, seconds=0.0,
                error=error, fallback=self._options.fallback,
            )  # fmt: skip


def open_session(
    engine: str | Path | Source, *, problems: int, time_limit: str | float | None = None, policy: str | None = None,
    out: str | Path | None = None, opening: OpenOptions | None = None, began: float | None = None, **options: Any,
) -> Session:  # fmt: skip
    """A session on an engine directory, or on a server (:func:`trtkit.runtime.endpoint.remote.connect`), for about
    ``problems`` problems.

    ``time_limit``: for everything, from ``began`` on (``time.monotonic()``, by default now), such as ``"4h50m"`` or
    seconds; the policy is then ``competition`` unless another is named. ``options`` are fields of
    :class:`SolveOptions` and win over the policy's; ``opening`` is how the engine is opened; a server takes its
    rows alone.

    Raises :class:`UsageError` for options that make no sense and for an ``out`` that holds another run, and
    :class:`EngineError` for a directory that holds no engine.
    """
    began = time.monotonic() if began is None else began
    limit = parse_duration(time_limit, "time_limit") if isinstance(time_limit, str) else time_limit
    name = policy or ("competition" if limit is not None else None)
    chosen = {} if name is None else dict(policy_named(name, time_limit=limit))
    unknown = sorted(set(options) - set(SolveOptions.__dataclass_fields__))
    if unknown:
        raise UsageError("options that a session does not know", offenders=unknown)
    settled = SolveOptions(**{**chosen, "policy": name, "time_limit": limit, **options})
    source = DirectorySource.of(Path(engine)) if isinstance(engine, str | Path) else engine
    return Session(
        lambda: source.open(opening, patient=limit is not None), source.chat, settled, problems=problems,
        engine=source.place, out=None if out is None else Path(out), began=began,
    )  # fmt: skip


def _asked_before(out: Path) -> dict[str, Problem]:
    """What an earlier session wrote down. A last line that a crash has torn is taken away, and asked again."""
    path = out / PROBLEMS_FILE
    if not path.exists():
        return {}
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        write_text(path, whole.decode())
    return {problem.id: problem for problem in read_problems(path)} if whole else {}


def _told(solution: Solution) -> str:
    return "nothing" if solution.answer is None else solution.answer.key


def _as_written(said: object) -> str:
    """An id or a text as a file of problems holds it: ids may come as numbers, texts with half of a surrogate pair."""
    text = str(said).encode(errors="replace").decode()
    return text if text.strip() else _BLANK
