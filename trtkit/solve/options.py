"""``SolveOptions``: everything that decides what a run does, as data that ``run.json`` can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from trtkit.chat import variant_named
from trtkit.errors import TrtkitError, UsageError
from trtkit.runtime.api import SamplingParams
from trtkit.solve.answers import AnswerMode
from trtkit.solve.stopping import UNASSAILABLE, StopRule, parse_rules

__all__ = ["Order", "SolveOptions"]

Order: TypeAlias = Literal["pooled", "sequential"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """How problems are solved. Raises :class:`UsageError` with everything that is wrong at once."""

    samples: int = 32
    """Samples per problem."""
    max_tokens: int = 16384
    """Longest sample; the engine's total length may end it earlier."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0, top_p=0.9, min_p=0.05))
    """The default is what the Fast-Math model cards recommend."""
    variants: tuple[str, ...] = ("solve", "reason")
    """Prompt variants; the samples of a problem take them in turns."""
    seed: int = 0
    mode: AnswerMode = field(default_factory=AnswerMode)
    stop: tuple[str, ...] = ()
    """Stop rules beside ``unassailable``, which is always on, e.g. ``("agree(4)",)``."""
    full_vote: bool = False
    """Run every sample to its end and use no stop rule: for measuring, because samples that finish early are not a fair
    draw of all samples."""
    stop_at: Literal["think", "eos"] = "think"
    """Where a sample ends: at ``</think>``, or at the end of the turn, for models that box after it."""
    order: Order = "pooled"
    """``pooled``: samples of several problems share the batch. ``sequential``: one problem at a time."""
    outstanding: int = 128
    """Pooled: the next problem is submitted while fewer samples than this are unfinished. About twice the
    engine's batch keeps it full; samples of a settled problem that are still queued then cost nothing."""
    save_text: bool = False
    """Keep each sample's text in the journal."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)}: must be at least {least}"
            for name, least in (("samples", 1), ("max_tokens", 1), ("seed", 0), ("outstanding", 1))
            if getattr(self, name) < least
        ]
        if self.order not in ("pooled", "sequential"):
            wrong.append(f"order {self.order!r}: must be pooled or sequential")
        if self.stop_at not in ("think", "eos"):
            wrong.append(f"stop_at {self.stop_at!r}: must be think or eos")
        if self.full_vote and self.stop:
            wrong.append(f"stop {' '.join(self.stop)}: a full vote uses no stop rule")
        if not self.variants:
            wrong.append("variants: name at least one prompt variant")
        for check, values in ((variant_named, self.variants), (lambda text: parse_rules([text]), self.stop)):
            for value in values:
                try:
                    check(value)
                except TrtkitError as problem:
                    wrong.append(f"{problem.message} ({problem.hint})")
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)

    @property
    def rules(self) -> tuple[StopRule, ...]:
        """The stop rules in force."""
        if self.full_vote:
            return ()
        return tuple({rule.text: rule for rule in (*parse_rules(self.stop), UNASSAILABLE)}.values())

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``run.json``, with the stop rules in their canonical spelling."""
        data = asdict(self)
        data["variants"] = list(self.variants)
        data["stop"] = [rule.text for rule in self.rules]
        return data
