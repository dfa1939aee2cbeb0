"""One run of ``trtkit solve``: a problems file, an engine, and a run directory that can be interrupted and
resumed.

    run.json          what was asked: versions, digests of the problems file and of engine.json, arguments
    journal.jsonl     every sample and problem as it finished (append-only)
    solutions.jsonl   one line per problem, in the order of the problems file
    summary.json      the figures

How to call it::

    from trtkit.solve.display import observer_for
    from trtkit.interrupts import sigterm_as_interrupt
    from trtkit.solve.run import Places, run_solve

    places = Places(problems=Path("problems.jsonl"), engine=engine_dir, out=run_dir)
    with sigterm_as_interrupt():
        outcome = run_solve(places, lambda: open_engine(engine_dir), load_chat(engine_dir), options,
                            observer=observer_for(quiet=False), force_new=False)
    outcome.summary.document()      # the JSON document
    result_table(outcome.verdicts)  # a rich Table (display.py)

The engine is opened only after everything else was checked, and not at all when nothing is left to do.
Ctrl-C and SIGTERM arrive as ``KeyboardInterrupt`` after the results so far were written; the same call goes
on from there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trtkit import __version__
from trtkit.chat import Chat
from trtkit.errors import EngineError, InputError, OutputError, UsageError
from trtkit.files import digest_file, write_json, write_text
from trtkit.log import logger
from trtkit.recipe import ENGINE_FILE
from trtkit.runtime.api import Engine
from trtkit.solve.answers import AnswerMode, read_answer
from trtkit.solve.contest import earlier_solutions
from trtkit.solve.engine_figures import engine_figures
from trtkit.solve.grading import Grader
from trtkit.solve.journal import Journal
from trtkit.solve.late import answer_late, out_of_time
from trtkit.solve.observer import Observer
from trtkit.solve.options import SolveOptions
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.records import Solution
from trtkit.solve.run_head import JOURNAL_FILE, RUN_FILE, SOLUTIONS_FILE, SUMMARY_FILE, read_head
from trtkit.solve.sandbox import open_sandbox
from trtkit.solve.solver import Solver
from trtkit.solve.summary import Summary, Verdict, judge, solution_row, summarise

__all__ = ["Outcome", "Places", "claim", "identity_of", "run_solve", "write_results"]

_SEEDS = "engine.seeds"
_FREE = ("problems.path", "engine.path", _SEEDS, "arguments.outstanding")
"""What a resumed run may have different: where things lie, whether a server is given seeds (it may die of one, and its
samples are as good without), and how full the batch is kept (memory may be scarcer)."""
_ADDED = {
    "arguments.kill_loops": "false",
    "arguments.force_close": "false",
    "arguments.weighting": '"majority"',
    "arguments.save_confidence": "false",
}
"""What older versions did, which did not have these arguments: so their runs can be gone on with. Arguments that are
null now need no entry."""
_DIGESTS = {
    "problems.sha256": "problems: the file is another one, or was changed since",
    "engine.sha256": "engine: it is another one, or was built anew since",
}
"""What differs in words where the values say nothing."""
_PACKAGES = ("torch", "transformers", "tokenizers", "math-verify", "tensorrt-llm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a run reads and writes."""

    problems: Path
    engine: Path | Mapping[str, str]
    """Engine directory, whose engine.json becomes part of the run's identity; or the identity of what takes its place,
    with where it is as ``path``."""
    out: Path
    """Run directory; made if missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished run."""

    summary: Summary
    verdicts: tuple[Verdict, ...]
    """One per problem, in file order."""


def run_solve(
    places: Places,
    open_engine: Callable[[], Engine],
    chat: Chat,
    options: SolveOptions,
    *,
    observer: Observer | None = None,
    force_new: bool = False,
    began: float | None = None,
) -> Outcome:
    """Solve the problems, or go on with a run that was interrupted.

    A time limit counts from ``began`` (``time.monotonic()``; by default from this call), so pass the start of the
    program. ``force_new`` throws away what the run directory holds of an earlier run. Raises :class:`InputError` for
    the problems file, :class:`UsageError` when the directory holds a run with other arguments, problems or
    engine (listing every difference), :class:`OutputError` when it cannot be written or another process is
    working in it.
    """
    began = time.monotonic() if began is None else began
    problems = read_problems(places.problems)
    _check_golds(problems, options.mode, places.problems)
    asked = {"path": str(places.problems), "sha256": digest_file(places.problems)}
    identity = {"problems": asked, **identity_of(places.engine, options)}
    with Journal(places.out / JOURNAL_FILE, fresh=force_new) as journal, Grader() as grader:
        claim(places.out, identity, force_new=force_new)
        solutions: dict[str, Solution] = {}
        try:
            solutions = earlier_solutions(problems, journal, options, grader.same)
            starting = time.monotonic() - began
            if len(solutions) < len(problems) and out_of_time(options, journal.history.spent_seconds + starting):
                logger.warning(
                    "the time limit was over before the engine could be opened; answering from what is there"
                )
                late = answer_late(problems, solutions, journal, options, loading_seconds=starting)
                solutions |= late
            elif len(solutions) == len(problems):
                logger.info("all %d problem(s) were solved before; these are the results", len(problems))
            if len(solutions) < len(problems):
                with open_sandbox(options.tools) as sandbox, open_engine() as engine:
                    solver = Solver(engine, chat, options, grader, journal, observer)
                    try:
                        solver.solve(problems, loading_seconds=time.monotonic() - began, sandbox=sandbox)
                    finally:
                        solutions = solver.solutions
        except KeyboardInterrupt:
            _write_solutions(places.out, problems, solutions, options.mode, grader)
            logger.info(
                "interrupted with %d of %d problems solved; the same command goes on from here",
                len(solutions),
                len(problems),
            )
            raise
        return write_results(places.out, problems, solutions, options, journal, grader)


def write_results(
    out: Path, problems: Sequence[Problem], solutions: Mapping[str, Solution], options: SolveOptions,
    journal: Journal, grader: Grader,
) -> Outcome:  # fmt: skip
    """``solutions.jsonl`` and ``summary.json`` of the problems that have a solution."""
    seconds = journal.seconds  # before the answers are held against known ones, which may take long
    stats = [*journal.history.engines, *([journal.engine] if journal.engine else [])]
    verdicts = _write_solutions(out, problems, solutions, options.mode, grader)
    figures = engine_figures(stats) if stats else None
    if figures is not None and figures.warning:
        logger.warning("%s", figures.warning)
    summary = summarise(
        verdicts,
        samples=options.samples,
        seconds=seconds,
        run_dir=out,
        time_limit=options.time_limit,
        loading_seconds=journal.loading_seconds,
        engine=figures,
    )
    write_json(out / SUMMARY_FILE, summary.document())
    return Outcome(summary=summary, verdicts=tuple(verdicts))


def _check_golds(problems: Sequence[Problem], mode: AnswerMode, path: Path) -> None:
    if mode.kind != "integer":
        return
    wrong = [
        f"problem {problem.id}: {problem.answer!r}"
        for problem in problems
        if problem.answer is not None and read_answer(problem.answer, mode) is None
    ]
    if wrong:
        raise InputError(
            f"{len(wrong)} gold answer(s) that are no integer, in answer mode integer",
            where=str(path),
            offenders=wrong[:20],
            hint="use --answer-mode auto",
        )


def identity_of(engine: Path | Mapping[str, str], options: SolveOptions) -> dict[str, Any]:
    """What makes a run the same run, but for its problems. Raises :class:`EngineError` where there is no engine."""
    if not isinstance(engine, Path):
        return {"engine": dict(engine), "arguments": options.to_data()}
    manifest = engine / ENGINE_FILE
    try:
        digest = digest_file(manifest)
    except OSError:
        raise EngineError(f"not an engine directory (no {ENGINE_FILE})", where=str(engine)) from None
    return {"engine": {"path": str(engine), "sha256": digest}, "arguments": options.to_data()}


def claim(out: Path, identity: Mapping[str, Any], *, force_new: bool) -> None:
    """Write run.json, or hold ``identity`` against the one that is there.

    A run.json without a journal is a start that failed, say for its device: there is nothing in it to protect.
    """
    path, journal = out / RUN_FILE, out / JOURNAL_FILE
    versions = _versions()
    if force_new:
        _remove(out / name for name in (RUN_FILE, SOLUTIONS_FILE, SUMMARY_FILE))
    elif path.exists() and journal.exists():
        found = read_head(out)
        wanted, there = _flat(identity), _ADDED | _flat(found)
        names = [name for name in {**there, **wanted} if name.split(".")[0] in identity]
        differences = [
            _DIGESTS.get(name)
            or f"{name}: {there.get(name, 'not there')} in that run, {wanted.get(name, 'not there')} now"
            for name in names
            if there.get(name, "null") != wanted.get(name, "null") and name not in _FREE
        ]
        if differences:
            raise UsageError(
                "this directory holds a different run",
                where=str(out),
                offenders=differences,
                hint="choose another directory with --out, or start over in this one with --force-new",
            )
        changed = {k: v for k, v in versions.items() if (found.get("versions") or {}).get(k) != v}
        if changed:
            logger.warning("resuming a run that began with other versions; now: %s", json.dumps(changed))
        if _SEEDS in wanted and _SEEDS not in there:  # from here on not all samples have one
            write_json(path, {**found, "engine": {**found["engine"], "seeds": identity["engine"]["seeds"]}})
        return
    elif journal.exists():
        raise UsageError(
            f"there is a journal but no {RUN_FILE}, so nobody knows what it belongs to",
            where=str(out),
            hint="choose another directory with --out, or start over in this one with --force-new",
        )
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"version": 1, "created": created, "versions": versions, **identity})


def _remove(paths: Iterator[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as problem:
            raise OutputError(f"cannot be removed: {problem.strerror or problem}", where=str(path)) from None


def _versions() -> dict[str, str]:
    versions = {"trtkit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": "1"}``."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def _write_solutions(
    out: Path,
    problems: Sequence[Problem],
    solutions: Mapping[str, Solution],
    mode: AnswerMode,
    grader: Grader,
) -> list[Verdict]:
    solved = [problem for problem in problems if problem.id in solutions]
    verdicts = judge(solved, [solutions[problem.id] for problem in solved], mode, grader)
    rows = (json.dumps(solution_row(verdict), ensure_ascii=False) for verdict in verdicts)
    write_text(out / SOLUTIONS_FILE, "".join(row + "\n" for row in rows))
    return verdicts
