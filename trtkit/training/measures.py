"""What was measured of a trained head, kept part by part: minutes of work that an interruption spares.

Each line of measures.jsonl holds the head that it is about (a digest of its weights), the part's name and its results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from drafter.model import Drafter
from trtkit.files import JsonObject, append_jsonl
from trtkit.log import logger
from trtkit.training.evaluate import DepthHits, TreeResult

__all__ = ["Measures"]

T = TypeVar("T", DepthHits, TreeResult)


class Measures:
    """The parts in ``path`` that are about ``head``. Lines that cannot be read or are about another one count for
    nothing."""

    def __init__(self, path: Path, head: Drafter, parts: int) -> None:
        self._path = path
        self._head = _digest(head)
        self._there: dict[str, list[JsonObject]] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
                if row["head_sha256"] == self._head:
                    self._there[row["part"]] = list(row["results"])
            except (ValueError, TypeError, KeyError):
                continue
        if self._there:
            logger.info("measure: %d of %d parts are there already", len(self._there), parts)

    def part(self, name: str, kind: type[T], measure: Callable[[], Iterable[T]]) -> tuple[T, ...]:
        """The results of a part: kept ones, or what ``measure`` finds now. Raises :class:`OutputError`."""
        try:
            return tuple(_read(kind, result) for result in self._there[name])
        except (KeyError, TypeError, AttributeError):  # not there, or written by another version
            results = tuple(measure())
        append_jsonl(self._path, [{"head_sha256": self._head, "part": name, "results": list(map(asdict, results))}])
        return results


def _read(kind: type[T], result: JsonObject) -> T:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in result.items()}
    return kind(**fields)


def _digest(head: Drafter) -> str:
    """SHA-256 over the configuration and the weights."""
    digest = hashlib.sha256(json.dumps(asdict(head.config)).encode())
    for name, weight in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
