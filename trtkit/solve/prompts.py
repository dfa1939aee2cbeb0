"""What sample ``i`` of a problem is asked, and with which seed. Neither depends on the order of anything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from trtkit.chat import PromptVariant, variant_named

__all__ = ["sample_seed", "variant_of"]


def variant_of(names: Sequence[str], index: int) -> PromptVariant:
    """The prompt variant of sample ``index``: the named variants take turns.

    Repeating a name gives it a larger share. Raises :class:`ConfigError` for an unknown name.
    """
    return variant_named(names[index % len(names)])


def sample_seed(run_seed: int, problem_id: str, index: int) -> int:
    """Seed of one sample, in 0 .. 2**63 - 1.

    A hash, so that it does not depend on the order of the problems, on how many there are, or on which
    samples were already there when a run was resumed.
    """
    text = f"{run_seed}\0{index}\0{problem_id}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") >> 1
