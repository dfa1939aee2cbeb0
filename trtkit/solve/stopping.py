"""When a problem needs no more samples: pure functions of the tally so far and the samples still outstanding.

A rule is written as text, ``unassailable`` or ``agree(4)``, so that runs can record which rules they used.
To add one, write a function that takes its numbers and returns a :class:`Holds`, and list it in ``_RULES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.solve.vote import Tally

__all__ = ["UNASSAILABLE", "Holds", "StopRule", "first_to_hold", "parse_rule", "parse_rules"]

Holds = Callable[[Tally, int], bool]
"""(tally, samples outstanding) -> may the problem stop?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """A named rule. ``text`` parses back to the same rule."""

    text: str
    holds: Holds


def _unassailable() -> Holds:
    """The leader cannot be caught up even if every outstanding sample agrees on the runner-up.

    Drawing level is not ruled out but counts as catching up: the tie rule might then prefer the other one.
    So the winner is the one that the full vote would have had.
    """
    return lambda tally, outstanding: tally.lead > outstanding


def _agree(count: int) -> Holds:
    """The first ``count`` answers to arrive are all equal. Samples without an answer do not count."""

    def holds(tally: Tally, outstanding: int) -> bool:
        first = tally.order[:count]
        return len(first) == count and len(set(first)) == 1

    return holds


_RULES: dict[str, tuple[Callable[..., Holds], tuple[int, ...]]] = {
    # name: (function, smallest value of each number)
    "unassailable": (_unassailable, ()),
    "agree": (_agree, (1,)),
}
_RULE = re.compile(r"([A-Za-z][A-Za-z_-]*)\s*(?:\(([^()]*)\))?")


def parse_rule(text: str) -> StopRule:
    """``agree(4)`` -> the rule. Raises :class:`UsageError` naming the rules and their numbers."""
    match = _RULE.fullmatch(text.strip())
    name = match.group(1) if match else text.strip()
    if match is None or name not in _RULES:
        raise UsageError(
            f"unknown stop rule {text.strip()!r}{nearest(name, _RULES)}",
            hint=f"one of: {', '.join(_usages())}",
        )
    make, smallest = _RULES[name]
    given = [part.strip() for part in (match.group(2) or "").split(",")]
    numbers = [int(part) for part in given if re.fullmatch(r"[0-9]{1,9}", part)]
    in_range = len(numbers) == len(smallest) and all(map(int.__ge__, numbers, smallest))
    if not in_range or len(numbers) != len([part for part in given if part]):
        raise UsageError(f"stop rule {text.strip()!r}: not in its form", hint=f"one of: {', '.join(_usages())}")
    canonical = name + (f"({','.join(map(str, numbers))})" if numbers else "")
    return StopRule(text=canonical, holds=make(*numbers))


def parse_rules(texts: Sequence[str]) -> tuple[StopRule, ...]:
    """Several rules; each text may itself hold several, separated by ``+``. Repetitions are dropped."""
    rules = [parse_rule(part) for text in texts for part in text.split("+")]
    return tuple({rule.text: rule for rule in rules}.values())


UNASSAILABLE = parse_rule("unassailable")
"""Always on: it never changes the outcome."""


def first_to_hold(rules: Sequence[StopRule], tally: Tally, outstanding: int) -> StopRule | None:
    """The first of ``rules`` that lets the problem stop with samples still ``outstanding``."""
    return next((rule for rule in rules if rule.holds(tally, outstanding)), None)


def _usages() -> list[str]:
    return [name + ("(" + ",".join("N" for _ in least) + ")" if least else "") for name, (_, least) in _RULES.items()]
