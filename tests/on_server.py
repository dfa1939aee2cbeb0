"""What tests solve on a server: engine directories of the practice model, servers of them, and what a run leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.serve.serving import Talk, serving
from trtkit.bundled import practice_dir
from trtkit.chat import Chat, load_chat
from trtkit.recipe import EngineManifest, Limits, Recipe, read_manifest, write_manifest
from trtkit.runtime.api import Engine
from trtkit.runtime.endpoint import engine as endpoint_engine
from trtkit.runtime.endpoint.remote import Remote
from trtkit.runtime.endpoint.server import endpoint_named, look_at
from trtkit.runtime.load import OpenOptions, open_engine


class Known(Talk):
    """Its template can be told from others."""

    def __init__(self, template: str = "abc") -> None:
        super().__init__()
        self.template_digest = template


CHAT = cast(Chat, Known())


def practice_engine(directory: Path, *, rows: int = 8) -> Path:
    """An engine directory of the practice model, in float32, where no batch changes a token."""
    shutil.copytree(practice_dir(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
    recipe = Recipe(
        model=str(directory), precision="bf16", limits=Limits(batch=rows, prompt_tokens=200, total_tokens=512)
    )  # fmt: skip
    write_manifest(
        directory,
        EngineManifest(
            recipe=recipe, backend="torch", versions={}, checkpoint_digest={}, quality=None,
            created="2026-01-01T00:00:00Z",
        ),
    )  # fmt: skip
    return directory


@contextlib.contextmanager
def served(directory: Path, opening: Callable[[], Engine] | None = None, **options: Any) -> Iterator[str]:
    """The address of a server of that engine directory, which a client can load the tokenizer from."""
    here = OpenOptions(device="cpu", threads=1)
    opened = opening or (lambda: open_engine(directory, here))
    with serving(opened, load_chat(directory), manifest=read_manifest(directory), **options) as (url, _):
        yield url


def remote(url: str, chat: Chat = CHAT, **named: Any) -> Remote:
    """A server whose tokenizer is no file."""
    endpoint = endpoint_named(url, **named)
    return Remote(endpoint=endpoint, server=look_at(endpoint), chat=chat)


def practice_problems(path: Path, places: Sequence[int] = (0, 1, 2)) -> Path:
    """Some of the practice model's problems."""
    lines = (practice_dir() / "problems.jsonl").read_text("utf-8").splitlines()
    path.write_text("".join(lines[place] + "\n" for place in places), "utf-8")
    return path


def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.4) -> None:
    """A server that is gone ends a run soon."""
    monkeypatch.setitem(endpoint_engine.EndpointEngine.__init__.__kwdefaults__, "patience", seconds)
    monkeypatch.setattr(endpoint_engine, "_FIRST_DELAY_SECONDS", 0.05)


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text("utf-8").splitlines()]


def attempts(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Every sample that ended, without when, and without how sure it was: that is rounded as the batch has it."""
    idle = ("seconds", "clock", "used", "confidence")
    return {
        (row["problem"], row["index"]): {name: row[name] for name in row if name not in idle}
        for row in journal(out)
        if row["kind"] == "attempt"
    }


def confidences(out: Path) -> dict[tuple[str, int], float]:
    """How sure the samples were that say so."""
    return {(row["problem"], row["index"]): row["confidence"] for row in journal(out) if "confidence" in row}


def counted(out: Path) -> dict[str, Any]:
    """What was voted on and came out of it, per problem. How far samples had come that were not needed, and when, is
    another matter."""
    ended = attempts(out)
    return {
        row["problem"]: {
            **{name: row[name] for name in ("answer", "votes", "stopped_early", "error", "counted")},
            "samples": [ended[row["problem"], index] for index in row["counted"]],
        }
        for row in journal(out)
        if row["kind"] == "solution"
    }


def check_same(one: Path, other: Path) -> None:
    """Two runs said and counted the same."""
    assert counted(one) == counted(other)
    mine, theirs = attempts(one), attempts(other)
    both = mine.keys() & theirs.keys()
    assert {name: mine[name] for name in both} == {name: theirs[name] for name in both}
    sure, surely = confidences(one), confidences(other)
    both = sure.keys() & surely.keys()
    assert {name: sure[name] for name in both} == pytest.approx({name: surely[name] for name in both}, abs=1e-4)
