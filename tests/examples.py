"""How much of a costly test runs: a part that covers it by default, all of it under ``scripts/test --all``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hypothesis import settings

THOROUGH = os.environ.get("TRTKIT_TESTS") == "all"
"""Set by ``scripts/test --all``."""


def examples(count: int) -> settings:
    """How often hypothesis tries a property whose single try takes long."""
    from hypothesis import settings  # tests of a GPU use the rest of this file, and do without it

    return settings(max_examples=count if THOROUGH else max(6, count // 3))


def slow(*values: Any) -> Any:
    """Parameters of a test whose like runs by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


def paired(*axes: Sequence[Any]) -> list[Any]:
    """Every combination, as parameters. By default only so many run that any two values meet in one of them."""
    step = min(map(len, axes))
    return [
        pytest.param(*values) if sum(places) % step == 0 else slow(*values)
        for places, values in zip(
            itertools.product(*(range(len(axis)) for axis in axes)), itertools.product(*axes), strict=True
        )
    ]
