"""The draft head of an engine: does it fit the model, and its place in the engine directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from drafter.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    DrafterError,
    check_weights,
    copy_weights,
    read_config,
    weights_file,
)
from trtkit.chat import Chat
from trtkit.errors import CheckpointError, UnsupportedError
from trtkit.files import digest_file, read_json
from trtkit.model_spec import ModelSpec
from trtkit.recipe import DRAFTER_DIR, TOKEN_ORDER_FILE, TRAINING_FILE

__all__ = ["PLAN_FILE", "add_head", "check_head", "head_bytes"]

PLAN_FILE = "work/plan.json"
"""In the directory of a training: what it was asked to do."""


def check_head(directory: Path, spec: ModelSpec, chat: Chat) -> None:
    """Raises :class:`CheckpointError` for what is no head, :class:`UnsupportedError` for one of another model."""
    try:
        config = read_config(directory)
        # Now, not when the finished engine is opened.
        check_weights(directory)
    except DrafterError as problem:
        unfinished = (directory / PLAN_FILE).is_file()
        hint = (
            f"its training is not finished: `trtkit inspect {directory}` prints the command that goes on with it"
            if unfinished
            else "pass the --out directory of `trtkit train-drafter`"
        )
        raise CheckpointError(str(problem), hint=hint) from None
    wrong = [
        f"{name}: {theirs} in the head, {ours} in the model"
        for name, theirs, ours in (
            ("hidden size", config.hidden_size, spec.hidden),
            ("vocabulary", config.vocab_size, spec.vocab),
        )
        if theirs != ours
    ]
    training = directory / TRAINING_FILE
    if training.is_file():
        template = read_json(training, CheckpointError).get("chat_template_sha256")
        if template is not None and template != chat.template_digest:
            wrong.append("chat template: the head was trained on text in another format")
    if wrong:
        raise UnsupportedError(
            "the draft head belongs to another model",
            where=str(directory),
            offenders=wrong,
            hint="train one for this model with `trtkit train-drafter`",
        )


def head_bytes(directory: Path | None) -> int:
    """What the weights of a head take on a disk; nothing without one."""
    try:
        return 0 if directory is None else weights_file(directory).stat().st_size
    except DrafterError:
        return 0


def add_head(directory: Path, stage: Path) -> dict[str, str]:
    """Copy the head into the engine directory, its weights as safetensors; digests of its files by their path in it."""
    target = stage / DRAFTER_DIR
    target.mkdir()
    for name in (CONFIG_FILE, TRAINING_FILE, TOKEN_ORDER_FILE):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, target / name)
    if (weights := weights_file(directory)).name == WEIGHTS_FILE:
        shutil.copyfile(weights, target / WEIGHTS_FILE)
    else:
        copy_weights(directory, target / WEIGHTS_FILE)
    return {f"{DRAFTER_DIR}/{path.name}": digest_file(path) for path in sorted(target.iterdir())}
