"""One line per problem and run: bars, dots and words, ready to be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trtkit.report.latex import readable
from trtkit.report.records import Result, Run, Sample

__all__ = ["Bar", "Dot", "Line", "ProblemRow", "problem_rows"]

_SHOWN_VOTES = 4
_LONGEST_ANSWER = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A piece of the vote bar, in percent of its width."""

    x: float
    width: float
    kind: str
    """``right``, ``wrong``, ``first`` (winner, nothing known), ``other``, ``blank``, ``cancelled``."""
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A sample on the token axis, in percent of its width."""

    x: float
    y: int
    """So that equal ones lie beside each other."""
    kind: str
    mark: str
    """``stop``, ``cut`` (by budget or deadline), ``forced``, ``looped``."""
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A problem in one run."""

    run: str
    place: int
    """Which run."""
    state: str
    """``right``, ``wrong``, ``none`` (no answer), ``unknown`` (no known answer), ``open`` (not settled)."""
    verdict: str
    answer: str
    bars: tuple[Bar, ...]
    votes: str
    dots: tuple[Dot, ...]
    tokens: str
    time: str
    time_width: float
    share_at: float | None
    flags: tuple[str, ...]
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemRow:
    """A problem in all runs, with what it can be sorted by."""

    id: str
    text: str
    gold: str | None
    order: int
    lines: tuple[Line, ...]
    states: str
    wrong: int
    tokens: int
    seconds: float
    margin: float
    """Smallest lead of the winner over the runner-up, in votes."""


_VERDICTS = {
    "right": "right", "wrong": "wrong", "none": "no answer", "unknown": "answered", "open": "not settled",
}  # fmt: skip
_CUT = ("length", "deadline")
_COLUMN = 2.5
"""Percent of the axis: marks closer than this are set apart vertically."""
_OFFSETS = (0, -5, 5, -9, 9)
_MARK_WORDS = {"stop": "finished", "cut": "cut off", "forced": "forced", "looped": "looped"}


def problem_rows(runs: Sequence[Run]) -> list[ProblemRow]:
    """Problems in the order of the first run's file, then those that only later runs have."""
    longest = max((s.tokens for run in runs for r in run.results for s in r.samples), default=1) or 1
    slowest = max((max(_spent(r), r.share_seconds or 0.0) for run in runs for r in run.results), default=0.0)
    found: dict[tuple[str | None, ...], list[tuple[int, Run, Result]]] = {}
    # What the runs of one problems file know of a problem, those that still find the file say for all of them.
    texts = {(_file(run), result.id): result.text for run in runs for result in run.results if result.text}
    golds = {(r.id, r.text): r.gold for run in reversed(runs) for r in run.results if r.gold is not None}
    for place, run in enumerate(runs):
        for result in run.results:
            text = texts.get((_file(run), result.id))
            # The same id in another problems file may be another problem, or have another known answer.
            gold = golds.get((result.id, text)) if result.gold is None else result.gold
            key = (result.id, text, gold) if text and _differ(runs) else (result.id, _file(run))
            found.setdefault(key, []).append((place, run, result))
    return [
        _row(order, tuple((_line(place, run, result, longest, slowest or 1.0)) for place, run, result in group))
        for order, group in enumerate(found.values())
    ]


def _file(run: Run) -> str:
    return run.problems_digest or run.label


def _differ(runs: Sequence[Run]) -> bool:
    return len(set(map(_file, runs))) > 1


def _row(order: int, lines: tuple[Line, ...]) -> ProblemRow:
    results = [line.result for line in lines]
    text = next((result.text for result in results if result.text), None)
    return ProblemRow(
        id=results[0].id,
        text=readable(text) if text else "",
        gold=next((result.gold for result in results if result.gold is not None), None),
        order=order,
        lines=lines,
        states=" ".join(dict.fromkeys(line.state for line in lines)),
        wrong=sum(line.state in ("wrong", "none") for line in lines),
        tokens=sum(result.tokens for result in results),
        seconds=sum(_spent(result) for result in results),
        margin=min(_margin(result) for result in results),
    )


def _margin(result: Result) -> float:
    counts = [vote.count for vote in result.votes]
    return float((counts or [0])[0] - (counts[1] if len(counts) > 1 else 0))


def _line(place: int, run: Run, result: Result, longest: int, slowest: float) -> Line:
    state = _state(result)
    share = result.share_seconds
    return Line(
        run=run.label,
        place=place,
        state=state,
        verdict=_VERDICTS[state],
        answer=_short(result.answer, _LONGEST_ANSWER) if result.answer is not None else "–",
        bars=_bars(result),
        votes=_votes(result),
        dots=_dots(result, longest),
        tokens=_tokens(result),
        time=_time(result),
        time_width=round(100 * _spent(result) / slowest, 2),
        share_at=None if share is None else round(100 * share / slowest, 2),
        flags=_flags(result),
        result=result,
    )


def _state(result: Result) -> str:
    if not result.settled:
        return "open"
    if result.answer is None:
        return "none"
    return "unknown" if result.correct is None else "right" if result.correct else "wrong"


def _bars(result: Result) -> tuple[Bar, ...]:
    whole = max(result.asked, len(result.samples), 1)
    pieces: list[tuple[int, str, str]] = []
    for number, vote in enumerate(result.votes):
        kind = "other" if number else "first"
        if vote.correct is not None:
            kind = "right" if vote.correct else "other" if number else "wrong"
        pieces.append((vote.count, kind, f"{_short(vote.answer, _LONGEST_ANSWER)}: {_of(vote.count, 'vote')}"))
    pieces.append((result.blank, "blank", f"without an answer: {_of(result.blank, 'sample')}"))
    pieces.append((result.cancelled, "cancelled", f"cancelled: {_of(result.cancelled, 'sample')}"))
    bars, x = [], 0.0
    for count, kind, said in pieces:
        if count:
            width = 100 * count / whole
            bars.append(Bar(x=round(x, 3), width=round(width, 3), kind=kind, said=said))
            x += width
    return tuple(bars)


def _votes(result: Result) -> str:
    if not result.samples:
        return "no finished sample"
    shown = [f"{_short(vote.answer, 24)} ×{vote.count}" for vote in result.votes[:_SHOWN_VOTES]]
    if len(result.votes) > _SHOWN_VOTES:
        shown.append(f"{len(result.votes) - _SHOWN_VOTES} more")
    if result.blank:
        shown.append(f"no answer ×{result.blank}")
    return ", ".join(shown)


def _dots(result: Result, longest: int) -> tuple[Dot, ...]:
    taken: Counter[int] = Counter()
    dots = []
    for sample in result.samples:
        x = round(2 + 96 * sample.tokens / longest, 2)
        column = round(x / _COLUMN)
        dots.append(_dot(sample, x, _OFFSETS[taken[column] % len(_OFFSETS)]))
        taken[column] += 1
    return tuple(dots)


def _dot(sample: Sample, x: float, y: int) -> Dot:
    mark = "forced" if sample.forced else "looped" if sample.looped else "stop"
    mark = "cut" if mark == "stop" and sample.ending in _CUT else mark
    kind = "first" if sample.correct is None else "right" if sample.correct else "wrong"
    kind = "blank" if sample.vote is None else kind
    answer = "no answer" if sample.vote is None else _short(sample.box or "", 40)
    said = f"sample {sample.index}: {sample.tokens:,} tokens, {_MARK_WORDS[mark]}, {answer}"
    return Dot(x=x, y=y, kind=kind, mark=mark, said=said)


def _tokens(result: Result) -> str:
    lengths = sorted(sample.tokens for sample in result.samples)
    if not lengths:
        return "–"
    middle = len(lengths) // 2
    median = lengths[middle] if len(lengths) % 2 else (lengths[middle - 1] + lengths[middle]) / 2
    return f"{lengths[0]:,} – {lengths[-1]:,}, median {median:,.0f}"


def _spent(result: Result) -> float:
    """Seconds to hold against the share: those that the clock charged, else those from submitting to settling."""
    return (result.seconds or 0.0) if result.used_seconds is None else result.used_seconds


def _time(result: Result) -> str:
    if result.seconds is None:
        return "–"
    share = f" of {result.share_seconds:,.1f} s" if result.share_seconds is not None else ""
    return f"{_spent(result):,.1f} s{share}"


def _flags(result: Result) -> tuple[str, ...]:
    counts = (
        (sum(sample.truncated for sample in result.samples), "truncated"),
        (sum(sample.forced for sample in result.samples), "forced"),
        (sum(sample.looped for sample in result.samples), "looped"),
        (result.cancelled, "cancelled"),
    )
    flags = [f"{count} {word}" for count, word in counts if count]
    calls = sum(sample.tool_calls for sample in result.samples)
    if calls:
        flags.append(_of(calls, "code run"))
    late = sum(sample.ending == "deadline" and not sample.forced for sample in result.samples)
    if late:
        flags.append(f"{late} cut by the deadline")
    if result.defaulted:
        flags.append("default answer")
    if result.tied:
        flags.append("tie")
    if result.stopped_early:
        flags.append(f"ended by {result.stopped_early}")
    if result.error:
        flags.append(f"refused: {result.error}")
    return tuple(flags)


def _short(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _of(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
