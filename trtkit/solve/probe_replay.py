"""Saved samples as they would have been if they had been asked on their way: from what they said when they were.

A sample that was asked writes what it would have written otherwise (``probes.py``), so one run with ``--probe EVERY,0``
says what any number of equal answers would have saved, and what it would have cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from trtkit.errors import InputError
from trtkit.solve.answers import AnswerMode, read_answer
from trtkit.solve.probe_options import ProbeOptions
from trtkit.solve.traces import Trace, Traces
from trtkit.solve.vote import Same

__all__ = ["asked", "check_probes"]


def asked(trace: Trace, options: ProbeOptions, mode: AnswerMode, same: Same) -> Trace:
    """The sample under these options; its tokens are those that it wrote, answers that were taken back included."""
    latest, times, spent = None, 0, 0
    for probe in trace.probes:
        if probe.at % options.every:
            continue  # it was asked more often
        spent += probe.tokens
        answer = read_answer(probe.box, mode)
        again = answer is not None and latest is not None and same(answer, latest)
        latest, times = answer, times + 1 if again else int(answer is not None)
        if options.times and times >= options.times:
            return _as_long(replace(trace, box=probe.box, closed=True, looped=False), trace, probe.at + spent)
    return _as_long(trace, trace, trace.tokens + spent)


def _as_long(changed: Trace, trace: Trace, tokens: int) -> Trace:
    """With so many tokens, and the time in proportion."""
    seconds = None if trace.seconds is None else trace.seconds * tokens / trace.tokens
    return replace(changed, tokens=tokens, seconds=seconds)


def check_probes(traces: Traces, wanted: Sequence[ProbeOptions]) -> None:
    """Raise :class:`InputError` for options under which the samples were not asked."""
    places = [probe.at for problem in traces.problems for trace in problem.traces for probe in trace.probes]
    every = math.gcd(*places)
    wrong = [f"probe({options.every},{options.times})" for options in wanted if not every or options.every % every]
    if wrong:
        said = f"the samples were asked every {every} tokens" if every else "the samples were not asked on their way"
        raise InputError(
            said, offenders=wrong,
            hint="make a run with --full-vote --probe EVERY,0; EVERY may be any multiple of that in the rules",
        )  # fmt: skip
