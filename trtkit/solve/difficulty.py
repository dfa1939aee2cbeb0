"""Difficulty on the solving side: what finished runs say of it, and what a regressor says of new problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtkit.difficulty import Labelled, load_regressor
from trtkit.errors import InputError
from trtkit.log import logger
from trtkit.solve.ends import Ending
from trtkit.solve.journal import read_history
from trtkit.solve.problems import Problem, read_problems
from trtkit.solve.run_head import JOURNAL_FILE, RUN_FILE, problems_file, read_head

__all__ = ["is_run", "labels_of_run", "predict_tokens"]


def predict_tokens(directory: Path, problems: Sequence[Problem]) -> dict[str, float]:
    """Expected tokens of one sample of each problem, by problem id.

    Raises :class:`CheckpointError` when ``directory`` holds no regressor, :class:`QualityError` when the one it holds
    is no better than the mean.
    """
    guesses = load_regressor(directory).predict([problem.text for problem in problems])
    return {problem.id: guess for problem, guess in zip(problems, guesses, strict=True)}


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory or its journal, rather than a file of rows."""
    return path.is_dir() or (path.name == JOURNAL_FILE and (path.parent / RUN_FILE).is_file())


def labels_of_run(path: Path) -> list[Labelled]:
    """Each problem of a run (its directory or its journal) with the mean tokens of its finished samples.

    Raises :class:`InputError` when the run has no samples, or its problems file is gone or was changed.
    """
    directory = path if path.is_dir() else path.parent
    journal = directory / JOURNAL_FILE
    if not journal.is_file() or not (directory / RUN_FILE).is_file():
        raise InputError(
            f"not a run directory (no {RUN_FILE} or {JOURNAL_FILE})",
            where=str(directory),
            hint="pass what `trtkit solve` wrote, or a JSONL file with problem and tokens",
        )
    run = read_head(directory)
    full_vote = bool((run.get("arguments") or {}).get("full_vote"))
    texts = {problem.id: problem.text for problem in read_problems(problems_file(directory, run))}
    attempts = read_history(journal).attempts
    finished = {name: [a for a in all_ if a.ending is not Ending.DEADLINE] for name, all_ in attempts.items()}
    labels = [
        Labelled(problem=texts[name], tokens=sum(a.tokens for a in done) / len(done), samples=len(done))
        for name, done in finished.items()
        if name in texts and any(a.tokens for a in done)
    ]
    if not labels:
        raise InputError("no sample of this run has finished", where=str(journal))
    cut = sum(map(len, attempts.values())) - sum(map(len, finished.values()))
    if cut:
        logger.warning(
            "%s: %d sample(s) that the time limit cut off are left out, so long samples are missing; runs without one "
            "teach better",
            directory,
            cut,
        )
    if not full_vote:
        logger.warning(
            "%s: samples that were still running when the vote was decided are not in the journal, so long samples are "
            "missing; runs with --full-vote teach better",
            directory,
        )
    return labels
