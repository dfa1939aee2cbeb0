"""``ProbeOptions``: when samples are asked for an answer on their way (``probes.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.errors import UsageError

__all__ = ["ProbeOptions", "read_probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """When samples are asked. Raises :class:`UsageError` for what makes no sense."""

    every: int
    """Tokens from one question to the next."""
    times: int
    """Equal answers in a row that end a sample; 0: none does, the answers are only written down."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.times < 0 or self.times == 1:
            raise UsageError(
                f"probe {self.every},{self.times}: ask every token or less often, and want 2 equal answers or more",
                hint="512,3: every 512 tokens, until three answers in a row are equal; 512,0 only writes them down",
            )

    def __str__(self) -> str:
        return f"{self.every},{self.times}"


def read_probe(text: str) -> ProbeOptions:
    """``EVERY,TIMES``. Raises :class:`UsageError`."""
    try:
        every, times = map(int, text.split(","))
    except ValueError:
        raise UsageError(f"probe {text!r}: not EVERY,TIMES", hint="for instance 512,3") from None
    return ProbeOptions(every=every, times=times)
