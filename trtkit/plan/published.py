"""Published speeds of 14B engines, and the planner's answer to the same question.

All are TensorRT-LLM engines of OpenMath-Nemotron-14B-Kaggle, 12 requests, keys and values in 16 bit, drafter 1x3:

- ``paper``: 4xL4, arXiv 2504.16891 table 9; maj@12 runs of the whole pipeline.
- ``tutorial``: 2xH100, the NeMo-Skills tutorial of August 2025 (aggregate = 10 x its per-request figure).
- ``notebook``: the same benchmark on 2xH100 as saved in that tutorial's notebook (``demo_aimo_inference.ipynb``).

The last two differ by 9 % (bf16), 14 % (fp8) and 3 % (with drafter): this much one run says about the next. Both divide
the tokens of the first ten finished samples, about 5,000 each, by the time until the tenth; the two others are
cancelled and not counted. Such tails are part of the fitted constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.errors import TrtkitError
from trtkit.gpu import profile_named
from trtkit.known_models import known_model
from trtkit.model_spec import ModelSpec
from trtkit.plan.memory import Workload, default_draft
from trtkit.plan.speed import step_cost, tokens_per_second
from trtkit.scheme import Precision, scheme_named

__all__ = ["PUBLISHED", "Comparison", "Published", "compare", "published_spec"]

_BATCH = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One measurement by others."""

    source: str
    gpu: str
    precision: Precision
    drafter: bool
    tokens_per_second: float
    """All requests together."""

    @property
    def work(self) -> Workload:
        """The question to the planner. 4xL4: answers of up to 16k tokens; 2xH100: samples of about 5,000 tokens, where
        a mean sample is half of ``length``."""
        return Workload(batch=_BATCH, length=16384 if self.source == "paper" else 10000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A measurement beside the planner's figure. Ratios are to bf16 of the same source."""

    published: Published
    planner: float
    published_ratio: float
    planner_ratio: float

    @property
    def error(self) -> float:
        """Relative error of the tokens per second."""
        return self.planner / self.published.tokens_per_second - 1

    @property
    def ratio_error(self) -> float:
        """Relative error of the ratio to bf16."""
        return self.planner_ratio / self.published_ratio - 1


def _figure(source: str, gpu: str, precision: Precision, speed: float, *, drafter: bool = False) -> Published:
    return Published(source=source, gpu=gpu, precision=precision, drafter=drafter, tokens_per_second=speed)


PUBLISHED = (
    _figure("paper", "l4x4", "bf16", 210),
    _figure("paper", "l4x4", "int8", 315),
    _figure("paper", "l4x4", "int4", 436),
    _figure("paper", "l4x4", "fp8", 310),
    _figure("paper", "l4x4", "fp8", 554, drafter=True),
    _figure("tutorial", "h100x2", "bf16", 346),
    _figure("tutorial", "h100x2", "fp8", 752),
    _figure("tutorial", "h100x2", "fp8", 1385, drafter=True),
    _figure("notebook", "h100x2", "bf16", 379.4),
    _figure("notebook", "h100x2", "fp8", 648.3),
    _figure("notebook", "h100x2", "fp8", 1342.7, drafter=True),
)


def published_spec() -> ModelSpec:
    """The architecture of all published runs."""
    spec = known_model("nemotron-14b")
    if spec is None:  # the table of known models was edited
        raise TrtkitError("no architecture called nemotron-14b")
    return spec


def compare() -> tuple[Comparison, ...]:
    """Every published figure with the planner's. The bf16 line of a source comes first in ``PUBLISHED``."""
    found: list[Comparison] = []
    base: dict[str, tuple[float, float]] = {}
    for item in PUBLISHED:
        planner = _planner(item)
        first, first_planner = base.setdefault(item.source, (item.tokens_per_second, planner))
        found.append(
            Comparison(
                published=item, planner=planner,
                published_ratio=item.tokens_per_second / first, planner_ratio=planner / first_planner,
            )
        )  # fmt: skip
    return tuple(found)


def _planner(item: Published) -> float:
    spec, gpu = published_spec(), profile_named(item.gpu)
    draft = default_draft(spec) if item.drafter else None
    cost = step_cost(spec, scheme_named(item.precision), gpu, item.work, item.work.batch, draft)
    return tokens_per_second(cost, gpu, item.work.batch, draft)
