"""Every error that a user can cause, in one tree.

    TrtkitError
    ├── UsageError          the command line asks for something that makes no sense          exit code 2
    ├── InputError          problems, prompts, calibration text
    ├── ConfigError         config.json, recipe, engine.json
    ├── CheckpointError     weights: missing, truncated, wrong shape, not finite
    ├── UnsupportedError    a combination that this GPU, model or backend cannot run
    ├── CapacityError       it does not fit into memory
    ├── QualityError        a quality gate (``--max-kl``) was missed
    ├── EngineError         an engine directory that cannot be opened or run
    ├── RequestError        one request that the engine refuses; the others go on
    ├── OutputError         the result could not be written
    ├── HubError            the model hub could not be reached or refused
    └── MissingDependency   an optional package is not installed

Catch :class:`TrtkitError` to catch them all. Each says what is wrong, where, and what to do::

    error: engines/mine/engine.json: engine format 7 is newer than this trtkit understands (1)
    hint:  upgrade trtkit, or rebuild the engine with `trtkit build`
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "HubError",
    "InputError",
    "MissingDependency",
    "OutputError",
    "QualityError",
    "RequestError",
    "TrtkitError",
    "UnsupportedError",
    "UsageError",
]


class TrtkitError(Exception):
    """Something the user can act on.

    ``message`` says what is wrong, ``where`` names the place (``file:line``, a tensor, an option), ``hint`` what to
    do about it, ``offenders`` lists every instance when there are several.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        offenders: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.offenders = tuple(offenders)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.message}" if self.where else self.message]
        lines += [f"  - {offender}" for offender in self.offenders]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(TrtkitError):
    """The command line asks for something that makes no sense."""

    exit_code = 2


class InputError(TrtkitError):
    """Problems, prompts or calibration text that cannot be read."""


class ConfigError(TrtkitError):
    """A configuration file that is wrong or incomplete."""


class CheckpointError(TrtkitError):
    """Weights that are missing, damaged or of the wrong shape."""


class UnsupportedError(TrtkitError):
    """A combination of model, precision, GPU and backend that cannot run."""


class CapacityError(TrtkitError):
    """The request does not fit into memory."""


class QualityError(TrtkitError):
    """A quality gate was missed; nothing was kept."""


class EngineError(TrtkitError):
    """An engine directory that cannot be opened or run."""


class RequestError(TrtkitError):
    """One request that the engine refuses; the others go on."""


class OutputError(TrtkitError):
    """The result could not be written."""


class HubError(TrtkitError):
    """The model hub could not be reached, or does not have what was asked for."""


class MissingDependency(TrtkitError):  # noqa: N818  (reads as what happened, like FileNotFound)
    """An optional package is not installed."""
