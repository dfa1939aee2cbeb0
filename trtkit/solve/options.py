"""``SolveOptions``: everything that decides what a run does, as data that ``run.json`` can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from trtkit.chat import variant_named
from trtkit.errors import TrtkitError, UsageError
from trtkit.runtime.api import SamplingParams
from trtkit.scheme import OutputLayer
from trtkit.solve.answers import Answer, AnswerMode, read_answer
from trtkit.solve.clock import TimeBudget
from trtkit.solve.probe_options import ProbeOptions
from trtkit.solve.sandbox import SandboxOptions
from trtkit.solve.stopping import UNASSAILABLE, StopRule, parse_rules
from trtkit.solve.vote import Weighting, parse_weighting

__all__ = ["DEFAULT_STOP", "NO_RULE", "Order", "SolveOptions", "StopAt"]

Order: TypeAlias = Literal["pooled", "sequential"]
StopAt: TypeAlias = Literal["think", "eos", "first-box"]

DEFAULT_STOP = ("certificate(0.05)",)
"""See docs/solver.md for what it saves."""
NO_RULE = "none"
"""As the only stop rule: none but ``unassailable``."""


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
    stop: tuple[str, ...] = DEFAULT_STOP
    """Stop rules beside ``unassailable``, which is always on. ``()`` or ``("none",)``: no other."""
    full_vote: bool = False
    """Run every sample to its own end: no stop rule, no loop kill, no forced answer. For measuring, because samples
    that finish early are not a fair draw of all samples."""
    stop_at: StopAt = "think"
    """Where a sample ends: at ``</think>``; at the end of the turn, for models that box after it; or at the first
    complete answer, if that comes before ``</think>``."""
    kill_loops: bool = True
    """End samples that go in circles (:func:`trtkit.solve.ends.is_looping`)."""
    force_close: bool = True
    """Make a sample whose budget or time is spent write an answer: its thought is ended and a box opened."""
    probe: ProbeOptions | None = None
    """Ask samples on their way, and end those that give the same answer several times; None: do not ask."""
    weighting: str = "majority"
    """How votes weigh; see :func:`trtkit.solve.vote.parse_weighting`."""
    order: Order = "pooled"
    """``pooled``: samples of several problems share the batch. ``sequential``: one problem at a time."""
    outstanding: int = 128
    """Pooled: the next problem is submitted while fewer samples than this are unfinished. About twice the
    engine's batch keeps it full; samples of a settled problem that are still queued then cost nothing."""
    together: int = 8
    """Pooled, without a time limit: samples of one problem that run at once while other problems fill the batch; 0 for
    all. Fewer at once means that more of them never start when a stop rule holds."""
    time_limit: float | None = None
    """Seconds for everything, from the start of the program, earlier sessions of the run included."""
    reserve: float | None = None
    """Seconds of it kept back; 1 % by default."""
    difficulty: Mapping[str, float] | None = None
    """Expected tokens by problem id: scales the shares of a time limit."""
    tools: SandboxOptions | None = None
    """Run the Python code that samples write, and let them read what it prints; None: code is just text."""
    default_answer: str | None = None
    """What is answered where no sample gave an answer."""
    policy: str | None = None
    """Name of the set of options that these came from; for the record."""
    save_text: bool = False
    """Keep each sample's text in the journal."""
    save_confidence: bool = False
    """Keep each sample's mean log-probability in the journal, also where votes do not weigh by it."""
    output_layer: OutputLayer | None = None
    """How the engine runs lm_head, where not as it was built; for the record, because it changes the samples."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name)}: must be at least {least}"
            for name, least in (("samples", 1), ("max_tokens", 1), ("seed", 0), ("outstanding", 1), ("together", 0))
            if getattr(self, name) < least
        ]
        for name, known in (("order", get_args(Order)), ("stop_at", get_args(StopAt))):
            if getattr(self, name) not in known:
                wrong.append(f"{name} {getattr(self, name)!r}: must be {' or '.join(known)}")
        if self.output_layer not in (None, *get_args(OutputLayer)):
            wrong.append(f"output layer {self.output_layer!r}: must be model or int8")
        if self.full_vote and self._stop_texts and self.stop != DEFAULT_STOP:
            wrong.append(f"stop {' '.join(self.stop)}: a full vote uses no stop rule")
        if self.full_vote and self.time_limit is not None:
            wrong.append("time limit: a full vote runs every sample to its end")
        if self.probe is not None and self.tools is not None:
            wrong.append("probe: not with tools")
        if self.probe is not None and self.probe.times and not self.forces:
            wrong.append("probe: ends samples, so not with a full vote or without forced answers; 0 times ends none")
        if not self.variants:
            wrong.append("variants: name at least one prompt variant")
        wrong += self._unreadable()
        if wrong:
            raise UsageError("options that make no sense", offenders=wrong)

    @property
    def wave(self) -> int:
        """Samples of one problem to run at once."""
        whole = self.full_vote or self.order == "sequential" or self.time_limit is not None
        return self.samples if whole or self.together == 0 else self.together

    def lanes(self, rows: int) -> int | None:
        """Lanes of the order in which samples are counted, for an engine of so many rows; None: as they arrive."""
        return None if self.time_limit is not None else max(1, min(self.wave, rows))

    def _unreadable(self) -> list[str]:
        """Complaints about texts and times that other modules understand."""
        wrong: list[str] = []
        limit = self.time_limit
        checks: list[tuple[Any, tuple[Any, ...]]] = [
            (variant_named, self.variants),
            (lambda text: parse_rules([text]), self._stop_texts),
            (parse_weighting, (self.weighting,)),
            (lambda reserve: TimeBudget.of(limit or 0.0, 1, reserve), () if limit is None else (self.reserve,)),
        ]
        for check, values in checks:
            for value in values:
                try:
                    check(value)
                except TrtkitError as problem:
                    wrong.append(f"{problem.message} ({problem.hint})")
        if limit is None and self.reserve is not None:
            wrong.append(f"reserve {self.reserve:g} s: only with a time limit")
        if self.default_answer is not None and self.fallback is None:
            wrong.append(f"default answer {self.default_answer!r}: not an answer in answer mode {self.mode.kind}")
        return wrong

    @property
    def _stop_texts(self) -> tuple[str, ...]:
        return () if self.stop == (NO_RULE,) else self.stop

    @property
    def rules(self) -> tuple[StopRule, ...]:
        """The stop rules in force."""
        if self.full_vote:
            return ()
        return tuple({rule.text: rule for rule in (*parse_rules(self._stop_texts), UNASSAILABLE)}.values())

    @property
    def votes(self) -> Weighting:
        """How votes weigh."""
        return parse_weighting(self.weighting)

    @property
    def wants_logprobs(self) -> bool:
        """Samples have to know how sure the model was."""
        return self.save_confidence or self.votes.by == "confidence"

    @property
    def fallback(self) -> Answer | None:
        """The default answer."""
        return read_answer(self.default_answer, self.mode)

    @property
    def kills_loops(self) -> bool:
        """Loop kill is in force."""
        return self.kill_loops and not self.full_vote

    @property
    def forces(self) -> bool:
        """Forced answers are in force."""
        return self.force_close and not self.full_vote

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``run.json``, with the stop rules in their canonical spelling."""
        data = asdict(self)
        data["variants"] = list(self.variants)
        data["stop"] = [rule.text for rule in self.rules]
        data["weighting"] = self.votes.text
        data["kill_loops"], data["force_close"] = self.kills_loops, self.forces
        return data
