"""What the target itself writes on the problems, kept answer by answer: hours of work that an interruption spares.

answers.jsonl holds a line that says what the answers depend on, then one line for each answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from drafter.data import Sample
from trtkit.checkpoint.unified import UnifiedCheckpoint
from trtkit.errors import InputError, OutputError, UsageError
from trtkit.files import JsonObject, append_jsonl, digest_file
from trtkit.log import Progress, logger
from trtkit.runtime.api import Engine, Request, SamplingParams

__all__ = ["Asking", "KeptAnswers", "checkpoint_digest", "count_answers", "own_answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """All that the answers depend on, but for rounding."""

    checkpoint: str
    """Digest of the target's files."""
    problems: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    """One per problem."""
    stop_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    seed: int

    @property
    def head(self) -> JsonObject:
        """The first line of answers.jsonl."""
        prompts = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "version": 1, "problems": len(self.prompts), "prompts_sha256": prompts,
            "checkpoint_sha256": self.checkpoint,
            "stop_ids": list(self.stop_ids), "sampling": asdict(self.sampling), "max_tokens": self.max_tokens,
            "seed": self.seed,
        }  # fmt: skip


def checkpoint_digest(checkpoint: UnifiedCheckpoint) -> str:
    """SHA-256 over the configuration and every weight file."""
    files = {checkpoint.directory / "config.json", *(entry.path for entry in checkpoint.shards.entries.values())}
    digests = hashlib.sha256()
    with Progress("look at the weights", total=len(files), unit="files", after_seconds=2) as progress:
        for path in progress.track(sorted(files)):
            digests.update(digest_file(path).encode())
    return digests.hexdigest()


def own_answers(asking: Asking, engine: Engine, path: Path) -> list[Sample]:
    """One sample for each problem whose prompt leaves room for an answer. Those that ``path`` holds are not asked for
    again, and the others are appended to it as they end. Raises what :class:`KeptAnswers` does."""
    kept = KeptAnswers(path, asking.head)
    fitting = [index for index, prompt in enumerate(asking.prompts) if len(prompt) < engine.max_total_tokens]
    missing = [index for index in fitting if index not in kept.tokens]
    if kept.tokens:
        logger.info("own answers: %d of %d are there already", len(fitting) - len(missing), len(fitting))
    for index in missing:
        engine.submit(
            Request(id=str(index), prompt=asking.prompts[index], sampling=asking.sampling, stop_ids=asking.stop_ids,
                    max_tokens=asking.max_tokens, seed=asking.seed + index)
        )  # fmt: skip
    if not missing:
        return _samples(asking, fitting, kept)
    growing: dict[str, list[int]] = {str(index): [] for index in missing}
    with Progress("own answers", total=len(missing), unit="problems") as progress:
        while engine.has_work:
            ended = []
            for output in engine.step():
                growing[output.request_id] += output.tokens
                if output.finish is not None:
                    ended.append(output.request_id)
            kept.add({int(name): growing.pop(name) for name in ended})
            if ended:
                progress.advance(len(ended))
    return _samples(asking, fitting, kept)


def _samples(asking: Asking, numbers: Sequence[int], kept: KeptAnswers) -> list[Sample]:
    return [
        Sample(
            problem=asking.problems[index],
            tokens=(*asking.prompts[index], *kept.tokens[index]),
            prompt=len(asking.prompts[index]),
        )
        for index in numbers
    ]


class KeptAnswers:
    """The answers in ``path``, by their problem's number.

    A torn last line is dropped. Raises :class:`UsageError` when they were written for something else than ``head``,
    :class:`InputError` when they cannot be read, :class:`OutputError` when none can be added.
    """

    def __init__(self, path: Path, head: Mapping[str, object]) -> None:
        self._path = path
        self.tokens: dict[int, tuple[int, ...]] = {}
        lines = _whole_lines(path)
        if not lines:
            append_jsonl(path, [head])
            return
        _check_head(path, lines[0], json.loads(json.dumps(head)))
        for number, line in enumerate(lines[1:], start=2):
            try:
                row = json.loads(line)
                index, tokens = row["index"], row["tokens"]
                if not all(type(value) is int for value in (index, *tokens)):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                logger.warning("%s:%d: not a whole answer, which is asked for again", path, number)
                continue
            self.tokens.setdefault(index, tuple(tokens))

    def add(self, answers: Mapping[int, Sequence[int]]) -> None:
        """Keep them: on the disk when this returns."""
        if answers:
            append_jsonl(self._path, ({"index": index, "tokens": tokens} for index, tokens in answers.items()))
            self.tokens |= {index: tuple(tokens) for index, tokens in answers.items()}


def count_answers(path: Path) -> tuple[int, int]:
    """(answers in ``path``, problems asked): for people, nothing is checked."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return max(len(lines) - 1, 0), int(json.loads(lines[0])["problems"])
    except (IndexError, ValueError, TypeError, KeyError):
        return 0, 0


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of ``path``; what stands behind the last end of a line is cut off the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise InputError(f"cannot be read: {problem.strerror or problem}", where=str(path)) from None
    *lines, torn = raw.split(b"\n")
    if torn:
        try:
            with path.open("r+b") as stream:
                stream.truncate(len(raw) - len(torn))
        except OSError as problem:
            raise OutputError(f"cannot be written: {problem.strerror or problem}", where=str(path)) from None
    return lines


def _check_head(path: Path, line: bytes, wanted: JsonObject) -> None:
    try:
        there = json.loads(line)
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise InputError("its first line is damaged", where=f"{path}:1", hint="delete the file: the answers are lost")
    different = [
        f"{name}: {there.get(name)} there, {wanted.get(name)} now"
        for name in {**wanted, **there}
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise UsageError(
            "the answers that are kept here were written for something else",
            where=str(path),
            offenders=different,
            hint="bring back the model and the problems as they were, choose another --out, or delete this file",
        )
