"""``ProbeOptions``: when samples are asked for an answer on their way (``probes.py``)."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.errors import ConfigError

__all__ = ["ProbeOptions", "read_probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """When samples are asked. Raises :class:`ConfigError` for what makes no sense."""

    every: int
    """Tokens from one question to the next."""
    times: int
    """Equal answers in a row that end a sample."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.times < 2:
            raise ConfigError(
                f"probe {self.every},{self.times}: ask every 1 token or more, and want 2 equal answers or more",
                hint="for instance 512,3: every 512 tokens, until three answers in a row are equal",
            )


def read_probe(text: str) -> ProbeOptions:
    """``EVERY,TIMES``. Raises :class:`ConfigError`."""
    try:
        every, times = map(int, text.split(","))
    except ValueError:
        raise ConfigError(f"probe {text!r}: not EVERY,TIMES", hint="for instance 512,3") from None
    return ProbeOptions(every=every, times=times)
