"""Calibration text: JSON lines or CSV of problems and worked solutions, rendered with the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.chat import VARIANTS, Chat
from trtkit.errors import CheckpointError, InputError
from trtkit.files import JsonObject, refuse_malformed, sampled_jsonl
from trtkit.log import logger
from trtkit.quant.batches import TextRow
from trtkit.tables import is_table, read_records

__all__ = ["CALIBRATION_FILE", "CalibrationText", "read_calibration"]

CALIBRATION_FILE = "calibration.jsonl"
"""Used when it lies beside the model's weights and nothing else was given."""

_PROBLEM = ("problem", "question")
_SOLUTION = ("generated_solution", "solution")
_LEAST_HELD_OUT = 8
_WHOLE_BYTES = 1 << 26
"""Smaller files are read whole, so that every unusable line is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """Rows that choose the scales, and other rows that judge the result."""

    calibration: tuple[TextRow, ...]
    held_out: tuple[TextRow, ...]


def read_calibration(path: Path, chat: Chat, *, rows: int, tokens: int, vocab: int) -> CalibrationText:
    """About ``rows`` calibration rows, each cut to ``tokens`` tokens, and a fifth of the whole held out (at least 8).

    A row has ``problem`` (or ``question``) with ``generated_solution`` (or ``solution``), as in OpenMathReasoning, or
    plain ``text``. The rows are spread evenly over the file, so a file sorted by topic is sampled fairly; of JSON lines
    beyond 64 MiB only these rows are read. Other solutions of a problem that judges calibrate nothing, unless too few
    rows are left. Raises :class:`InputError` naming every unusable line.
    """
    held = max(_LEAST_HELD_OUT, -(-rows // 4))
    found = _records(path, rows + held)
    offenders = [f"{place}: {reason}" for place, row in found if (reason := _wrong(row))]
    if offenders:
        raise InputError(
            f"{len(offenders)} row(s) cannot be used for calibration",
            where=str(path),
            offenders=offenders[:20],
            hint='each row needs "problem" and "generated_solution" (or "question" and "solution"), or "text"',
        )
    least = 2 * _LEAST_HELD_OUT
    if len(found) < least:
        raise InputError(
            f"only {len(found)} row(s): at least {least} are needed, half to calibrate and half to judge",
            where=str(path),
        )
    picked = _spread([row for _, row in found], rows + held)
    held = max(_LEAST_HELD_OUT, len(picked) // 5)
    judged = set(_spread(list(range(len(picked))), held))
    texts = [_render(row, chat, tokens) for row in picked]
    highest = max(max(text.tokens) for text in texts)
    if highest >= vocab:
        raise CheckpointError(
            f"the tokenizer gives id {highest}, the model has {vocab}",
            hint="tokenizer and weights do not belong together",
        )
    rest = [index for index in range(len(picked)) if index not in judged]
    asked = [_first(row, (*_PROBLEM, "text")) for row in picked]
    known = {asked[index] for index in judged}
    apart = [index for index in rest if asked[index] not in known]
    if len(apart) < _LEAST_HELD_OUT:
        logger.warning("%s: so few different problems that some of them calibrate and judge", path)
        apart = rest
    return CalibrationText(
        calibration=tuple(texts[index] for index in apart), held_out=tuple(texts[index] for index in sorted(judged))
    )


def _records(path: Path, count: int) -> list[tuple[str, JsonObject]]:
    """(place, row) of the whole file, or of ``count`` places in a large one."""
    if path.suffix.lower() == ".parquet" and path.is_file():
        raise InputError(
            "a Parquet file, and calibration text is read from JSON lines or CSV",
            where=str(path),
            hint='a thousand rows will do: pandas.read_parquet(FILE).sample(1000).to_json("calibration.jsonl", '
            'orient="records", lines=True)',
        )
    if path.is_file() and path.stat().st_size > _WHOLE_BYTES and not is_table(path):
        offenders: list[str] = []
        sampled = sampled_jsonl(path, count, offenders)
        refuse_malformed(path, offenders)
        return sampled
    known = (*_PROBLEM, *_SOLUTION, "text")
    return [(f"{path}:{line}", row) for line, row in read_records(path, known=known, needed=(*_PROBLEM, "text"))]


def _wrong(row: dict[str, Any]) -> str | None:
    if _first(row, ("text",)) is not None:
        return None
    missing = [names[0] for names in (_PROBLEM, _SOLUTION) if _first(row, names) is None]
    return f"no usable {' and '.join(missing)}" if missing else None


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _render(row: dict[str, Any], chat: Chat, tokens: int) -> TextRow:
    problem, solution = _first(row, _PROBLEM), _first(row, _SOLUTION)
    if problem is None or solution is None:
        text = _first(row, ("text",))
        assert text is not None
        return TextRow(tokens=chat.completion((), text)[:tokens])
    prompt = chat.prompt(problem, VARIANTS["solve"])
    return TextRow(tokens=(prompt + chat.completion(prompt, solution))[:tokens], prompt_tokens=len(prompt))


def _spread(items: list[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced, the last one among them."""
    count = min(count, len(items))
    return [items[(index + 1) * len(items) // count - 1] for index in range(count)]
