"""The checkpoint that all peers run: random weights in a real shape, with a byte-level tokenizer of the right size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from make_shape_checkpoint import shape_spec, write_checkpoint

from trtkit.model_spec import ModelSpec
from trtkit.staging import staged_dir

__all__ = ["make_checkpoint", "write_tokenizer"]

_PRACTICE = Path(__file__).resolve().parents[2] / "engines" / "practice"


def make_checkpoint(shape: str, out: Path) -> Path:
    """Random weights of ``shape`` (a name of make_shape_checkpoint, or ``tiny`` for tests) with a tokenizer; once."""
    if (out / "config.json").is_file():
        return out
    with staged_dir(out) as stage:
        spec = _tiny() if shape == "tiny" else shape_spec(shape)
        write_checkpoint(spec, stage / "weights")
        for path in (stage / "weights").iterdir():
            path.rename(stage / path.name)
        (stage / "weights").rmdir()
        write_tokenizer(stage, spec.vocab)
        # The formats that need calibrating take their text from here; nobody measures quality on random weights.
        shutil.copy(_PRACTICE / "calibration.jsonl", stage / "calibration.jsonl")
    return out


def _tiny() -> ModelSpec:
    import dataclasses

    return dataclasses.replace(
        shape_spec("0.5b"), layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=512, vocab=1024,
        max_positions=512,
    )  # fmt: skip


def write_tokenizer(directory: Path, vocab: int) -> None:
    """The practice model's tokenizer, padded with tokens that no text contains up to ``vocab``."""
    tokenizer: dict[str, Any] = json.loads((_PRACTICE / "tokenizer.json").read_text(encoding="utf-8"))
    taken = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    tokenizer["model"]["vocab"].update({f"unused-{index}": index for index in range(taken, vocab)})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copy(_PRACTICE / "tokenizer_config.json", directory / "tokenizer_config.json")
