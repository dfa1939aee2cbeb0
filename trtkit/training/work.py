"""The ``work`` folder of a training: whose it is, and the texts to train on. An interrupted training goes on from it.

work/plan.json        what was asked for; nothing else may go on here
work/training.lock    held by the process that works here
work/answers.jsonl    the target's own answers as they come (answers.py)
work/samples.jsonl    all texts, once they are whole
work/state.pt         head, optimizer and number of updates (drafter/train.py)
work/measures.jsonl   what was measured of the trained head (measures.py)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from drafter.checkpoint import CONFIG_FILE
from drafter.data import Sample, is_held_out
from drafter.train import STATE_FILE, StateError, saved_updates
from trtkit.build.draft_head import PLAN_FILE
from trtkit.chat import Chat, variant_named
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.errors import CheckpointError, InputError, OutputError, UsageError
from trtkit.files import append_jsonl, read_json, read_jsonl, write_json
from trtkit.locks import exclusive
from trtkit.runtime.api import SamplingParams
from trtkit.runtime.model import DecoderModel
from trtkit.training.answers import Asking, checkpoint_digest, own_answers
from trtkit.training.plan import TrainingPlan
from trtkit.training.rows import Row, read_rows
from trtkit.training.target import target_engine, written_answers

__all__ = [
    "ANSWERS_FILE",
    "MEASURES_FILE",
    "SAMPLES_FILE",
    "WORK",
    "claimed",
    "read_samples",
    "updates_saved",
    "useless_state",
]

WORK = "work"
ANSWERS_FILE = "answers.jsonl"
SAMPLES_FILE = "samples.jsonl"
MEASURES_FILE = "measures.jsonl"
_OF_TEXTS = {"model", "data", "own", "rows", "split", "variants", "seed", "max_tokens"}
"""The settings that the texts depend on."""


@contextlib.contextmanager
def claimed(out: Path, plan: TrainingPlan) -> Iterator[list[Row]]:
    """The work folder as this process's own, for this plan; the rows to make texts of, none when these are made.

    Unusable rows leave no trace. Raises :class:`UsageError` when the folder belongs to another plan,
    :class:`OutputError` when another process works in it or ``out`` holds something else, and what :func:`read_rows`
    raises.
    """
    work = out / WORK
    _check_place(out)
    _is_there(work, plan)
    rows = [] if (work / SAMPLES_FILE).is_file() else _rows(plan)
    with exclusive(work / "training.lock", "this training"):
        if not _is_there(work, plan):
            write_json(out / PLAN_FILE, _as_json(plan))
        yield rows


def _check_place(out: Path) -> None:
    """Refuse what is no directory, or one with files of something else: a head has the names of a checkpoint's."""
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, not a directory", where=str(out), hint="choose another --out")
    if out.is_dir() and not (out / PLAN_FILE).is_file():
        others = sorted(path.name for path in out.iterdir() if path.name != WORK)
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise OutputError(
                f"holds something else, which the head might write over: {shown}",
                where=str(out),
                hint="choose another --out, or remove the directory yourself",
            )


def _is_there(work: Path, plan: TrainingPlan) -> bool:
    """Whether the folder is this plan's. A plan alone is a start that failed: there is nothing to protect."""
    path = work.parent / PLAN_FILE
    if not path.is_file():
        return False
    there, wanted = read_json(path), _as_json(plan)
    names = [name for name, value in wanted.items() if there.get(name) != value]
    precious = (work.parent / CONFIG_FILE, *(work / name for name in (ANSWERS_FILE, SAMPLES_FILE, STATE_FILE)))
    if names and any(path.is_file() for path in precious):
        texts = ", or remove the directory yourself"
        if not {*names} & _OF_TEXTS and (work / SAMPLES_FILE).is_file():
            texts = f"; with a copy of {work / SAMPLES_FILE} in its {WORK}/ the texts are not made again"
        raise UsageError(
            "this directory holds another training",
            where=str(work.parent),
            offenders=[f"{name}: {there.get(name)} there, {wanted[name]} now" for name in names],
            hint=f"choose another --out{texts}",
        )
    return not names


def _as_json(plan: TrainingPlan) -> dict[str, object]:
    data: dict[str, object] = json.loads(json.dumps(asdict(plan)))
    return data


def _rows(plan: TrainingPlan) -> list[Row]:
    rows = read_rows(plan.data, count=plan.rows, split=plan.split, solutions=not plan.own)
    # Now, not after the hours in which the target writes its answers.
    _check_sides([row.problem for row in rows], plan, "usable row(s)", "pass more rows")
    return rows


def _check_sides(problems: Sequence[str], plan: TrainingPlan, what: str, fix: str) -> None:
    held = sum(is_held_out(problem, plan.held_out) for problem in problems)
    if held in (0, len(problems)):
        which = "all" if held else "none"
        raise InputError(
            f"of {len(problems)} {what} {which} would be held out to measure the head on" if problems else f"no {what}",
            where=plan.data,
            hint=f"{fix}; {plan.held_out:.0%} of the problems are held out, chosen by their text",
        )


def read_samples(
    plan: TrainingPlan, work: Path, rows: list[Row], chat: Chat, model: DecoderModel, checkpoint: UnifiedCheckpoint
) -> list[Sample]:
    """Tokenized texts, made of ``rows`` once and kept in ``work``."""
    path = work / SAMPLES_FILE
    if not path.is_file():
        aside = work / "samples.tmp"
        aside.unlink(missing_ok=True)
        append_jsonl(aside, (asdict(sample) for sample in _texts(plan, work, rows, chat, model, checkpoint)))
        aside.rename(path)
        (work / ANSWERS_FILE).unlink(missing_ok=True)
    try:
        return [
            Sample(problem=row["problem"], tokens=tuple(row["tokens"]), prompt=row["prompt"])
            for _, row in read_jsonl(path)
        ]
    except (InputError, KeyError, TypeError) as problem:
        said = f" ({problem.offenders[0]})" if isinstance(problem, InputError) and problem.offenders else ""
        raise InputError(
            f"the texts cannot be read{said}", where=str(path), hint="delete the file: they are made again"
        ) from None


def _texts(
    plan: TrainingPlan, work: Path, rows: list[Row], chat: Chat, model: DecoderModel, checkpoint: UnifiedCheckpoint
) -> list[Sample]:
    variants = [variant_named(name) for name in plan.variants]
    longest = min(plan.max_tokens, model.spec.max_positions)
    short = (f"problem(s) that leave room for an answer in {longest} tokens", "pass more rows, or raise --max-tokens")
    if not plan.own:
        written = written_answers(rows, chat, variants, max_tokens=longest)
        _check_sides([sample.problem for sample in written], plan, *short)
        return written
    prompts = [chat.prompt(row.problem, variants[n % len(variants)]) for n, row in enumerate(rows)]
    fitting = [row.problem for row, prompt in zip(rows, prompts, strict=True) if len(prompt) < longest]
    _check_sides(fitting, plan, *short)
    asking = Asking(
        checkpoint=checkpoint_digest(checkpoint),
        problems=tuple(row.problem for row in rows),
        prompts=tuple(prompts),
        stop_ids=chat.eos_ids,
        # The Fast-Math cards' sampling would cut the tail; the head should know the model at temperature 1.
        sampling=SamplingParams(),
        max_tokens=longest,
        seed=plan.seed,
    )
    with target_engine(model, None, longest) as engine:
        return own_answers(asking, engine, work / ANSWERS_FILE)


def updates_saved(work: Path) -> tuple[int, int] | None:
    """(updates done, updates in all) of the saved state; None where there is none. Raises :class:`CheckpointError`."""
    try:
        return saved_updates(work)
    except StateError as problem:
        raise useless_state(problem) from None


def useless_state(problem: StateError) -> CheckpointError:
    """What to do about a state that cannot be gone on from."""
    return CheckpointError(str(problem), hint="delete it: the training starts over, on the same texts")
