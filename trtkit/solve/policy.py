"""Named sets of options. What is set besides the policy on the command line wins over it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from trtkit.errors import UsageError
from trtkit.files import nearest
from trtkit.solve.options import DEFAULT_STOP

__all__ = ["POLICIES", "policy_named"]

POLICIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # One problem after the other, as a competition hands them out, under a clock; everything gets an answer.
        "competition": MappingProxyType(
            {
                "order": "sequential",
                "stop": (*DEFAULT_STOP, "stragglers(2)"),
                "kill_loops": True,
                "force_close": True,
                "default_answer": "0",
            }
        ),
    }
)
"""Fields of ``SolveOptions`` by name of the policy. A policy needs a time limit."""


def policy_named(name: str, *, time_limit: float | None) -> Mapping[str, Any]:
    """The options of a policy. Raises :class:`UsageError` for an unknown name, and without a time limit."""
    if name not in POLICIES:
        raise UsageError(f"unknown policy {name!r}{nearest(name, POLICIES)}", hint=f"one of: {', '.join(POLICIES)}")
    if time_limit is None:
        raise UsageError(f"--policy {name} works under a clock", hint="give it one, e.g. --time-limit 5h")
    return POLICIES[name]
