"""How far an unfinished training is, for people who find its directory."""

from __future__ import annotations

from pathlib import Path

from trtkit.build.draft_head import PLAN_FILE
from trtkit.files import JsonObject, read_json
from trtkit.training.answers import count_answers
from trtkit.training.work import ANSWERS_FILE, SAMPLES_FILE, WORK, updates_saved

__all__ = ["look_at_training"]


def look_at_training(out: Path) -> tuple[dict[str, str], JsonObject]:
    """(facts for people, ``{"training": {"plan", "stage", "done", "total"}}``); the stages are answers, updates and
    measuring. Raises :class:`ConfigError` for a damaged plan, :class:`CheckpointError` for a damaged state."""
    plan = read_json(out / PLAN_FILE)
    work = out / WORK
    stage, done, total = "answers", 0, 0
    if (found := updates_saved(work)) is not None:
        (done, total), stage = found, "updates"
        said = f"{done:,} of {total:,} updates are saved"
        if done == total:
            stage, said = "measuring", "all updates are done; what is left is to measure the head"
    elif (work / SAMPLES_FILE).is_file():
        stage, said = "updates", "the texts are all there; no update is saved yet"
    elif (work / ANSWERS_FILE).is_file():
        done, total = count_answers(work / ANSWERS_FILE)
        said = f"{done:,} of {total:,} of the model's own answers are there"
    else:
        said = "nothing is kept yet"
    data = str(plan.get("data"))
    facts = {
        "model": str(plan.get("model")),
        "texts": f"the model's own answers to {data}" if plan.get("own") else data,
        "standing": said,
    }
    return facts, {"training": {"plan": plan, "stage": stage, "done": done, "total": total}}
